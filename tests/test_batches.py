"""Batches: what overlaps in time, what the report and the list of problems say, and several processes in one folder."""

from __future__ import annotations

import csv
import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_scans import patient_hu, save_patient
from stand_in_models import Contrast, Threshold

from mome.errors import InputError, OutputError
from mome.inference import Segmenter, segment_folder
from mome.inference.claims import Claims
from mome.inference.peak_memory import PeakMemory
from mome.inference.problems import problems_of
from mome.inference.scans import find_named_scans
from mome.inference.study_run import StudyRun
from mome.inference.volumes_table import write_volumes
from mome.memory import process_bytes
from mome.processing import MoMEProcessor
from mome.volumes.writers.nifti import NiftiWriter


def segmenter(**options: Any) -> Segmenter:
    """Masks of the bone: liver above 300 HU, spleen above 400 HU."""
    processor = MoMEProcessor(spacing=[8, 9, 10], hu_window=[-200, 800])
    return Segmenter(Contrast(thresholds=(0.5, 0.6)), processor, **options)


def scans(folder: Path, names: str = "abc") -> list[Path]:
    return [save_patient(folder / f"{name}.nii.gz") for name in names]


def report(out: Path) -> dict[str, dict[str, Any]]:
    return {entry["name"]: entry for entry in json.loads((out / "report.json").read_text())["studies"]}


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
        assert all(300 < float(row["mean_hu"]) < 700 for row in csv.DictReader(file))


def test_names_of_the_table_are_no_formulas(tmp_path: Path) -> None:
    structures = [{"name": "=HYPERLINK(1)", "volume_ml": 1.5}, {"name": "Gefäß", "volume_ml": 2.5}]
    entry = {"name": "+a", "status": "done", "structures": structures}
    (tmp_path / "report.json").write_text(json.dumps({"studies": [entry]}))
    rows = write_volumes(tmp_path).read_text(encoding="utf-8").splitlines()[1:]
    assert rows == ["'+a,'=HYPERLINK(1),1.5,", "'+a,Gefäß,2.5,"]


# -- several processes ---------------------------------------------------------------------------------------


def test_claims_exclude_each_other_and_end_with_their_process(tmp_path: Path) -> None:
    first, second = Claims(tmp_path), Claims(tmp_path)
    assert first.take("a") and not second.take("a") and second.take("b")
    first.release("a")
    assert second.take("a")
    second.release_all()
    assert not list(tmp_path.iterdir())
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writing, b"y" if Claims(tmp_path).take("a") else b"n")
        time.sleep(600)
    assert os.read(reading, 1) == b"y"
    assert not first.take("a")
    second.remove_stale()
    assert [path.name for path in tmp_path.iterdir()] == [".a.claim"]  # its process lives
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    second.remove_stale()
    assert not list(tmp_path.iterdir()) and first.take("a")
    first.release_all()


def test_a_fork_does_not_hold_a_claim(tmp_path: Path) -> None:
    claims = Claims(tmp_path)
    assert claims.take("a")
    child = os.fork()
    if child == 0:
        time.sleep(1)
        os._exit(0)
    claims.release("a")
    assert Claims(tmp_path).take("a")
    os.waitpid(child, 0)


def test_a_study_that_another_process_holds_waits_until_it_is_finished(tmp_path: Path) -> None:
    given, out = scans(tmp_path / "in"), tmp_path / "out"
    other = Claims(out)
    assert other.take("a")
    done: list[str] = []

    def on_done(entry: dict[str, Any]) -> None:
        done.append(entry["name"])
        if len(done) == 2:  # the other process finishes `a` while this one waits for it
            segment_folder(segmenter(), given[:1], out, ["liver"])
            other.release_all()

    entries = segment_folder(segmenter(), given, out, ["liver"], resume=True, on_done=on_done)
    assert done == ["b", "c", "a"] and [entry.get("skipped", False) for entry in entries] == [True, False, False]


def test_processes_share_a_cohort_and_failures_are_tried_once(tmp_path: Path, monkeypatch) -> None:
    """Two runs in threads stand for two processes: claims are held per run."""
    folder, out = tmp_path / "in", tmp_path / "out"
    scans(folder, "abcdefgh")
    (folder / "e.nii.gz").write_bytes(b"broken")
    worked: list[str] = []
    real = StudyRun.load

    def counted(self: StudyRun, *arguments: Any) -> None:
        worked.append(self.study.name)
        time.sleep(0.02)
        real(self, *arguments)

    monkeypatch.setattr(StudyRun, "load", counted)
    results: dict[int, list[dict[str, Any]]] = {}
    barrier = threading.Barrier(2)

    def run(rank: int) -> None:
        made = segmenter()
        barrier.wait()
        results[rank] = segment_folder(made, [folder], out, ["liver"], resume=True, part=(rank, 2))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(worked) == list("abcdefgh")  # each once, the broken one, too
    for entries in results.values():
        assert [entry["name"] for entry in entries] == list("abcdefgh")
        assert {entry["name"]: entry["status"] for entry in entries} == dict.fromkeys("abcdfgh", "done") | {
            "e": "failed"
        }
    assert sorted(report(out)) == list("abcdefgh") and not list(out.glob(".*"))
    worked.clear()
    segment_folder(segmenter(), [folder], out, ["liver"], resume=True)
    assert worked == ["e"]  # a later run tries what failed again


