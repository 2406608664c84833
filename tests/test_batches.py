"""Batches: what overlaps in time, what the report and the list of problems say, and several processes in one folder."""

from __future__ import annotations

import csv
import json
import threading
import time
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from batch_helpers import report, scans, segmenter
from rich.console import Console
from small_scans import patient_hu, save_patient
from stand_in_models import Threshold

from mome.cli.segment import _print_study
from mome.errors import InputError, OutputError
from mome.inference import Segmenter, segment_folder
from mome.inference.memory_plan import MemoryPlan, Work
from mome.inference.peak_memory import PeakMemory
from mome.inference.problems import problems_of
from mome.inference.study_run import StudyRun
from mome.inference.volumes_table import write_volumes
from mome.memory import process_bytes
from mome.processing import MoMEProcessor
from mome.volumes import read_label_table
from mome.volumes.mask_set import MaskSet
from mome.volumes.writers.nifti import NiftiWriter


def problems(out: Path) -> dict[str, dict[str, Any]]:
    return {entry["name"]: entry for entry in json.loads((out / "problems.json").read_text())["problems"]}


# -- reading ahead and writing behind ------------------------------------------------------------------------


def test_scans_are_read_and_masks_written_while_the_network_runs(tmp_path: Path, monkeypatch) -> None:
    """The network of `a` waits until `b` is read, and that of `b` until `a` is in the report."""
    read, written, threads = threading.Event(), threading.Event(), {}
    real = {name: getattr(StudyRun, name) for name in ("load", "segment", "write")}

    def watched(name: str) -> Any:
        def step(self: StudyRun, *arguments: Any) -> None:
            threads[name, self.study.name] = threading.current_thread().name
            if name == "segment":
                assert {"a": read, "b": written}[self.study.name].wait(30)
            real[name](self, *arguments)
            if (name, self.study.name) == ("load", "b"):
                read.set()

        return step

    for name in real:
        monkeypatch.setattr(StudyRun, name, watched(name))
    seen = []

    def record(self: Any, name: str, entry: dict[str, Any], add: Any = None) -> None:
        assert all((tmp_path / "out" / mask).is_file() for mask in entry["masks"])  # masks first, then the entry
        seen.append(name)
        adding(self, name, entry)
        written.set()

    from mome.inference.report import Report

    adding = Report.add
    monkeypatch.setattr(Report, "add", record)
    entries = segment_folder(segmenter(), scans(tmp_path / "in", "ab"), tmp_path / "out", ["liver"])
    assert [entry["status"] for entry in entries] == ["done", "done"] and seen == ["a", "b"]
    main = threading.current_thread().name
    assert threads["segment", "a"] == threads["segment", "b"] == main
    assert {threads["load", "b"], threads["write", "a"]} == {"mome-read_0", "mome-write_0"}


@pytest.mark.parametrize("read_ahead", [True, False])
def test_the_results_do_not_depend_on_threads(tmp_path: Path, read_ahead: bool) -> None:
    given = scans(tmp_path / "in")
    given.insert(1, tmp_path / "in" / "bad.nii.gz")
    given[1].write_bytes(b"bad")
    told: list[str] = []
    entries = segment_folder(
        segmenter(),
        given,
        tmp_path / "out",
        ["liver", "spleen"],
        read_ahead=read_ahead,
        on_done=lambda entry: told.append(entry["name"]),
    )
    assert [entry["name"] for entry in entries] == told == list(report(tmp_path / "out")) == ["a", "bad", "b", "c"]
    one = segmenter().segment(given[0], ["liver"]).save(tmp_path / "one", "a")
    assert one[0].read_bytes() == (tmp_path / "out" / "a_liver.nii.gz").read_bytes()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("mome-")]


@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError])
def test_a_run_that_is_stopped_finishes_the_study_that_it_writes(tmp_path: Path, monkeypatch, stop: type) -> None:
    began, real = threading.Event(), NiftiWriter.write

    def slow(self: NiftiWriter, path: Path, *arguments: Any, **options: Any) -> Any:
        began.set()
        time.sleep(0.1)
        return real(self, path, *arguments, **options)

    made = segmenter()
    segment = made.segment

    def stopped(scan: Path, *arguments: Any, **options: Any) -> Any:
        if scan.name.startswith("b"):
            assert began.wait(30)
            raise stop
        return segment(scan, *arguments, **options)

    monkeypatch.setattr(NiftiWriter, "write", slow)
    made.segment = stopped  # type: ignore[method-assign]
    out = tmp_path / "out"
    with pytest.raises(stop):
        segment_folder(made, scans(tmp_path / "in"), out, ["liver", "spleen"], debug=True, resume=True)
    assert list(report(out)) == ["a"]
    assert {path.name for path in out.iterdir()} == {"a_liver.nii.gz", "a_spleen.nii.gz", "report.json"}


