"""Needs the package: pip install mome."""

from mome.auto import MoME, MoMEConfig, MoMEProcessor
