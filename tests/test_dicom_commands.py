"""`mome segment` and `mome info` with DICOM folders: names of masks, options, notes, and no patient's data."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from dicom_series import AXIAL, SAGITTAL, along_z, dataset, largest_error, series, tilted, write
from stand_in_models import Threshold

from mome.cli.main import main
from mome.errors import InputError
from mome.inference import Segmenter, segment_folder
from mome.inference.scans import find_scans
from mome.processing import MoMEProcessor
from mome.volumes.dicom import DicomOptions
from mome.volumes.scan_files import stem

POSITIONS = along_z(np.arange(8) * 3.0)


def segmenter() -> Segmenter:
    return Segmenter(Threshold(0.5), MoMEProcessor(spacing=[2, 2, 2], hu_window=[0, 480]))


@pytest.mark.parametrize(
    ("positions", "orientation"),
    [
        (POSITIONS, AXIAL),
        (POSITIONS[::-1], AXIAL),
        (POSITIONS, tilted(15)),
        (np.delete(POSITIONS, 3, axis=0), tilted(-15)),
        (np.array([[20.0 + 3 * k, -11.5, 40] for k in range(8)]), SAGITTAL),
    ],
    ids=["plain", "reversed", "tilted", "tilted and a slice missing", "sagittal"],
)
def test_masks_lie_right_in_the_world(tmp_path: Path, positions: np.ndarray, orientation: tuple[float, ...]) -> None:
    folder = write(tmp_path / "scan", series(positions, orientation))
    (entry,) = segment_folder(segmenter(), [folder], tmp_path / "out", ["liver"])
    assert entry["status"] == "done", entry
    mask = nib.load(tmp_path / "out" / "scan_liver.nii.gz")
    assert largest_error(mask.affine, positions, orientation) < 0.1
    reported = json.loads((tmp_path / "out" / "report.json").read_text())["studies"][0]["notes"]
    assert any("tilted" in note for note in reported) == (orientation[:3] == (1, 0, 0) and orientation[4] != 1)
    # the mask of a threshold is the half of the world where the written HU are above it
    at = np.stack(np.meshgrid(*map(np.arange, mask.shape), indexing="ij"), -1) @ mask.affine[:3, :3].T
    hu = ((at + mask.affine[:3, 3]) * (-1, -1, 1)) @ (4.0, -3.0, 5.0) + 40
    inside, expected = np.asarray(mask.dataobj) > 0, hu > 240
    assert np.mean(inside == expected) > 0.97 and 0.02 < expected.mean() < 0.98


def test_a_folders_name_is_its_whole_name(tmp_path: Path, monkeypatch) -> None:
    names = ["1.3.6.1.4.1.14519.5.2.1.6279.1791", "1.3.6.1.4.1.14519.5.2.1.6279.2222"]
    for name in names:
        folder = write(tmp_path / name, series(POSITIONS))
        segment_folder(segmenter(), [folder], tmp_path / "out", ["liver"])
    written = sorted(path.name for path in (tmp_path / "out").glob("*.nii.gz"))
    assert written == [f"{name}_liver.nii.gz" for name in names]
    assert stem(tmp_path / names[0]) == names[0] and stem(f"{tmp_path}/{names[0]}/") == names[0]
    monkeypatch.chdir(tmp_path / names[0])
    assert stem(".") == stem("") == names[0] and stem("..") == tmp_path.name
    (entry,) = segment_folder(segmenter(), ["."], tmp_path / "here", ["liver"])
    assert entry["masks"] == [f"{names[0]}_liver.nii.gz"] and entry["name"] == names[0]


def test_folders_of_slices_are_one_scan(tmp_path: Path) -> None:
    for ending in (".dcm", ".DCM", ".IMA", "", ".123"):
        folder = write(tmp_path / f"a{ending}", series(POSITIONS), ending)
        assert find_scans([folder]) == [folder]
    segment_folder(segmenter(), [folder], folder, ["liver"])  # masks beside the slices
    assert find_scans([folder]) == [folder]
    (entry,) = segment_folder(segmenter(), [folder], folder, ["liver"])
    assert entry["status"] == "done"


def test_options_reach_the_reader(tmp_path: Path) -> None:
    folder = write(tmp_path / "s", series(along_z(np.delete(np.arange(20) * 3.0, range(5, 12)))))
    with pytest.raises(InputError, match="--allow-gaps"):
        segmenter().segment(folder, ["liver"])
    result = segmenter().segment(folder, ["liver"], dicom=DicomOptions(allow_gaps=True))
    assert any("is air in gaps" in note for note in result.notes)
    (entry,) = segment_folder(segmenter(), [folder], tmp_path / "o", ["liver"], dicom=DicomOptions(allow_gaps=True))
    assert entry["status"] == "done" and any("is air in gaps" in note for note in entry["notes"])


def test_the_command_passes_options(tmp_path: Path, monkeypatch) -> None:
    folder = write(tmp_path / "s", series(POSITIONS))
    given: dict[str, object] = {}
    monkeypatch.setattr("mome.inference.segment_folder", lambda *a, **options: given.update(options) or [])
    options = ["--series", "2", "--allow-gaps", "--allow-damaged"]
    assert main(["segment", str(folder), "-p", "mandible", "-o", str(tmp_path / "o"), *options]) == 0
    assert given["dicom"] == DicomOptions(series="2", allow_gaps=True, allow_damaged=True)


def test_errors_take_three_lines_and_code_2(capsys, tmp_path: Path) -> None:
    gaps = write(tmp_path / "gaps", series(along_z(np.delete(np.arange(20) * 3.0, range(5, 12)))))
    empty = write(tmp_path / "empty", series(POSITIONS))
    (empty / "004.dcm").write_bytes(b"")
    for folder, words in ((gaps, "--allow-gaps"), (empty, "004.dcm (0 bytes)")):
        assert main(["info", str(folder)]) == 0
        assert main(["demo", str(folder), "-o", str(tmp_path / "o")]) == 2
        printed = capsys.readouterr().err.strip()
        assert words in printed and len(printed.splitlines()) <= 3


def test_folders_of_series_are_named(tmp_path: Path) -> None:
    for name in "ab":
        write(tmp_path / "study" / name, series(POSITIONS))
    with pytest.raises(InputError, match=r"no scans\n.*\n.*DICOM series are in its folders.*study/\*"):
        find_scans([tmp_path / "study"])


def test_info_lists_series(capsys, tmp_path: Path) -> None:
    write(tmp_path, series(POSITIONS, tilted(10), SeriesInstanceUID="1.2.1", SeriesNumber=1))
    gap = np.delete(POSITIONS, 3, axis=0)
    write(tmp_path, series(gap, SeriesInstanceUID="1.2.2", SeriesNumber=2, SeriesDescription="Doe, Jane: lungs"))
    mr = {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.4", "Modality": "MR"}
    write(tmp_path, [dataset(POSITIONS[0], SeriesInstanceUID="1.2.5", SeriesNumber=5, **mr)])
    (tmp_path / "empty.dcm").write_bytes(b"")
    assert main(["info", str(tmp_path), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    first, second, third = facts["series"]
    assert first["number"] == 1 and first["kind"] == "CT" and first["images"] == 8 and first["size"] == [10, 12]
    np.testing.assert_allclose(first["spacing (mm)"], [1.5, 2.0, 3.0], atol=1e-3)
    assert first["description"] == "Thorax 2.0" and "tilted by 10.0°" in first["notes"][0]
    assert "description" not in second and "varies from 3 to 6 mm" in second["notes"][0]
    assert third == {"number": 3, "kind": "MR", "images": 1, "description": "Thorax 2.0"}
    assert facts["damaged"] == ["empty.dcm: 0 bytes"]
    assert main(["info", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "series 1  CT, 8 images of 10 × 12, 1.5 × 2 × 3 mm, Thorax 2.0" in printed and "empty.dcm" in printed
    assert not any(text in printed + json.dumps(facts) for text in ("Doe", "Jane", "44871", "1961"))


@pytest.mark.filterwarnings("ignore:Invalid value")
def test_nothing_that_identifies_a_patient_is_written(tmp_path: Path, capfd, caplog) -> None:
    folder = write(tmp_path / "scan", series(POSITIONS, StudyDate="20240229", InstitutionName="St. Elsewhere"))
    write(
        folder, [dataset(POSITIONS[0], SeriesInstanceUID="1.2.9", PatientAge="not an age", PatientName="Doe^^^^^^^^")]
    )
    out, other = tmp_path / "out", write(tmp_path / "b", series(POSITIONS))
    caplog.clear(), capfd.readouterr()
    with caplog.at_level("DEBUG"):
        segment_folder(segmenter(), [folder, other], out, ["liver"])
    printed = "".join(capfd.readouterr()) + caplog.text + (out / "report.json").read_text()
    for path in out.glob("*.nii.gz"):
        printed += str(nib.load(path).header) + repr(nib.load(path).header.extensions)
    assert "holds 2 DICOM series" in printed
    for text in ("Doe", "Jane", "44871", "19610203", "20240229", "Elsewhere", "Thorax", "1.2.9", "not an age"):
        assert text not in printed, text
