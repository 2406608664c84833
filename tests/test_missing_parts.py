"""Parts of a body that are missing or stand twice, an order of voxels that was lost, and other scales are noted."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from small_scans import patient_affine, patient_hu

from mome.volumes import Volume, checked_volume


def changed(where: tuple, value: float | np.ndarray) -> np.ndarray:
    hu = patient_hu().astype(np.float32)
    hu[where] = value
    return hu


ALL = slice(None)
HU = patient_hu().astype(np.float32)
AIR = np.random.default_rng(0).normal(-1000, 15, HU.shape).astype(np.float32)
CASES: dict[str, tuple[Callable[[], np.ndarray], str]] = {
    "half of it air": (lambda: changed((slice(0, 12),), -1000), "planes 12 and 13 of axis i"),
    "half of it noisy air": (lambda: changed((ALL, slice(11, None)), AIR[:, 11:]), "planes 11 and 12 of axis j"),
    "upper half air": (lambda: changed((ALL, ALL, slice(10, None)), -1000), "planes 10 and 11 of axis k"),
    "rows of 0": (lambda: changed((ALL, slice(11, None), 10), 0), "plane 11, one value stands"),
    "rows of padding": (lambda: changed((slice(12, None), ALL, 10), -1024), "plane 11, one value stands"),
    "a block twice": (lambda: changed((ALL, ALL, slice(14, 20)), HU[:, :, 2:8]), "6 planes of axis k stand twice"),
    "a block across": (lambda: changed((ALL, slice(11, 15)), HU[:, 5:9]), "4 planes of axis j stand twice"),
    "Fortran read as C": (lambda: HU.ravel(order="F").reshape(HU.shape), "C and Fortran order"),
    "C read as Fortran": (lambda: HU.ravel().reshape(HU.shape[::-1]).transpose(2, 1, 0), "C and Fortran order"),
    "tenth": (lambda: HU / 10, "HU × 0.1"),
    "attenuation per mm": (lambda: 195 * (1 + HU / 1000), "attenuation × 10,000 per mm"),
    "attenuation per cm": (lambda: 1950 * (1 + HU / 1000), "attenuation × 10,000 per cm"),
    "z-scores": (lambda: (HU - HU.mean()) / HU.std() * 100, "z-scores × 100"),
}


@pytest.mark.parametrize("name", CASES)
def test_the_fault_is_noted_once(name: str) -> None:
    make, words = CASES[name]
    notes = checked_volume(Volume(make(), patient_affine())).notes
    assert sum(words in note for note in notes) == 1, notes
    assert len(notes) == 1, notes


def test_wrapped_padding_is_no_offset() -> None:
    stored = HU + 1024
    stored[:2] = 65_536 - 976
    notes = checked_volume(Volume(stored, patient_affine()), any_values=True).notes
    assert any("unsigned 16-bit" in note for note in notes) and not any("offset of 1024" in note for note in notes)
