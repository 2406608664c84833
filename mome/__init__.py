"""Text-prompted CT segmentation with mixtures of experts."""

__version__ = "0.1.0"