def test_a_full_disk_in_the_middle_of_a_study(tmp_path: Path, monkeypatch) -> None:
    real = NiftiWriter.write

    def full(self: NiftiWriter, path: Path, *arguments: Any, **options: Any) -> Any:
        if path.name == "b_spleen.nii.gz":
            raise OutputError("the mask could not be written: No space left on device")
        return real(self, path, *arguments, **options)

    monkeypatch.setattr(NiftiWriter, "write", full)
    out = tmp_path / "out"
    with pytest.raises(OutputError, match="No space left"):
        segment_folder(segmenter(), scans(tmp_path / "in"), out, ["liver", "spleen"])
    assert {path.name for path in out.iterdir()} == {"a_liver.nii.gz", "a_spleen.nii.gz", "report.json"}
    monkeypatch.undo()
    entries = segment_folder(segmenter(), scans(tmp_path / "in"), out, ["liver", "spleen"], overwrite=True)
    assert [entry["status"] for entry in entries] == ["done"] * 3


# -- the report and the list of problems ---------------------------------------------------------------------


def test_what_an_entry_says(tmp_path: Path) -> None:
    (entry,) = segment_folder(segmenter(), scans(tmp_path, "a"), tmp_path / "out", ["liver"], statistics=True)
    assert entry["phases"].keys() >= {"prompts", "read", "resample", "network", "write"}
    assert entry["seconds"] == pytest.approx(sum(entry["phases"].values()), abs=0.006)
    assert entry["peak_memory_bytes"] > 50e6 and set(entry["versions"]) == {"mome", "torch", "transformers", "python"}
    assert len(entry["model"]) == 16 and entry["ended"].startswith("20") and entry["doubts"] == []
    assert 300 < entry["structures"][0]["mean_hu"] < 700


def test_the_memory_of_a_study_is_its_own() -> None:
    """A large study does not raise the number of those that begin after it, but that of one beside it."""
    memory = PeakMemory()
    memory.begin("large")
    memory.begin("beside")
    held = np.ones(60_000_000, np.uint8)
    size = process_bytes()
    del held
    memory.begin("small")
    found = {name: memory.end(name)["peak_memory_bytes"] for name in ("small", "large", "beside")}
    if found["small"] == found["large"]:
        pytest.skip("the system does not reset the highest memory of a process")
    # Linux counts pages in portions, so that two numbers may differ by some of them.
    assert min(found["large"], found["beside"]) >= size - 2_000_000
    assert found["small"] < size - 40_000_000
    assert memory.end("unknown") == {"peak_memory_bytes": None}


def test_the_scan_that_is_read_meanwhile_is_counted(tmp_path: Path, monkeypatch) -> None:
    made, reading, seen = segmenter(), threading.Event(), []
    load, segment = made.load, made.segment

    def slow(scan: Path, **options: Any) -> Any:
        if scan.name.startswith("b"):
            assert reading.wait(30)
        return load(scan, **options)

    def watched(*arguments: Any, **options: Any) -> Any:
        seen.append((options["reserved_bytes"], options["loaded"].nbytes))
        reading.set()
        return segment(*arguments, **options)

    made.load, made.segment = slow, watched  # type: ignore[method-assign]
    segment_folder(made, scans(tmp_path / "in"), tmp_path / "out", ["liver"], read_ahead=True)
    assert seen[0][0] == seen[0][1] > 0 and seen[-1][0] == 0


