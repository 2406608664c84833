"""What every post-processor has, and what it may know besides the mask."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

Box = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
"""First voxel and last + 1 along i, j and k."""


@dataclass(frozen=True)
class MaskPlace:
    """Where a mask lies.

    Attributes:
        spacing: Voxel size in mm along the mask's axes.
        voxel_ml: Volume of a voxel in ml.
        box: The box of the scan that the mask is given in.
        shape: Voxels of the scan (i, j, k).
        other: Returns the mask of another structure inside of a box, bool; a structure whose own rules run before.
    """

    spacing: tuple[float, float, float]
    voxel_ml: float
    box: Box
    shape: tuple[int, int, int]
    other: Callable[[str, Box], np.ndarray]


class Processed(NamedTuple):
    """The result of a post-processor.

    Attributes:
        mask: Bool, of the shape of the mask that was given.
        change: What was changed, in words that stand before the name of the structure, as in "3 pieces, 1.2 ml,
            removed from"; None where nothing was changed.
    """

    mask: np.ndarray
    change: str | None


class PostProcessor(ABC):
    """Changes one mask. It is built from its `Config`, a frozen, keyword-only dataclass.

    Attributes:
        reads: Names of the structures whose masks it reads.
    """

    reads: tuple[str, ...] = ()

    def __init__(self, config: Any) -> None:
        self.config = config

    @abstractmethod
    def apply(self, mask_IJK: np.ndarray, place: MaskPlace) -> Processed:
        """Returns the changed mask; the given one stays as it is.

        Args:
            mask_IJK: Bool, inside of the smallest box that holds the mask; it has at least one voxel.
            place: Where it lies.
        """


def millilitres(voxels: int, place: MaskPlace) -> str:
    """Returns a volume in words, with two digits below 1 ml."""
    volume = voxels * place.voxel_ml
    return f"{volume:.1f} ml" if volume >= 1 else f"{volume:.2g} ml"
