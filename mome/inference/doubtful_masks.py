"""Notes on masks that fill a scan, as those of a damaged model do."""

from __future__ import annotations

import numpy as np

from mome.inference.packed import PackedMasks

# The darkest HU of the body apart from the lungs, and the share above which a mask is doubted (our choice). Both lungs
# of a scan of the chest fill less than half of it.
_BODY_HU = -300.0
_LARGEST_SHARE = 0.8
# Names of free text for the whole body.
_WHOLE_BODY = ("body", "external", "whole body", "patient", "skin", "body contour", "outer contour")


def filled_masks(masks: PackedMasks, array: np.ndarray) -> list[str]:
    """Returns a note for every mask that fills nearly the whole image or the whole body.

    Args:
        masks: The masks.
        array: (i, j, k), HU of the scan.
    """
    notes = []
    body: np.ndarray | None = None
    for name in masks:
        voxels = masks.voxels[name]
        if voxels == 0 or name.replace("_", " ").strip().lower() in _WHOLE_BODY:
            continue
        share, of = voxels / array.size, "image"
        if share < _LARGEST_SHARE:
            body = array > _BODY_HU if body is None else body
            size = int(np.count_nonzero(body))
            if size == 0 or voxels < _LARGEST_SHARE * size:
                continue
            inside = body[tuple(slice(*ends) for ends in masks.box(name))]
            share, of = int(np.count_nonzero(masks.crop(name).view(bool) & inside)) / size, "body"
        if share >= _LARGEST_SHARE:
            notes.append(
                f"the mask of {name!r} fills {share:.0%} of the {of}: the model or the scan may be damaged, or the "
                "scan is a crop of this structure"
            )
    return notes
