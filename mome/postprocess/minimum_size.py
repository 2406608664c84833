"""A mask without its small pieces."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mome.postprocess.base import MaskPlace, PostProcessor, Processed
from mome.postprocess.components import keep_pieces, label_pieces
from mome.registry import at_least
from mome.typed import check_range
from mome.volumes.grid import SPACING_ROUNDING


class MinimumSize(PostProcessor):
    """Removes connected pieces (26 neighbours) below a volume, or below a share of the largest piece (our choice).

    A mask all of whose pieces are small becomes empty, which a note says.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Settings.

        Args:
            ml: Volume of the smallest piece that is kept, in ml.
            share: The smallest piece that is kept, as a share of the largest one, from 0 to 1.
        """

        ml: float = 0.1
        share: float = 0.0

    config: Config

    def __init__(self, config: Config) -> None:
        at_least(0, "minimum_size", ml=config.ml)
        check_range("minimum_size", 0, 1, share=config.share)  # above 1, no piece would be kept
        super().__init__(config)

    def apply(self, mask_IJK: np.ndarray, place: MaskPlace) -> Processed:
        """See `PostProcessor.apply`."""
        numbers_IJK, sizes = label_pieces(mask_IJK)
        # Rounding must not remove a piece of exactly the smallest volume.
        large = sizes * place.voxel_ml >= self.config.ml * (1 - 3 * SPACING_ROUNDING)
        return keep_pieces(numbers_IJK, sizes, large & (sizes >= self.config.share * sizes[0]), place)
