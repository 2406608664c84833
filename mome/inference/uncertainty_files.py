"""Maps of probability, entropy and router disagreement as NIfTI files of bytes, whose header scales them to 0 to 1."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mome.errors import InputError
from mome.volumes.mask_file import write_mask
from mome.volumes.mask_names import mask_name, structure_parts

if TYPE_CHECKING:
    from mome.inference.result import Segmentation

SLOPE = 1 / 255
"""`scl_slope` of the files: a stored 255 is 1."""
MAP_FOLDERS = ("probabilities", "entropy", "disagreement")
"""The folders of the maps, beside the masks and their report."""


def entropy_of_bytes(probability: np.ndarray) -> np.ndarray:
    """Returns the binary entropy −p log₂ p − (1 − p) log₂(1 − p) in bits, times 255.

    It is 1 bit where a voxel may as well be inside as outside, and 0 where the network is sure.

    Args:
        probability: uint8, probability × 255.

    Returns:
        uint8 of the same shape.
    """
    p = np.arange(256) / 255
    with np.errstate(divide="ignore", invalid="ignore"):
        bits = -(p * np.log2(p) + (1 - p) * np.log2(1 - p))
    return np.rint(np.nan_to_num(bits) * 255).astype(np.uint8)[probability]


def write_maps(result: Segmentation, folder: Path, scan: str, kind: str) -> list[Path]:
    """Writes one file `<folder>/<kind>/<scan>_<structure>.nii.gz` per prompt.

    Args:
        result: A result with probabilities.
        folder: The folder of the masks.
        scan: The scan's part of file names.
        kind: `probabilities` or `entropy`.

    Raises:
        InputError: The result has no probabilities.
        OutputError: A file cannot be written.
    """
    if result.probabilities is None:
        raise InputError("this result has no probabilities", hint="segment(…, probabilities=True)")
    change: Callable[[np.ndarray], np.ndarray] = entropy_of_bytes if kind == "entropy" else np.asarray
    paths = []
    for part, name in zip(structure_parts(result.probabilities.names), result.probabilities.names, strict=True):
        path = folder / kind / mask_name(scan, part)
        values = change(result.probabilities[name])
        write_mask(path, values, result.grid, result.header, slope=SLOPE, description=f"{kind}, scaled to 0 to 1")
        paths.append(path)
    return paths


def write_disagreement(result: Segmentation, folder: Path, scan: str) -> list[Path]:
    """Writes `<folder>/disagreement/<scan>.nii.gz`.

    Raises:
        InputError: The result has no such map.
        OutputError: The file cannot be written.
    """
    if result.disagreement is None:
        raise InputError("this result has no map of disagreement", hint="segment(…, disagreement=True)")
    path = folder / "disagreement" / mask_name(scan, None)
    write_mask(
        path,
        result.disagreement,
        result.grid,
        result.header,
        slope=SLOPE,
        description="entropy of the routers over experts, scaled to 0 to 1",
    )
    return [path]
