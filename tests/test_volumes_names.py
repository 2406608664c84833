"""Names of files and directions: scans by their endings, masks by their names, orientations by their letters."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mome.errors import InputError
from mome.labels import load_table
from mome.volumes.mask_names import file_part, mask_name, mask_paths, split_mask_name
from mome.volumes.orientation import closest_axes, left_right_axis, orientation_letters, parse_orientation
from mome.volumes.scan_files import is_nifti, scan_ending, stem

STRUCTURES = load_table().names()


@pytest.mark.parametrize(
    ("name", "ending", "base"),
    [
        ("a.b/ct.nii.gz", ".nii.gz", "ct"),
        ("CT.NII", ".nii", "CT"),
        ("x.1.nrrd", ".nrrd", "x.1"),
        ("x.nhdr", ".nhdr", "x"),
        ("x.mha", ".mha", "x"),
        ("x.MHD", ".mhd", "x"),
        ("x.nii.gz.txt", None, "x.nii.gz"),
        ("slice.dcm", None, "slice"),
        ("folder", None, "folder"),
    ],
)
def test_endings_of_scans(name: str, ending: str | None, base: str) -> None:
    assert (scan_ending(name), stem(Path(name))) == (ending, base)
    assert is_nifti(name) == (ending in (".nii", ".nii.gz"))


def test_an_orientation_is_read_in_one_place() -> None:
    assert parse_orientation("RAS") == ((0, 1), (1, 1), (2, 1)) and parse_orientation("lpi")[0] == (0, -1)
    assert [left_right_axis(text) for text in ("RAS", "SAL", "prs")] == [0, 2, 1]
    assert orientation_letters(parse_orientation("ilp")) == "ILP"
    affine = np.array([[0, 0, -2, 60], [2.5, 0, 0, 0], [0, -2, 0, 44], [0, 0, 0, 1.0]])
    assert orientation_letters(closest_axes(affine)) == "AIL"
    for bad in ("RA", "RAR", "RAX", "RASR", "", 3, None):
        with pytest.raises(InputError, match="three letters for three directions, one of R/L, A/P and S/I each"):
            parse_orientation(bad)
        with pytest.raises(InputError, match="RAS"):
            left_right_axis(bad)


scans = st.text("ab_l", min_size=1, max_size=6).filter(lambda text: text.strip("_") == text)


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(scans, st.sampled_from(STRUCTURES))
def test_a_mask_name_is_read_as_it_was_written(scan: str, structure: str) -> None:
    (path,) = mask_paths("folder", scan, [structure])
    assert path == Path("folder") / mask_name(scan, structure)
    assert split_mask_name(stem(path), STRUCTURES, [scan]) == (scan, structure)
    assert split_mask_name(stem(path), STRUCTURES) == (scan, structure)
    (path,) = mask_paths("folder", scan, [structure], ending=".dcm", separate=False)
    assert path.name == f"{scan}.dcm" and split_mask_name(scan, STRUCTURES, [scan]) == (scan, None)


def test_mask_names_of_free_text_need_the_scans_name() -> None:
    assert mask_paths("o", "ct", ["odd lesion"])[0].name == "ct_odd_lesion.nii.gz"
    assert split_mask_name("ct_odd_lesion", STRUCTURES, ["ct"]) == ("ct", "odd_lesion")
    assert split_mask_name("ct_odd_lesion", STRUCTURES) == ("ct_odd_lesion", None)
    assert split_mask_name("a_kidney_cyst_left", STRUCTURES) == ("a", "kidney_cyst_left")
    assert file_part(" left  kidney ") == "left__kidney"


def test_names_and_directions_need_no_torch() -> None:
    code = (
        "import sys, mome.volumes, mome.volumes.scan_files, mome.volumes.mask_names, mome.volumes.orientation; "
        "from mome.volumes.writers import WRITERS; "
        "print(WRITERS.names(), 'resample' in dir(mome.volumes), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['dicom_seg', 'nifti', 'rtstruct'] True False"