@pytest.mark.parametrize("has_room", [True, False])
def test_a_scan_is_read_ahead_only_where_it_fits(tmp_path: Path, monkeypatch, has_room: bool) -> None:
    made, given, steps = segmenter(), scans(tmp_path / "in", "ab"), []
    first = made.load(given[0])
    smallest = MemoryPlan(1, 1, half_sums=True).total(
        Work(first.volume.shape, first.network.shape, made.predictor.patch_size, 1)
    )
    left = smallest + first.nbytes - (0 if has_room else 1)
    with monkeypatch.context() as patched:
        patched.setattr("mome.inference.scan_memory.budget", lambda limit, scan_bytes: left)
        assert made.has_room_for_another(first, 1) is has_room
    monkeypatch.setattr(made, "has_room_for_another", lambda loaded, prompts: has_room)
    reading, real, segment = threading.Event(), made.load, made.segment

    def load(scan: Path, **options: Any) -> Any:
        if scan.name.startswith("b"):
            steps.append("read b")
            reading.set()
        return real(scan, **options)

    def segmented(scan: Path, *arguments: Any, **options: Any) -> Any:
        if scan.name.startswith("a") and has_room:
            assert reading.wait(30)
        found = segment(scan, *arguments, **options)
        steps.append(f"segmented {scan.name[0]}")
        return found

    monkeypatch.setattr(made, "load", load)
    monkeypatch.setattr(made, "segment", segmented)
    entries = segment_folder(made, given, tmp_path / "out", ["liver"], read_ahead=True)
    assert [entry["status"] for entry in entries] == ["done", "done"]
    ahead = ["read b", "segmented a"] if has_room else ["segmented a", "read b"]
    assert steps == [*ahead, "segmented b"]


def test_problems_name_phase_reason_and_remedy_until_they_are_mended(tmp_path: Path) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    a, b, c = scans(folder)
    whole = b.read_bytes()
    b.write_bytes(whole[: len(whole) // 2])
    save_patient(c, patient_hu()[:, :, :1])  # one slice: a note of the reader or none; the mask decides
    full = Segmenter(Threshold(-1.0), MoMEProcessor(spacing=[8, 9, 10]))
    entries = segment_folder(full, [folder], out, ["liver"])
    assert [entry["status"] for entry in entries] == ["done", "failed", "done"]
    found = problems(out)
    assert found["b"] == {
        "name": "b",
        "status": "failed",
        "phase": "read",
        "reasons": ["the file is truncated or damaged: the compressed data end early"],
        "remedy": "copy or download it again",
    }
    assert found["a"]["status"] == "doubtful" and "fills 100%" in found["a"]["reasons"][0] and found["a"]["remedy"]
    b.write_bytes(whole)
    segment_folder(segmenter(), [folder], out, ["liver"], overwrite=True)
    assert not (out / "problems.json").exists()


def test_notes_of_the_model_make_no_study_doubtful(tmp_path: Path) -> None:
    made = segmenter()
    made.notes += ("a note on the model",)
    (entry,) = segment_folder(made, scans(tmp_path, "a"), tmp_path / "out", ["liver"])
    assert "a note on the model" in entry["notes"] and entry["doubts"] == [] and problems_of([entry]) == []


def test_the_phase_of_a_failure(tmp_path: Path, monkeypatch) -> None:
    given = scans(tmp_path, "ab")
    made = segmenter()
    monkeypatch.setattr(made.processor.__class__, "to_network", lambda *a: (_ for _ in ()).throw(InputError("large")))
    entries = segment_folder(made, given, tmp_path / "out", ["liver"])
    assert {entry["failure"]["phase"] for entry in entries} == {"resample"}
    monkeypatch.undo()
    monkeypatch.setattr("mome.inference.within_memory.predict_masks", lambda *a, **k: [][1])
    entries = segment_folder(made, given, tmp_path / "out", ["liver"])
    assert {entry["failure"]["phase"] for entry in entries} == {"network"}
    assert all("--debug" in entry["failure"]["remedy"] for entry in entries)


def test_every_setting_that_changes_masks_is_asked_for_on_resume(tmp_path: Path) -> None:
    given, out = scans(tmp_path, "a"), tmp_path / "out"
    made = segmenter()
    (first,) = segment_folder(made, given, out, ["liver"], resume=True)
    assert first["settings"].items() >= made.mask_settings().items()
    settings = made.mask_settings()
    for name in settings:
        other = segmenter()
        other.mask_settings = lambda name=name: {**settings, name: "another"}  # type: ignore[method-assign]
        (entry,) = segment_folder(other, given, tmp_path / name, ["liver"], resume=True)
        (entry,) = segment_folder(made, given, tmp_path / name, ["liver"], resume=True)
        assert not entry.get("skipped"), name
    (entry,) = segment_folder(segmenter(), given, out, ["liver"], resume=True)
    assert entry["skipped"]


def test_masks_from_before_scans_were_put_upright_are_made_again(tmp_path: Path) -> None:
    given, out = scans(tmp_path, "a"), tmp_path / "out"
    segment_folder(segmenter(), given, out, ["liver"], resume=True)
    path = out / "report.json"
    held = json.loads(path.read_text())
    assert "turned by more than 10 degrees" in held["studies"][0]["settings"].pop("grid")
    path.write_text(json.dumps(held))
    (entry,) = segment_folder(segmenter(), given, out, ["liver"], resume=True)
    assert not entry.get("skipped") and "grid" in entry["settings"]


def test_the_table_of_volumes(tmp_path: Path) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    scans(folder)
    (folder / "d.nii.gz").write_bytes(b"broken")
    segment_folder(segmenter(), [folder], out, ["liver", "spleen"])
    with write_volumes(out).open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["study"], row["structure"]) for row in rows] == [(n, s) for n in "abc" for s in ("liver", "spleen")]
    expected = report(out)["a"]["structures"][0]["volume_ml"]
    assert float(rows[0]["ml"]) == expected > 0 and rows[0]["mean_hu"] == ""
    segment_folder(segmenter(), [folder], out, ["liver"], statistics=True, overwrite=True)
    with write_volumes(out).open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6  # those of the spleen were not measured
    assert all(300 < float(row["mean_hu"]) < 700 for row in rows if row["structure"] == "liver")
    assert {row["structure"] for row in rows if not row["mean_hu"]} == {"spleen"}


