"""Tells the two sides of a paired structure apart in label maps that give both the same number."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from mome.errors import InputError

# The smaller of the two sides has at least this share of the larger one's voxels. Our choice: a kidney with a large
# tumour is several times the other one.
_LEAST_SHARE = 0.05


def split_sides(mask: np.ndarray, affine: np.ndarray) -> dict[str, np.ndarray]:
    """Splits a mask of both sides into `left` and `right`.

    The two largest connected pieces (26 neighbours) are the sides; the one further to the patient's right is `right`.
    Every other piece goes to the side of the plane halfway between their centres on which its own centre lies.

    Args:
        mask: Bool (i, j, k).
        affine: (4, 4), voxel centres to RAS mm.

    Returns:
        `left` and `right`, bool (i, j, k); both are empty where the mask is.

    Raises:
        InputError: The sides cannot be told apart: there is one piece only, the second piece is small, or the two lie
            above or behind each other rather than side by side.
    """
    mask = np.asarray(mask, dtype=bool)
    if not mask.any():
        return {"left": mask, "right": mask.copy()}
    pieces, count = ndimage.label(mask, structure=np.ones((3, 3, 3)))
    sizes = np.bincount(pieces.ravel(), minlength=count + 1)
    sizes[0] = 0
    order = np.argsort(-sizes, kind="stable")
    if count < 2 or sizes[order[1]] < _LEAST_SHARE * sizes[order[0]]:
        raise InputError(
            "left and right cannot be told apart: the structure is one connected piece",
            hint="split it by hand, or leave the structure out of this case's annotated ones",
        )
    centres = np.array(ndimage.center_of_mass(mask, pieces, np.arange(1, count + 1)))
    world = centres @ affine[:3, :3].T + affine[:3, 3]
    first, second = world[order[0] - 1], world[order[1] - 1]
    apart = np.abs(first - second)
    if apart[0] < 0.5 * np.linalg.norm(apart):
        raise InputError(
            "left and right cannot be told apart: the two largest pieces do not lie side by side",
            hint="split it by hand, or leave the structure out of this case's annotated ones",
        )
    middle = (first[0] + second[0]) / 2
    is_right = np.concatenate([[False], world[:, 0] > middle])
    # A piece that crosses the middle by a third of its voxels is both sides grown together.
    for piece in order[:2]:
        inside = np.nonzero(pieces == piece)
        across = affine[0, :3] @ np.array(inside) + affine[0, 3] > middle
        share = across.mean() if not is_right[piece] else 1 - across.mean()
        if share > 1 / 3:
            raise InputError(
                "left and right cannot be told apart: one piece reaches across the middle",
                hint="split it by hand, or leave the structure out of this case's annotated ones",
            )
    right = is_right[pieces]
    return {"left": mask & ~right, "right": mask & right}
