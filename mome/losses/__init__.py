"""Losses for partially labelled data. Registered by name; nothing here imports torch."""

from mome.registry import LOSSES

LOSSES.register("bce_dice", "mome.losses.bce_dice:BCEDiceLoss", summary="masked cross entropy + Dice")
