"""Results of a zip of DICOM files: DICOM SEG of both kinds and RTSTRUCT, which refer to the uploaded series."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pydicom
import pytest
from dicom_series import along_z, series, write
from server_process import Server

from mome.errors import InputError
from mome.server.served_models import ServedModels
from mome.server.worker import Worker
from mome.volumes import read_volume

for package in ("fastapi", "uvicorn", "python_multipart", "highdicom"):
    pytest.importorskip(package, reason="the server needs mome[serve,dicom]")


def zipped(folder: Path, **changes: object) -> bytes:
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(write(folder, series(along_z(range(0, 36, 3)), **changes)).iterdir()):
            archive.write(path, f"study/{path.name}")
    return held.getvalue()


def test_every_dicom_result_refers_to_the_series(server: Server, tmp_path: Path) -> None:
    study = zipped(tmp_path / "series", FrameOfReferenceUID="1.2.3.9")
    source = pydicom.dcmread(next((tmp_path / "series").iterdir()))
    outputs = ["dicom_seg", "dicom_seg_binary", "rtstruct"]
    job = server.wait(server.submit([("x.zip", study)], ["liver", "spleen"], output=outputs).json["id"])
    assert job["state"] == "done", job
    found = {}
    for name in outputs:
        answer = server.ask("GET", f"/jobs/{job['id']}/result?format={name}")
        assert answer.headers["content-type"] == "application/dicom"
        found[name] = pydicom.dcmread(io.BytesIO(answer.body))
        assert found[name].StudyInstanceUID == source.StudyInstanceUID
        assert found[name].FrameOfReferenceUID == source.FrameOfReferenceUID
    assert [found[name].Modality for name in outputs] == ["SEG", "SEG", "RTSTRUCT"]
    assert found["dicom_seg_binary"].SegmentationType == "BINARY"
    assert {found[name].ReferencedSeriesSequence[0].SeriesInstanceUID for name in outputs[:2]} == {
        source.SeriesInstanceUID
    }


def test_a_series_that_nothing_can_refer_to_is_refused_in_words_of_the_form(server: Server, tmp_path: Path) -> None:
    study = zipped(tmp_path / "series", FrameOfReferenceUID="1.2.3.9", StudyInstanceUID=None)
    job = server.wait(server.submit([("x.zip", study)], ["liver"], output="dicom_seg").json["id"])
    assert job["state"] == "failed" and "output=nifti" in job["error"]["hint"], job
    assert server.submit([("x.zip", study)], ["liver"], output="nifti").status == 202


def test_slices_that_share_a_uid_are_refused_before_the_network_runs(tmp_path: Path) -> None:
    study = zipped(tmp_path / "series", FrameOfReferenceUID="1.2.3.9", SOPInstanceUID="1.2.7")
    (tmp_path / "job" / "input").mkdir(parents=True)
    (tmp_path / "job" / "input" / "x.zip").write_bytes(study)
    worker = Worker({"models": ["none"]}, io.BytesIO())
    reader = SimpleNamespace(
        load=lambda scan, **options: SimpleNamespace(volume=read_volume(scan)),
        model=SimpleNamespace(config=SimpleNamespace(trained_labels=[])),
    )
    worker._models = ServedModels({"none": reader})
    message = {"job": "1", "folder": str(tmp_path / "job"), "source": "x.zip", "prompts": ["liver"], "options": {}}
    with pytest.raises(InputError, match="have no SOPInstanceUID, or share one"):  # the stand-in cannot segment
        worker._run({**message, "outputs": ["dicom_seg"]})