def test_volumes_of_a_map_are_those_that_it_holds(tmp_path: Path, monkeypatch, capsys) -> None:
    """Report, statistics and tables say the volume of the whole mask and that in the map, which is made once."""
    folder, out, made = tmp_path / "in", tmp_path / "out", []
    scans(folder, "a")
    flat = MaskSet.flat.func
    monkeypatch.setattr(MaskSet.flat, "func", lambda masks: made.append(masks) or flat(masks))
    (entry,) = segment_folder(segmenter(), [folder], out, ["liver", "spleen"], multilabel=True, statistics=True)
    assert len(made) == 1
    numbers = np.asarray(nib.load(out / "a.nii.gz").dataobj)
    ids = {label["name"]: label["id"] for label in read_label_table(out / "a.nii.gz")}
    liver, spleen = report(out)["a"]["structures"]
    assert entry["overlapping_voxels"] == spleen["voxels_in_map"] > 0 and spleen["volume_ml_in_map"] > 0
    for found in (liver, spleen):
        assert found["voxels_in_map"] == (numbers == ids[found["name"]]).sum()
    assert liver["volume_ml"] == pytest.approx(liver["volume_ml_in_map"] + spleen["volume_ml"], abs=0.01)
    measured = json.loads((out / "a_statistics.json").read_text())["structures"]["liver"]
    assert measured["volume_ml"] == liver["volume_ml"] and measured["voxels_in_map"] == liver["voxels_in_map"]
    with (out / "statistics.csv").open() as file:
        assert [row["voxels_in_map"] for row in csv.DictReader(file)] == [
            str(s["voxels_in_map"]) for s in (liver, spleen)
        ]
    with write_volumes(out).open() as file:
        rows = [(float(row["ml"]), float(row["ml_in_map"])) for row in csv.DictReader(file)]
    assert rows == [(s["volume_ml"], s["volume_ml_in_map"]) for s in (liver, spleen)]
    _print_study(entry, out, Console(stderr=True), set())
    printed = capsys.readouterr().err
    assert f"{liver['volume_ml']:.1f} ml, {liver['volume_ml_in_map']:.1f} ml of it in the map" in printed
    assert printed.count("in the map") == 1  # the spleen is covered by nothing
    # A table of maps and of single masks: these have no volume in a map.
    scans(folder, "b")
    segment_folder(segmenter(), [folder / "b.nii.gz"], out, ["liver"], statistics=True)
    with write_volumes(out).open() as file:
        assert [row["ml_in_map"] for row in csv.DictReader(file)][2] == ""


def test_names_of_the_table_are_no_formulas(tmp_path: Path) -> None:
    structures = [{"name": "=HYPERLINK(1)", "volume_ml": 1.5}, {"name": "Gefäß", "volume_ml": 2.5}]
    entry = {"name": "+a", "status": "done", "structures": structures}
    (tmp_path / "report.json").write_text(json.dumps({"studies": [entry]}))
    rows = write_volumes(tmp_path).read_text(encoding="utf-8").splitlines()[1:]
    assert rows == ["'+a,'=HYPERLINK(1),1.5,", "'+a,Gefäß,2.5,"]
