"""Connected pieces of a mask. Voxels that share a face, an edge or a corner belong to one piece."""

from __future__ import annotations

import importlib

import numpy as np

from mome.postprocess.base import MaskPlace, Processed, millilitres


def label_pieces(mask_IJK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Numbers the pieces of a mask from the largest to the smallest.

    Of two pieces of the same size, the one whose first voxel comes first in C order has the lower number. The package
    `connected-components-3d` labels them where it is installed, else scipy; the result is the same.

    Args:
        mask_IJK: Bool.

    Returns:
        Numbers from 1 (i, j, k), 0 outside; and the voxels of each piece, the largest first.
    """
    labels = _labelled(np.ascontiguousarray(mask_IJK))
    flat = labels.reshape(-1)
    count = int(flat.max(initial=0))
    sizes = np.bincount(flat, minlength=count + 1)[1:]
    first = np.full(count + 1, flat.size, dtype=np.int64)
    places = np.flatnonzero(flat)
    # The last assignment to a number counts, so that places run backwards.
    first[flat[places[::-1]]] = places[::-1]
    order = np.lexsort((first[1:], -sizes))
    number = np.zeros(count + 1, dtype=np.int32)
    number[order + 1] = np.arange(1, count + 1)
    return number[labels], sizes[order]


def _labelled(mask_IJK: np.ndarray) -> np.ndarray:
    """Returns the pieces of a mask with any numbers from 1."""
    try:
        cc3d = importlib.import_module("cc3d")
    except ImportError:
        from scipy import ndimage

        return ndimage.label(mask_IJK, structure=np.ones((3, 3, 3), dtype=bool))[0]
    return cc3d.connected_components(mask_IJK, connectivity=26)


def keep_pieces(numbers_IJK: np.ndarray, sizes: np.ndarray, kept: np.ndarray, place: MaskPlace) -> Processed:
    """Returns the mask of the pieces that are kept, and says how many were removed.

    Args:
        numbers_IJK: What `label_pieces` returned.
        sizes: Voxels of each piece.
        kept: Bool for each piece.
        place: Where the mask lies.
    """
    removed = int(np.count_nonzero(~kept))
    if removed == 0:
        return Processed(numbers_IJK > 0, None)
    pieces = "1 piece" if removed == 1 else f"{removed} pieces"
    volume = millilitres(int(sizes[~kept].sum()), place)
    is_kept = np.concatenate([[False], kept])
    return Processed(is_kept[numbers_IJK], f"{pieces}, {volume}, removed from")
