"""Finds masks that lie in air although their structure holds none: contours of another scan, or moved ones."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase

import numpy as np

from mome.labels import load_table

# Organs that hold air. All others of the class table hold none, and lie in no lung.
_HOLD_AIR = (
    "lung_*",
    "trachea",
    "larynx",
    "esophagus",
    "stomach",
    "duodenum",
    "small_bowel",
    "colon*",
    "rectum",
    "skull",
)
_AIR_HU = -300.0
# Of a brainstem, parotid gland or mandible of OpenKBP at most 3 % lies in air, and of misplaced ones 27 % and more; a
# spinal cord of which 19 % does lies in a part of the scan that is blank. Our choice.
_MOST = 0.1
_FEWEST_VOXELS = 20


def masks_in_air(hu: np.ndarray, masks: Mapping[str, np.ndarray]) -> list[str]:
    """Returns a sentence for every structure of which a tenth or more lies in air, below −300 HU.

    Structures outside of the class table, and those of fewer than 20 voxels, are not judged.

    Args:
        hu: The scan (i, j, k) in HU.
        masks: Structure → bool (i, j, k).
    """
    table, sentences = load_table(), []
    for name, mask in masks.items():
        if name not in table or any(fnmatchcase(name, pattern) for pattern in _HOLD_AIR):
            continue
        values = hu[mask]
        share = float((values < _AIR_HU).mean()) if values.size >= _FEWEST_VOXELS else 0.0
        if share >= _MOST:
            sentences.append(f"{share:.0%} of the mask of {name} lies in air: are these the labels of this scan?")
    return sentences
