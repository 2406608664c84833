"""Inference on whole scans: tiles, a stream of logits, and masks on the scan's own grid."""

from mome.inference.folder import segment_folder
from mome.inference.jobs import segment_jobs
from mome.inference.prepared import PreparedPrompts
from mome.inference.result import Segmentation
from mome.inference.segment_one import segment
from mome.inference.segmenter import Segmenter

__all__ = ["PreparedPrompts", "Segmentation", "Segmenter", "segment", "segment_folder", "segment_jobs"]
