"""`mome segment` with the DICOM writers: files, report, refusals, and names of multi-label maps."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
from orientation_runs import places, save_nifti, save_series
from small_models import liver_and_spleen
from test_orientations import SHAPE, phantom_affine, phantom_hu

from mome.cli.main import main
from mome.processing import MoMEProcessor
from mome.volumes import read_label_table
from mome.volumes.dicom_out.earlier_objects import is_whole_object

pytest.importorskip("highdicom", reason='pip install "mome[dicom]"')
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A phantom as `series/` (DICOM) and `ct.nii.gz`, and a small model in `tiny/`."""
    folder, affine = tmp_path_factory.mktemp("scans"), phantom_affine()
    liver_and_spleen().save_pretrained(folder / "tiny")
    MoMEProcessor(spacing=[8, 8, 8]).save_pretrained(folder / "tiny")
    hu = phantom_hu(places(SHAPE, affine))
    save_series(folder / "series", hu, affine)
    save_nifti(folder / "ct.nii.gz", hu, affine)
    return folder


def test_seg_and_statistics(scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["segment", str(scans / "series"), "-p", "spleen", "-p", "hepar", "-o", str(tmp_path)]
    command += ["-m", str(scans / "tiny")]
    assert main([*command, "--writer", "dicom_seg(kind=binary)", "--statistics"]) == 0
    seg = pydicom.dcmread(tmp_path / "series_seg.dcm")
    assert seg.SegmentationType == "BINARY"
    assert [item.SegmentLabel for item in seg.SegmentSequence] == ["spleen", "liver"]
    algorithm = seg.SegmentSequence[0].SegmentationAlgorithmIdentificationSequence[0]
    (study,) = json.loads((tmp_path / "report.json").read_text())["studies"]
    assert algorithm.AlgorithmName == "mome tiny" and algorithm.AlgorithmVersion.endswith(study["model"])
    assert study["masks"] == ["series_seg.dcm"] and study["writer"] == "dicom_seg(kind=binary)"
    with (tmp_path / "statistics.csv").open(newline="") as file:
        assert [row["structure"] for row in csv.DictReader(file)] == ["spleen", "liver"]
    assert main([*command, "--writer", "dicom_seg(kind=binary)", "--statistics", "--resume"]) == 0
    assert "from an earlier run" in capsys.readouterr().err
    assert main([*command, "--writer", "rtstruct"]) == 0
    structures = pydicom.dcmread(tmp_path / "series_rtstruct.dcm")
    assert [item.ROIName for item in structures.StructureSetROISequence] == ["spleen", "liver"]


def test_a_seg_of_other_structures_is_not_replaced(
    scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["segment", str(scans / "series"), "-m", str(scans / "tiny"), "-o", str(tmp_path), "--writer"]
    command += ["dicom_seg", "-p", "spleen"]
    assert main([*command, "-p", "liver"]) == 0
    before = (tmp_path / "series_seg.dcm").read_bytes()
    assert main(command) == 2
    assert "the file is there already, with other structures: spleen, liver" in capsys.readouterr().err
    assert main([*command, "-p", "liver", "--multilabel"]) == 2  # overlaps would be lost
    assert "the file is there already, made without --multilabel" in capsys.readouterr().err
    assert (tmp_path / "series_seg.dcm").read_bytes() == before
    assert main([*command, "-p", "liver"]) == 0 and main([*command, "--overwrite"]) == 0


def test_refusals_name_the_way_out(scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["segment", str(scans / "ct.nii.gz"), "-p", "liver", "-o", str(tmp_path / "out")]
    command += ["-m", str(scans / "tiny"), "--writer"]
    for writer, message in (
        ("rtstruct", "refers to the slices of a DICOM series"),
        ("dicom_sag", "unknown mask writer 'dicom_sag', did you mean 'dicom_seg'?"),
        ("dicom_seg(kind=labelmap)", "'kind' is one of auto, binary, got 'labelmap'"),
    ):
        assert main([*command, writer]) == 2
        assert message in capsys.readouterr().err
    assert main(["list", "writers"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in ("nifti", "dicom_seg", "rtstruct"))


@pytest.mark.parametrize("writer", ["dicom_seg", "rtstruct"])
def test_slices_that_share_a_uid_are_refused_before_the_network_runs(
    scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, writer: str
) -> None:
    def network(*arguments: object, **options: object) -> None:
        raise AssertionError("the network ran")

    monkeypatch.setattr("mome.inference.segmenter.predict_within_memory", network)
    for path in (scans / "series").iterdir():
        image = pydicom.dcmread(path)
        image.SOPInstanceUID = image.file_meta.MediaStorageSOPInstanceUID = "1.2.7"
        (tmp_path / "twins").mkdir(exist_ok=True)
        image.save_as(tmp_path / "twins" / path.name)
    command = ["segment", str(tmp_path / "twins"), "-p", "liver", "-o", str(tmp_path / "out")]
    assert main([*command, "-m", str(scans / "tiny"), "--writer", writer]) == 2
    assert "have no SOPInstanceUID, or share one" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_nifti_of_a_dicom_series(scans: Path, tmp_path: Path) -> None:
    """One file per prompt, and one map of ids with its table; names of folders and of prompts stay whole."""
    command = ["segment", str(scans / "series"), "-p", "hepar", "-p", "spleen", "-m", str(scans / "tiny")]
    assert main([*command, "-o", str(tmp_path / "each")]) == 0
    assert main([*command, "-o", str(tmp_path / "map"), "--multilabel"]) == 0
    each = sorted(path.name for path in (tmp_path / "each").glob("*.nii.gz"))
    assert each == ["series_liver.nii.gz", "series_spleen.nii.gz"]
    table = {entry["name"]: entry["id"] for entry in read_label_table(tmp_path / "map" / "series.nii.gz")}
    assert set(table) == {"liver", "spleen"}
    image = nib.load(tmp_path / "map" / "series.nii.gz")
    assert set(np.unique(np.asarray(image.dataobj))) <= {0, *table.values()}


@pytest.mark.parametrize("writer", ["dicom_seg", "rtstruct"])
def test_a_run_that_resumes_keeps_a_corrected_object(
    scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], writer: str
) -> None:
    """Only files of voxels were tried to be read, so that a corrected SEG was taken for a damaged one and replaced."""
    command = ["segment", str(scans / "series"), "-m", str(scans / "tiny"), "-o", str(tmp_path), "--writer", writer]
    assert main([*command, "-p", "liver"]) == 0
    (path,) = tmp_path.glob("*.dcm")
    corrected = pydicom.dcmread(path)
    corrected.InstanceCreationTime = "101112.123456"
    corrected.save_as(path)
    before = path.read_bytes()
    assert main([*command, "-p", "liver", "--resume"]) == 0 and path.read_bytes() == before
    assert "changed after they were written, and kept" in capsys.readouterr().err
    assert main([*command, "-p", "liver", "-p", "spleen", "--resume"]) == 2 and path.read_bytes() == before
    assert "the mask was changed after it was written, and would be replaced" in capsys.readouterr().err
    for count in (len(before) // 3, len(before) - 20):  # what a copy that was interrupted left is replaced
        path.write_bytes(before[:count])
        assert main([*command, "-p", "liver", "--resume"]) == 0 and is_whole_object(path)


@pytest.mark.parametrize("writer", ["dicom_seg", "rtstruct"])
def test_no_object_lies_among_the_slices(
    scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], writer: str
) -> None:
    """The next run found two series in the folder, or took the scan for another one and refused its own file."""
    series = shutil.copytree(scans / "series", tmp_path / "series")
    before = sorted(series.iterdir())
    command = ["segment", str(series), "-p", "liver", "-m", str(scans / "tiny"), "--writer", writer]
    for out in (series, tmp_path / "link"):
        if out is not series:
            out.symlink_to(series)
        assert main([*command, "-o", str(out)]) == 2 and sorted(series.iterdir()) == before
        assert "would lie among the slices of its scan" in capsys.readouterr().err
    assert main([*command, "-o", str(series / "masks")]) == 0
    assert main([*command, "-o", str(series / "masks"), "--resume"]) == 0
    assert "from an earlier run" in capsys.readouterr().err
