"""Synthetic CT: a pure function of a seed and an anatomy."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from mome.data.synthetic.anatomy import Anatomy
from mome.data.synthetic.body import OUTSIDE_MM
from mome.data.synthetic.elastic import deformation, warp
from mome.data.synthetic.paint import paint, recolour
from mome.data.synthetic.scanner import scan
from mome.data.synthetic.tissues import draw_palette

SYNTHETIC_VERSION = 1  # part of the hash of training caches

_MARGIN_MM = 30.0  # of air around the anatomy
_LONGEST_MM = 380.0  # of a scan along the axis
_RANDOMISED = 0.2  # share of painted images with domain randomisation


@dataclass(frozen=True)
class SyntheticCT:
    """A synthetic scan.

    Attributes:
        array: float32 (i, j, k), HU.
        affine: (4, 4), voxels to mm, RAS.
        masks: Structure → mask (i, j, k), for every structure that the anatomy annotates; it may be empty.
        kind: How the HU were made: "painted", or "recoloured" from the anatomy's own CT.
    """

    array: np.ndarray
    affine: np.ndarray
    masks: dict[str, np.ndarray]
    kind: str


def synthetic_ct(
    anatomy: Anatomy, seed: int, *, names: Collection[str] | None = None, real: float = 0.5, strength: float = 1.0
) -> SyntheticCT:
    """Makes one scan of a deformed anatomy.

    Args:
        anatomy: See `load_anatomy`.
        seed: Decides everything that is random.
        names: Structures whose masks are returned, and which grow and shrink; None takes all that are annotated.
        real: Probability that the HU come from the anatomy's own CT, recoloured, where it has one.
        strength: Strength of the deformation; 0 only crops.
    """
    rng = np.random.default_rng([seed, 20260])
    members = {name: ids for name, ids in anatomy.members.items() if names is None or name in names}
    shape, spacing = anatomy.ids.shape, anatomy.spacing
    wanted = min(shape[2] * spacing, rng.uniform(150, _LONGEST_MM))
    length = max(int(wanted / spacing), 8)
    # Labels end at the first and last planes of an anatomy; the middle of the scan stays inside.
    low, high = length / 2, shape[2] - length / 2
    middle = rng.uniform(low, high) if high > low else shape[2] / 2
    margin = 2 * int(_MARGIN_MM / spacing)
    target = (shape[0] + margin, shape[1] + margin, length)
    centre = ((shape[0] - 1) / 2, (shape[1] - 1) / 2, middle)
    place = deformation(rng, target, spacing, centre, _organs(anatomy, members, rng), strength)
    # Beyond its ends the anatomy is continued by its last planes, where the deformation reaches out.
    place[..., 2].clamp_(0, shape[2] - 1)
    ids = warp(anatomy.ids, place, "nearest", 0.0).astype(np.uint8)
    distance = warp(anatomy.distance, place, "bilinear", OUTSIDE_MM)
    is_real = anatomy.hu is not None and rng.random() < real
    palette = draw_palette(rng, randomised=not is_real and rng.random() < _RANDOMISED)
    if anatomy.hu is not None and is_real:
        hu = recolour(rng, warp(anatomy.hu, place, "bilinear", -1000.0), ids, palette)
        body = ids > 0
        if rng.random() < 0.7:
            hu = scan(rng, hu, body, spacing)
    else:
        hu, body = paint(rng, ids, distance, palette, spacing)
        hu = scan(rng, hu, body, spacing)
    affine = np.diag([spacing, spacing, spacing, 1.0])
    masks = {name: np.isin(ids, numbers) for name, numbers in members.items()}
    return SyntheticCT(hu, affine, masks, "recoloured" if is_real else "painted")


def _organs(
    anatomy: Anatomy, members: dict[str, tuple[int, ...]], rng: np.random.Generator
) -> list[tuple[tuple[float, ...], float]]:
    """Returns centre (voxels) and radius (mm) of up to six structures that have voxels."""
    small = anatomy.ids[::2, ::2, ::2]
    counts = np.bincount(small.ravel(), minlength=256)
    present = [name for name, ids in members.items() if counts[list(ids)].sum() > 30]
    chosen = rng.permutation(len(present))[:6]
    found = []
    for index in chosen:
        mask = np.isin(small, members[present[index]])
        centre = tuple(2 * float(c) for c in ndimage.center_of_mass(mask))
        volume = np.count_nonzero(mask) * (2 * anatomy.spacing) ** 3
        found.append((centre, float((volume * 3 / (4 * np.pi)) ** (1 / 3))))
    return found
