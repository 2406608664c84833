"""Notes on masks that fill a scan, as those of a damaged model do."""

from __future__ import annotations

import numpy as np

from mome.inference.packed import PackedMasks

# The darkest HU of the body apart from the lungs, and the share above which a mask is doubted (our choice). Both lungs
# of a scan of the chest fill less than half of it.
_BODY_HU = -300.0
_LARGEST_SHARE = 0.8
# Voxels of a scan that are compared with its masks at most.
_SAMPLE = 4_000_000
# Names of free text for the whole body.
_WHOLE_BODY = ("body", "external", "whole body", "patient", "skin", "body contour", "outer contour")


def filled_masks(masks: PackedMasks, array: np.ndarray) -> list[str]:
    """Returns a note for every mask that fills nearly the whole image or the whole body.

    Args:
        masks: The masks.
        array: (i, j, k), HU of the scan.
    """
    # Of a large scan, every few voxels are compared.
    step = max(1, round((array.size / _SAMPLE) ** (1 / 3)))
    notes = []
    body: np.ndarray | None = None
    for name in masks:
        voxels = masks.voxels[name]
        if voxels == 0 or name.replace("_", " ").strip().lower() in _WHOLE_BODY:
            continue
        share, of = voxels / array.size, "image"
        if share < _LARGEST_SHARE:
            if body is None:
                body = array[::step, ::step, ::step] > _BODY_HU
            size = int(np.count_nonzero(body))
            # A sample may hold a little less of the body than the whole.
            if size == 0 or voxels < 0.95 * _LARGEST_SHARE * size * array.size / body.size:
                continue
            share, of = int(np.count_nonzero(masks.sampled(name, step) & body)) / size, "body"
        if share >= _LARGEST_SHARE:
            notes.append(
                f"the mask of {name!r} fills {share:.0%} of the {of}: the model or the scan may be damaged, or the "
                "scan is a crop of this structure"
            )
    return notes
