"""Mirrored patches."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mome.data.augmentations.base import Flip, PatchFrame
from mome.typed import check_range


class FlipPatch(Flip):
    """Mirrors left and right, front and back, head and feet, each with its own probability (our choice).

    The class table says which labels are exchanged when left and right are. The other two axes keep the sides, so that
    a label keeps its name there.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Settings of `flip`.

        Args:
            probability: Share of the patches in which left and right change places.
            front_back: The same for front and back, among all patches.
            head_foot: The same for head and feet, among all patches.
        """

        probability: float = 0.5
        front_back: float = 0.0
        head_foot: float = 0.0

    def __init__(self, config: Config, *, frame: PatchFrame) -> None:
        super().__init__(config, frame=frame)
        check_range("augmentation flip", 0, 1, front_back=config.front_back, head_foot=config.head_foot)
        depth_axis = ({0, 1, 2} - {frame.left_right_axis, frame.height_axis}).pop()
        self.chances = {
            frame.left_right_axis: config.probability, depth_axis: config.front_back,
            frame.height_axis: config.head_foot,
        }  # fmt: skip
        self.probability = 1.0  # each axis has its own draw

    def may_mirror(self, axis: int) -> bool:
        return self.chances[axis] > 0

    def axes(self, rng: np.random.Generator) -> tuple[int, ...]:
        return tuple(axis for axis, chance in self.chances.items() if rng.random() < chance)
