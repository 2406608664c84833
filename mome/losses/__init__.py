"""Losses for partially labelled data. Registered by name; nothing here imports torch."""

from mome.registry import LOSSES

LOSSES.register("bce_dice", "mome.losses.bce_dice:BCEDiceLoss", summary="masked cross entropy + Dice")
LOSSES.register("focal", "mome.losses.focal:FocalLoss", summary="cross entropy that weighs hard voxels more")
LOSSES.register("tversky", "mome.losses.tversky:TverskyLoss", summary="Dice with weights for misses and false alarms")
LOSSES.register("boundary", "mome.losses.boundary:BoundaryLoss", summary="probability × distance to the surface")
LOSSES.register("marginal", "mome.losses.marginal:MarginalLoss", summary="softmax over prompts that exclude each other")
LOSSES.register(
    "deep_supervision", "mome.losses.deep_supervision:DeepSupervision", summary="another loss at several scales"
)
LOSSES.register("weighted_sum", "mome.losses.weighted_sum:WeightedSum", summary="sum of other losses")
