"""Stored bits of uncompressed pixels: the value lies in BitsStored bits that end at HighBit (DICOM PS3.5, 8.1.1)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from mome.errors import InputError


def stored_values(raw: np.ndarray, bits: tuple[int, int, int], dataset: Any, where: Path) -> np.ndarray:
    """Returns values without the bits outside the stored ones, where old files keep overlays.

    Earlier editions of the standard allowed a HighBit above BitsStored − 1. The value then lies in the upper bits, and
    the bits below it are 0 or an overlay that the header declares. Files of other writers keep the value in the lower
    bits in spite of their HighBit; the two cannot be told apart where the lower bits are used.

    Args:
        raw: (rows, columns) of the type that BitsAllocated and PixelRepresentation give.
        bits: BitsAllocated, BitsStored and HighBit.
        dataset: The header, which may declare overlays.
        where: The file, for errors.

    Raises:
        InputError: Bits below the value are used and no overlay is declared in them.
    """
    allocated, stored, high = bits
    above, below = allocated - 1 - high, high + 1 - stored
    if below and np.bitwise_and(raw, (1 << below) - 1).any() and not _has_overlay(dataset, allocated, below):
        raise InputError(
            f"BitsStored {stored} and HighBit {high} say that the lowest {below} bits of a pixel are unused, but they "
            "are not 0",
            where=str(where),
            hint="export the series again; its headers contradict its pixels",
        )
    return raw if stored == allocated else (raw << above) >> (allocated - stored)


def foreign_bits(raw: np.ndarray, bits: tuple[int, int, int]) -> int:
    """Counts the pixels whose bits above HighBit neither are 0 nor repeat the sign."""
    allocated, _, high = bits
    if high + 1 >= allocated:
        return 0
    rest = np.right_shift(raw.view(np.dtype(f"u{raw.dtype.itemsize}")), high + 1)
    return int(((rest != 0) & (rest != (1 << (allocated - 1 - high)) - 1)).sum())


def _has_overlay(dataset: Any, allocated: int, below: int) -> bool:
    """Says whether the header declares an overlay in one of the lowest bits of the pixels."""
    for group in range(0x6000, 0x6020, 2):
        size, position = dataset.get((group, 0x0100)), dataset.get((group, 0x0102))
        if size is None or position is None or (group, 0x3000) in dataset:
            continue  # An overlay with data of its own is not in the pixels.
        if size.value == allocated and isinstance(position.value, int) and 0 <= position.value < below:
            return True
    return False
