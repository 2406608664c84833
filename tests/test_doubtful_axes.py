"""Axes in another order and air at another place are noted; right scans and crops of them are not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from mome.errors import InputError
from mome.volumes import Volume, checked_volume, read_volume
from mome.volumes.doubtful_air import doubtful_air
from mome.volumes.doubtful_axes import doubtful_axes
from mome.volumes.orientation import closest_axes

SIZES, AXES, AIR = "are the sizes in another order", "with an affine of (x, y, z)", "air lies near"
AFFINE = np.diag([4.0, 4.0, 2.5, 1.0])


def head_and_shoulders() -> np.ndarray:
    """HU (72, 56, 64): alike to the left and right, narrow at the top, wide at the bottom, in air."""
    rng = np.random.default_rng(0)
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, n) for n in (72, 56, 64)), indexing="ij")
    width = np.interp(z, (-1, -0.4, -0.1, 0.1, 0.6, 0.9), (0.85, 0.8, 0.35, 0.4, 0.5, 0.1))
    depth = np.interp(z, (-1, -0.1, 0.6, 0.9), (0.5, 0.35, 0.6, 0.1))
    inside = (x / width) ** 2 + ((y - 0.1) / depth) ** 2 < 1
    bone = ((x / width) ** 2 + (y / depth) ** 2 > 0.7) & (z > 0.1) | (x**2 + (y + 0.15) ** 2 < 0.006)
    windpipe = (x**2 + (y - 0.2) ** 2 < 0.01) & (z < 0.1)
    hu = np.where(inside, np.where(bone, 700.0, 40.0), -1000.0)
    hu[inside & windpipe] = -1000
    return (hu + rng.normal(0, 12, hu.shape)).clip(-1024, 3071).astype(np.float32)


BODY = head_and_shoulders()


def other_sizes(array: np.ndarray, order: tuple[int, int, int]) -> np.ndarray:
    """The same bytes under a header whose sizes stand in another order."""
    return array.reshape(-1, order="F").reshape([array.shape[axis] for axis in order], order="F")


def zyx(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array.transpose(2, 1, 0))


def notes(array: np.ndarray, affine: np.ndarray = AFFINE) -> tuple[str, ...]:
    return checked_volume(Volume(array, affine)).notes


def test_a_right_scan_has_no_note() -> None:
    assert notes(BODY) == ()
    for flipped in (BODY[::-1], BODY[:, :, ::-1]):  # test_doubtful_front.py has front and back
        assert notes(np.ascontiguousarray(flipped)) == ()
    stored = np.ascontiguousarray(BODY.transpose(2, 0, 1))  # (z, x, y) with the affine that says so
    assert notes(stored, AFFINE[:, [2, 0, 1, 3]]) == ()
    for crop in (BODY[:36], BODY[36:], BODY[:, 28:], BODY[:, :, :32], BODY[20:52, 10:45, :45]):
        assert doubtful_axes(crop, AFFINE) == doubtful_air(crop) == []


@pytest.mark.parametrize("order", [(1, 0, 2), (0, 2, 1), (2, 1, 0), (1, 2, 0), (2, 0, 1)])
def test_sizes_in_another_order_are_noted(order: tuple[int, int, int]) -> None:
    (note,) = doubtful_axes(other_sizes(BODY, order), AFFINE)
    assert SIZES in note and "better as 72 × 56 × 64 than as" in note
    found = notes(other_sizes(BODY, order))
    assert any(SIZES in note or "in another order than the header says" in note for note in found), found


def test_an_array_of_zyx_is_noted() -> None:
    assert any(AXES in note for note in notes(zyx(BODY)))
    assert any(AXES in note for note in notes(np.ascontiguousarray(zyx(BODY)[::-1, ::-1])))
    raw = np.zeros((256, 256, 40), np.float32)
    raw[:] = np.random.default_rng(0).normal(0, 50, raw.shape).cumsum(axis=0)  # no body, the matrix alone
    thin = np.diag([0.7, 0.7, 3.0, 1.0])
    assert doubtful_axes(raw, thin) == [] and AXES in doubtful_axes(zyx(raw), thin)[0]
    assert doubtful_axes(zyx(raw), np.diag([1.0, 1.0, 1.1, 1.0])) == []


@pytest.mark.parametrize("change", ["+100", "*1.1", "*0.9", "-100"])
def test_air_at_another_place_is_noted(change: str) -> None:
    sign, number = change[0], float(change[1:])
    array = BODY * np.float32(number) if sign == "*" else BODY + np.float32(float(change))
    assert any(AIR in note or "air is −1000 HU" in note for note in notes(array)), notes(array)


def test_small_arrays_are_not_judged() -> None:
    small = BODY[:20, :20, :20] + 100
    assert doubtful_air(small) == [] == doubtful_axes(other_sizes(BODY[:20, :19, :20], (1, 0, 2)), AFFINE)


def real_scans(root: Path) -> Iterator[tuple[str, Volume]]:
    """Every real CT, with its axes in the order (x, y, z)."""
    endings = (".nii.gz", ".nii", ".nrrd", ".mha")
    for path in sorted(path for path in root.rglob("*") if path.name.endswith(endings)):
        try:
            volume = read_volume(path, any_values=True)
        except InputError:
            continue
        array = volume.array
        if array.size < 20_000 or np.unique(array[::3, ::3, ::3]).size < 150:  # a label map
            continue
        world = [axis for axis, _ in closest_axes(volume.affine)]
        order = [world.index(axis) for axis in range(3)]
        affine = volume.affine[:, [*order, 3]]
        yield str(path.relative_to(root)), Volume(np.ascontiguousarray(array.transpose(order)), affine)


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_real_scans_have_no_note_and_made_faults_have_one(ct_data: Path) -> None:
    found: dict[str, list[bool]] = {}
    wrong = []
    for name, volume in real_scans(ct_data):
        array, affine = volume.array, volume.affine
        swapped = other_sizes(array, (1, 0, 2))
        faults = {
            "first two sizes exchanged": doubtful_axes(swapped, affine) if array.shape[0] != array.shape[1] else None,
            "array (z, y, x)": doubtful_axes(zyx(array), affine),
            "HU + 100": doubtful_air(array + 100),
            "HU × 1.1": doubtful_air(array * np.float32(1.1)),
        }
        for fault, given in faults.items():
            if given is not None:
                found.setdefault(fault, []).append(bool(given))
        wrong += [(name, note) for note in (*doubtful_axes(array, affine), *doubtful_air(array))]
    print(f"false notes: {len(wrong)} of {len(found['HU + 100'])} scans")
    print({fault: f"{sum(given)} of {len(given)}" for fault, given in found.items()})
    assert not wrong
    assert all(np.mean(given) >= 0.8 for given in found.values())
