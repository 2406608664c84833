"""The largest pieces of a mask."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mome.postprocess.base import MaskPlace, PostProcessor, Processed
from mome.postprocess.components import keep_pieces, label_pieces
from mome.registry import at_least


class LargestComponent(PostProcessor):
    """Keeps the n largest connected pieces of a mask (26 neighbours; our choice)."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Settings.

        Args:
            n: Number of pieces that are kept.
        """

        n: int = 1

    config: Config

    def __init__(self, config: Config) -> None:
        at_least(1, "largest_component", n=config.n)
        super().__init__(config)

    def apply(self, mask_IJK: np.ndarray, place: MaskPlace) -> Processed:
        """See `PostProcessor.apply`."""
        numbers_IJK, sizes = label_pieces(mask_IJK)
        return keep_pieces(numbers_IJK, sizes, np.arange(len(sizes)) < self.config.n, place)
