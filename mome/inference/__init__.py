"""Inference over whole volumes: tiles, streaming fusion, masks on the scan's own grid."""

from mome.inference.folder import segment_folder
from mome.inference.result import Segmentation
from mome.inference.segmenter import Segmenter, segment

__all__ = ["Segmentation", "Segmenter", "segment", "segment_folder"]
