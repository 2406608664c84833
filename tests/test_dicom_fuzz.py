"""Fuzzing of the DICOM reader: a damaged series gives an InputError, or a volume that lies where its headers say.

The long run is `pytest -m long tests/test_dicom_fuzz.py`.
"""

from __future__ import annotations

import shutil
import time
import tracemalloc
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pydicom
import pytest
from dicom_mutations import write_damaged_series
from pydicom.errors import InvalidDicomError

from mome.errors import InputError
from mome.volumes import Volume, read_volume
from mome.volumes.dicom import DicomOptions

SECONDS, MEGABYTES, MILLIMETRES = 5.0, 120.0, 0.1  # seconds of this process, which other ones do not slow down


def stated_places(path: Path) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yields position, orientation and pixel spacing of every image of a file that gives all three as plain numbers."""
    try:
        dataset = pydicom.dcmread(path, stop_before_pixels=True)
        shared = (dataset.get("SharedFunctionalGroupsSequence") or [{}])[0]
        for frame in dataset.get("PerFrameFunctionalGroupsSequence") or [None]:
            owners = [dataset] * 3
            if frame is not None:
                names = ("PlanePositionSequence", "PlaneOrientationSequence", "PixelMeasuresSequence")
                owners = [(frame.get(name) or shared.get(name))[0] for name in names]
            keywords = ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing")
            values = [np.array(o[k].value, dtype=float) for o, k in zip(owners, keywords, strict=True)]
            if [value.shape for value in values] == [(3,), (6,), (2,)]:
                yield values[0], values[1], values[2]
    except (InvalidDicomError, KeyError, ValueError, TypeError, AttributeError, NotImplementedError, EOFError, OSError):
        return


def check_places(volume: Volume, folder: Path) -> None:
    """Checks that every slice that is not said to be left out has its corners at the places that its header states."""
    columns, rows, planes = volume.shape
    to_voxel = np.linalg.inv(volume.affine)
    said = "\n".join(volume.notes)
    some_left_out = "another size or orientation left out" in said or "localizer" in said
    for path in sorted(folder.iterdir()):
        if path.name in said:
            continue
        for position, orientation, spacing in stated_places(path):
            row, column = orientation.reshape(2, 3)
            worst = 0.0
            for i in (0, columns - 1):
                for j in (0, rows - 1):
                    corner = (position + i * spacing[1] * row + j * spacing[0] * column) * (-1, -1, 1)
                    plane = np.clip((to_voxel @ [*corner, 1])[2], 0, planes - 1)
                    worst = max(worst, float(np.linalg.norm((volume.affine @ [i, j, plane, 1])[:3] - corner)))
            assert worst < MILLIMETRES or some_left_out, f"{path.name} lies {worst:.3g} mm off, notes: {said}"


def fuzz(folder: Path, seeds: range, measured: int = 1) -> dict[str, int]:
    """Reads the damaged series of all seeds, and counts the outcomes.

    Args:
        folder: A folder for the series.
        seeds: One for each series.
        measured: Memory is measured, which takes twice the time, for one of so many seeds.
    """
    counts = {"read": 0, "refused": 0}
    try:
        for seed in seeds:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            damage = f"seed {seed}, {write_damaged_series(seed, folder)}"
            options = DicomOptions(allow_damaged=seed % 3 == 0, allow_gaps=seed % 5 == 0)
            if seed % measured == 0:
                tracemalloc.start()
            began = time.process_time()
            volume = None
            try:
                volume = read_volume(folder, dicom=options, frame=None if seed % 2 else 0)
            except InputError as error:
                text = str(error)
                assert len(text.splitlines()) <= 3 and len(text) < 1_500, f"{damage}: {text}"
                assert "Doe" not in text and "44871" not in text and "\x1b" not in text, f"{damage}: {text}"
            except Exception as error:
                raise AssertionError(f"{damage}: {type(error).__name__}: {error}") from error
            seconds, peak = time.process_time() - began, tracemalloc.get_traced_memory()[1] / 1e6
            tracemalloc.stop()
            assert seconds < SECONDS, f"{damage} took {seconds:.1f} s"
            assert peak < MEGABYTES, f"{damage} used {peak:.0f} MB"
            counts["refused" if volume is None else "read"] += 1
            if volume is not None:
                assert np.isfinite(volume.array).all(), damage
                try:
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore")
                        check_places(volume, folder)
                except AssertionError as error:
                    raise AssertionError(f"{damage}: {error}") from error
    finally:
        tracemalloc.stop()
    return counts


@pytest.mark.filterwarnings("error")
def test_damaged_series_are_refused_or_lie_right(tmp_path: Path) -> None:
    counts = fuzz(tmp_path / "series", range(30, 80), measured=4)
    assert fuzz(tmp_path / "series", range(2_091, 2_092))["refused"] == 1  # pixels of 1e-300 mm
    assert min(counts.values()) > 8, counts  # the damage is neither always fatal nor always harmless


@pytest.mark.long
@pytest.mark.filterwarnings("error")
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("first", [1_000, 1_500, 2_000])
def test_five_hundred_damaged_series(tmp_path: Path, first: int) -> None:
    counts = fuzz(tmp_path / "series", range(first, first + 500))
    print(f"500 damaged series from seed {first}: {counts}")
    assert sum(counts.values()) == 500
