"""Fuzzing of the readers of scans: a damaged file gives an InputError or a Volume, in bounded time and memory.

The long run is `pytest -m long tests/test_fuzz_scans.py`.
"""

from __future__ import annotations

import os
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from scan_mutations import damaged_scan
from small_scans import patient_hu

from mome.errors import InputError
from mome.volumes import read_label_map, read_label_table, read_volume
from mome.volumes.data_files import identity
from mome.volumes.scan_files import is_nifti

SECONDS, MEGABYTES = 5.0, 120.0


def outcome(path: Path) -> str:
    """Reads a file in every way; returns "read" or "refused".

    Raises:
        AssertionError: An error is not for people, or the volume breaks its promises.
    """
    found = "read"
    for read in (read_volume, read_label_map, *([read_label_table] if is_nifti(path) else [])):
        try:
            volume = read(path)
        except InputError as error:
            found = "refused" if read is read_volume else found
            text = str(error)
            assert len(text.splitlines()) <= 3 and len(text) < 1_500, text
            continue
        if read is not read_label_table:
            assert volume.array.ndim == 3 and np.isfinite(volume.array).all()
            assert np.isfinite(volume.affine).all() and abs(np.linalg.det(volume.affine)) > 0
    identity(path)
    return found


def fuzz(folder: Path, seeds: range) -> dict[str, int]:
    """Reads the damaged scans of all seeds, and counts the outcomes."""
    outside = folder.parent / "outside.raw"
    outside.write_bytes(b"secret" * 4_000)
    (folder / "ct.raw").write_bytes(patient_hu().tobytes(order="F"))
    counts = {"read": 0, "refused": 0}
    tracemalloc.start()
    try:
        for seed in seeds:
            name, data = damaged_scan(seed)
            path = folder / name
            path.write_bytes(data)
            before = set(os.listdir(folder))
            tracemalloc.reset_peak()
            began = time.perf_counter()
            try:
                counts[outcome(path)] += 1
            except Exception as error:
                raise AssertionError(f"seed {seed}, {name}: {type(error).__name__}: {error}") from error
            peak = tracemalloc.get_traced_memory()[1] / 1e6
            assert time.perf_counter() - began < SECONDS, f"seed {seed} took too long"
            assert peak < MEGABYTES, f"seed {seed} used {peak:.0f} MB"
            assert set(os.listdir(folder)) == before, f"seed {seed} wrote a file"
            path.unlink()
    finally:
        tracemalloc.stop()
    return counts


@pytest.mark.filterwarnings("error")
def test_damaged_scans_are_read_or_refused(tmp_path: Path) -> None:
    folder = tmp_path / "scans"
    folder.mkdir()
    counts = fuzz(folder, range(150))
    assert min(counts.values()) > 10, counts  # the damage is neither always fatal nor always harmless


@pytest.mark.long
@pytest.mark.filterwarnings("error")
@pytest.mark.timeout(3600)
def test_ten_thousand_damaged_scans(tmp_path: Path) -> None:
    folder = tmp_path / "scans"
    folder.mkdir()
    counts = fuzz(folder, range(1_000, 11_000))
    print(f"10,000 damaged scans: {counts}")
    assert sum(counts.values()) == 10_000
