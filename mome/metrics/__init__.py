"""Overlap and surface metrics, and the evaluation of folders of masks. Independent of the model."""

from mome.metrics.evaluate import Score, evaluate_folder, summarise
from mome.metrics.overlap import dice
from mome.metrics.surface import hausdorff95, normalized_surface_dice

__all__ = ["Score", "dice", "evaluate_folder", "hausdorff95", "normalized_surface_dice", "summarise"]
