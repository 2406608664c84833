"""Where the structures of a cached case lie: voxels to draw centres from, and blocks that say what a patch may hold.

Both are computed when the cache is built. A sampler then knows what every patch of a step shows without reading voxels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from mome.data.label_codes import mask_of
from mome.errors import InputError

# Most voxels of a structure among which a patch's centre is drawn, as in nnU-Net.
_MOST_PLACES = 10_000
BLOCK_SIDE = 8  # voxels; our choice


def places_of(labels: np.ndarray, codes: Sequence[Sequence[str]], name: str) -> np.ndarray:
    """Returns flat indices, int32, of voxels of one structure: all, or 10,000 of them that are always the same.

    Raises:
        InputError: The case has more voxels than an int32 can count.
    """
    if labels.size >= 2**31:
        raise InputError(f"a case of {labels.size:,} voxels is too large for a cache", hint="a larger spacing")
    flat = np.flatnonzero(mask_of(labels, codes, name)).astype(np.int32)
    if len(flat) > _MOST_PLACES:
        flat = np.sort(np.random.default_rng(0).choice(flat, _MOST_PLACES, replace=False))
    return flat


def blocks_of(labels: np.ndarray, codes: Sequence[Sequence[str]], names: Sequence[str]) -> np.ndarray:
    """Says which blocks of 8³ voxels hold a voxel of each structure.

    Returns:
        uint8 (structures, bytes), one bit per block, in C order.
    """
    counts = _block_counts(labels.shape)
    found = np.zeros((len(names), int(np.prod(counts))), dtype=bool)
    for row, name in enumerate(names):
        voxels = np.nonzero(mask_of(labels, codes, name))
        blocks = np.ravel_multi_index(tuple(axis // BLOCK_SIDE for axis in voxels), counts)
        found[row, blocks] = True
    return np.packbits(found, axis=1)


def block_bytes(shape: Sequence[int]) -> int:
    """Returns the bytes of a row of `blocks_of`."""
    return -(-int(np.prod(_block_counts(shape))) // 8)


def structures_in(
    blocks: np.ndarray, shape: Sequence[int], names: Sequence[str], start: Sequence[int], patch: Sequence[int]
) -> frozenset[str]:
    """Returns the structures that have a voxel in a block that the patch touches.

    A structure may lie up to 7 voxels outside of the patch.

    Args:
        blocks: What `blocks_of` returned.
        shape: Voxels (D, H, W) of the case.
        names: The structures of the rows.
        start: First voxel of the patch; it may lie outside of the case.
        patch: Voxels of the patch.
    """
    counts = _block_counts(shape)
    box = tuple(
        slice(max(first, 0) // BLOCK_SIDE, -(-min(first + side, size) // BLOCK_SIDE))
        for first, side, size in zip(start, patch, shape, strict=True)
    )
    bits = np.unpackbits(np.asarray(blocks), axis=1, count=int(np.prod(counts)))
    shown = bits.reshape(len(names), *counts)[(slice(None), *box)].any(axis=(1, 2, 3))
    return frozenset(names[row] for row in np.flatnonzero(shown).tolist())


def split_places(places: np.ndarray, counts: Mapping[str, int]) -> dict[str, np.ndarray]:
    """Returns the voxels of each structure from the array that holds them one after the other."""
    ends = np.cumsum(list(counts.values()), dtype=np.int64)
    return {name: places[end - count : end] for (name, count), end in zip(counts.items(), ends.tolist(), strict=True)}


def _block_counts(shape: Sequence[int]) -> list[int]:
    return [-(-side // BLOCK_SIDE) for side in shape]
