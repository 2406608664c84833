"""Masks of structures in a label map, by the rules of its data set."""

from __future__ import annotations

import numpy as np

from mome.errors import InputError
from mome.labels.dataset import StructureRule
from mome.volumes.sides import split_sides


def structure_mask(array: np.ndarray, affine: np.ndarray, rule: StructureRule, name: str) -> np.ndarray:
    """Returns the mask of one structure.

    Args:
        array: Whole numbers (i, j, k).
        affine: (4, 4), voxel centres to RAS mm.
        rule: Which values make up the structure.
        name: The structure, for errors.

    Returns:
        Bool (i, j, k).

    Raises:
        InputError: The values stand for both sides, and these cannot be told apart.
    """
    mask = array == rule.values[0] if len(rule.values) == 1 else np.isin(array, rule.values)
    if rule.side is None:
        return mask
    try:
        return split_sides(mask, affine)[rule.side]
    except InputError as error:
        raise InputError(f"{name}: {error.what}", hint=error.hint) from error