@pytest.mark.parametrize(("part", "resume"), [((2, 2), True), ((-1, 2), True), ((0, 2), False)])
def test_a_part_that_is_none(tmp_path: Path, part: tuple[int, int], resume: bool) -> None:
    with pytest.raises(InputError, match="part"):
        segment_folder(segmenter(), scans(tmp_path, "a"), tmp_path / "out", ["liver"], part=part, resume=resume)


# -- folders of folders --------------------------------------------------------------------------------------


def test_a_cohort_of_folders(tmp_path: Path) -> None:
    cohort = tmp_path / "cohort"
    for patient in ("p1", "p2"):
        save_patient(cohort / patient / "ct.nii.gz")
    save_patient(cohort / ".hidden" / "ct.nii.gz")
    (cohort / "p1" / "notes").mkdir()
    (cohort / "p1" / "notes" / "x.txt").write_text("x")
    (cohort / "loop").symlink_to(cohort)
    out = cohort / "masks"
    for _ in range(2):  # the second time, the masks lie there
        found = find_named_scans([cohort], recursive=True, leave_out=out)
        assert [(scan.name, scan.path) for scan in found] == [
            (f"{patient}_ct", cohort / patient / "ct.nii.gz") for patient in ("p1", "p2")
        ]
        entries = segment_folder(segmenter(), [cohort], out, ["liver"], recursive=True, resume=True)
    assert [entry["masks"] for entry in entries] == [["p1_ct_liver.nii.gz"], ["p2_ct_liver.nii.gz"]]
    with pytest.raises(InputError, match="neither the folder nor those inside"):
        find_named_scans([cohort / "p1" / "notes"], recursive=True)


def test_names_in_a_cohort_never_collide(tmp_path: Path) -> None:
    save_patient(tmp_path / "a" / "b_c.nii.gz"), save_patient(tmp_path / "a_b" / "c.nii.gz")
    with pytest.raises(InputError, match="two scans would both be named 'a_b_c'"):
        find_named_scans([tmp_path], recursive=True)
    deep = tmp_path / "deep"
    for last in "xy":
        save_patient(deep / ("1." * 40 + last) / ("2." * 40 + "3") / "ct.nii.gz")
    names = [scan.name for scan in find_named_scans([deep], recursive=True)]
    assert len(set(names)) == 2 and all(len(name) <= 100 and name.endswith("_ct") for name in names)


def test_a_cohort_of_dicom_series(tmp_path: Path) -> None:
    pytest.importorskip("pydicom")
    from dicom_series import along_z, series, write

    positions = along_z(np.arange(6) * 3.0)
    for place in ("p1/s1", "p1/s2", "p2/s1"):
        write(tmp_path / place, series(positions), "" if place == "p2/s1" else ".dcm")
    found = find_named_scans([tmp_path], recursive=True)
    assert [(scan.name, scan.path.relative_to(tmp_path).as_posix()) for scan in found] == [
        ("p1_s1", "p1/s1"),
        ("p1_s2", "p1/s2"),
        ("p2_s1", "p2/s1"),
    ]


def test_threads_that_read_dicom_do_not_break_each_others_silence(caplog: pytest.LogCaptureFixture) -> None:
    """The first thread leaves its block while the second is in one; what the second says stays unheard."""
    import logging
    import warnings

    from mome.volumes.dicom.quiet import quiet_decoders

    caplog.set_level(logging.WARNING, "pydicom")  # a command that ran before in this process has silenced it
    logger, before = logging.getLogger("pydicom"), (logging.getLogger("pydicom").level, list(warnings.filters))
    entered, left = threading.Event(), threading.Event()

    def second() -> None:
        with quiet_decoders():
            entered.set()
            assert left.wait(10)
            logger.error("Doe^Jane")
            warnings.warn("Doe^Jane", stacklevel=1)

    with warnings.catch_warnings(record=True) as heard:
        thread = threading.Thread(target=second)
        with quiet_decoders():
            thread.start()
            assert entered.wait(10)
        left.set()
        thread.join()
        assert not heard and "Doe" not in caplog.text
        logger.error("heard again")
    assert "heard again" in caplog.text and before == (logger.level, list(warnings.filters))
