"""Mask writers by name: one that holds all structures in a file, errors, and folder runs with it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from small_models import liver_and_spleen

from mome.atomic import atomic_write
from mome.errors import InputError, OutputError
from mome.inference import Segmenter, segment_folder
from mome.processing import MoMEProcessor
from mome.volumes import WRITERS, Volume
from mome.volumes.mask_set import MaskSet


class JsonWriter:
    """Writes the voxel counts of all structures to one file; it wants a scan that lies in a file."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        indent: int = 0

    ending, separate, multilabel = ".json", False, False

    def __init__(self, config: Config) -> None:
        self.indent = config.indent

    def check_source(self, source: Path | None) -> None:
        if source is None or source.name.startswith("unfit"):
            raise InputError("this writer needs another scan")

    def check_volume(self, volume: Volume) -> None:
        if volume.shape[2] == 1:
            raise InputError("this writer needs several planes")

    def write(self, path: Path, masks: MaskSet, *, multilabel: bool = False) -> None:
        counts = {entry["name"]: int(masks.masks[entry["name"]].sum()) for entry in masks.labels}
        assert counts == dict(masks.voxels) and not multilabel
        with atomic_write(path, "the counts") as temporary:
            temporary.write_text(json.dumps(counts, indent=self.indent))


@pytest.fixture
def counts_writer(monkeypatch) -> None:
    WRITERS.names()  # the built-in writers are registered now
    monkeypatch.setattr(WRITERS, "_entries", dict(WRITERS._entries))
    WRITERS.register("counts", f"{__name__}:JsonWriter")


@pytest.fixture(scope="module")
def segmenter() -> Segmenter:
    return Segmenter(liver_and_spleen(), MoMEProcessor(spacing=[4, 4, 4]))


def scan(folder: Path, name: str, depth: int = 8) -> Path:
    path = folder / f"{name}.nii.gz"
    hu = np.random.default_rng(0).normal(0, 80, (8, 8, depth)).astype(np.int16)
    nib.save(nib.Nifti1Image(hu, np.diag([4.0, 4, 4, 1])), path)
    return path


def test_unknown_writers_and_what_a_writer_cannot_do(segmenter: Segmenter, counts_writer, tmp_path: Path) -> None:
    result = segmenter.segment(scan(tmp_path, "ct"), ["liver"])
    with pytest.raises(InputError, match="unknown mask writer 'nifty', did you mean 'nifti'"):
        result.save(tmp_path / "out", "ct", writer="nifty")
    with pytest.raises(InputError, match="JsonWriter writes no map of ids"):
        result.save(tmp_path / "out", "ct", writer="counts", multilabel=True)
    for writer in ("nifty", "counts"):
        with pytest.raises(InputError):
            segment_folder(segmenter, [tmp_path], tmp_path / "out", ["liver"], writer=writer, multilabel=True)
    unnamed = segmenter.segment(Volume(np.zeros((8, 8, 8), np.float32), np.eye(4)), ["liver"])
    with pytest.raises(InputError, match="needs another scan"):
        unnamed.save(tmp_path / "out", "ct", writer="counts")
    assert not (tmp_path / "out").exists()


def test_a_writer_of_one_file_names_it_and_holds_all(segmenter: Segmenter, counts_writer, tmp_path: Path) -> None:
    path = scan(tmp_path, "ct")
    result = segmenter.segment(path, ["liver", "spleen"])
    (written,) = result.save(tmp_path / "out", "ct", writer="counts(indent=2)")
    assert written == tmp_path / "out" / "ct.json"
    assert json.loads(written.read_text()) == {name: result.masks.voxels[name] for name in ("liver", "spleen")}
    assert [p.name for p in result.save(tmp_path / "out", "ct", writer={"name": "nifti"})] == [
        "ct_liver.nii.gz",
        "ct_spleen.nii.gz",
    ]


def test_a_folder_run_with_another_writer(segmenter: Segmenter, counts_writer, tmp_path: Path, monkeypatch) -> None:
    given, out = tmp_path / "in", tmp_path / "out"
    given.mkdir()
    for name in ("a", "b", "unfit"):
        scan(given, name)
    scan(given, "unread", depth=1)
    segmented, calls = [], []
    real, embed = Segmenter.segment, Segmenter.prepare
    monkeypatch.setattr(
        Segmenter, "segment", lambda self, s, *a, **k: (segmented.append(s.name), real(self, s, *a, **k))[1]
    )
    monkeypatch.setattr(Segmenter, "prepare", lambda self, *a: (calls.append(a), embed(self, *a))[1])
    progress: list[tuple[int, int]] = []

    def run(**options: object) -> list[dict]:
        return segment_folder(segmenter, [given], out, ["liver"], progress=lambda *t: progress.append(t), **options)

    entries = run(writer="counts")
    assert [entry["status"] for entry in entries] == ["done", "done", "failed", "failed"]
    assert [entry["failure"]["phase"] for entry in entries[2:]] == ["read", "read"]
    assert entries[0]["masks"] == ["a.json"] and entries[0]["writer"] == "counts"
    assert segmented == ["a.nii.gz", "b.nii.gz"]  # the network did not run for the scans that the writer refuses
    assert len(calls) == 1 and progress == [(1, 1), (1, 1)]  # prompts are embedded once for all scans
    again = run(writer="counts", resume=True)
    assert [entry.get("skipped", False) for entry in again] == [True, True, False, False] and len(segmented) == 2
    assert [entry["status"] for entry in run(resume=True)] == ["done"] * 4  # another writer, another request
    report = json.loads((out / "report.json").read_text())
    for entry in report["studies"]:
        del entry["writer"]  # as written before there were other writers than NIfTI
    (out / "report.json").write_text(json.dumps(report))
    assert all(entry["skipped"] for entry in run(resume=True))


def test_a_failing_file_removes_those_before_it(segmenter: Segmenter, tmp_path: Path, monkeypatch) -> None:
    from mome.volumes.writers.nifti import NiftiWriter

    result, real = segmenter.segment(scan(tmp_path, "ct"), ["liver", "spleen"]), NiftiWriter.write

    def fail_on_the_spleen(self: NiftiWriter, path: Path, masks: MaskSet, **options: object) -> None:
        if "spleen" in path.name:
            raise OutputError("full")
        real(self, path, masks, **options)

    monkeypatch.setattr(NiftiWriter, "write", fail_on_the_spleen)
    with pytest.raises(OutputError, match="full"):
        result.save(tmp_path / "out", "ct")
    assert list((tmp_path / "out").iterdir()) == []
