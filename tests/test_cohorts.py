"""Cohorts: processes share the studies of a folder, and folders of folders and of series are searched."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from batch_helpers import report, scans, segmenter
from small_scans import save_patient

from mome.errors import InputError
from mome.inference import segment_folder
from mome.inference.claims import Claims
from mome.inference.scans import find_named_scans
from mome.inference.study_files import KINDS
from mome.inference.study_run import StudyRun
from mome.inference.uncertainty_files import MAP_FOLDERS

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


def test_maps_beside_the_masks_are_no_scans(tmp_path: Path, caplog) -> None:
    """With masks in the folder that is searched, maps of the first run were scans of the next, which was refused."""
    save_patient(tmp_path / "cohort" / "p1" / "ct.nii.gz"), save_patient(tmp_path / "cohort" / "entropy" / "ct.nii.gz")
    masks = tmp_path / "cohort" / "p1"
    for skipped in (None, True):
        how = {"recursive": True, "resume": True, "files": ["probabilities", "entropy"]}
        (entry,) = segment_folder(segmenter(), [masks], masks, ["liver"], **how)
        assert entry["name"] == "ct" and entry.get("skipped") == skipped
    assert str(masks / "probabilities") in caplog.text and "left out as no scan" in caplog.text
    found = find_named_scans([tmp_path / "cohort"], recursive=True, leave_out=tmp_path / "elsewhere")
    assert [scan.name for scan in found] == ["entropy_ct", "p1_ct"]  # a folder without a report is the user's own
    assert MAP_FOLDERS == tuple(kind for kind in KINDS if "/" in KINDS[kind].names("a", ["b"])[0])


def test_names_in_a_cohort_never_collide(tmp_path: Path) -> None:
    save_patient(tmp_path / "a" / "b_c.nii.gz"), save_patient(tmp_path / "a_b" / "c.nii.gz")
    with pytest.raises(InputError, match="two scans would both be named 'a_b_c'"):
        find_named_scans([tmp_path], recursive=True)
    deep = tmp_path / "deep"
    for last in "xy":
        save_patient(deep / ("1." * 40 + last) / ("2." * 40 + "3") / "ct.nii.gz")
    names = [scan.name for scan in find_named_scans([deep], recursive=True)]
    assert len(set(names)) == 2 and all(len(name) <= 100 and name.endswith("_ct") for name in names)


def test_the_masks_of_totalsegmentators_data_set_are_no_scans(tmp_path: Path, caplog) -> None:
    for name in ("s1/ct", "s1/segmentations/liver", "s2/segmentations/scan"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(np.zeros((4, 4, 4), np.int16), np.eye(4)), tmp_path / f"{name}.nii.gz")
    found = find_named_scans([tmp_path], recursive=True)
    assert [scan.name for scan in found] == ["s1_ct", "s2_segmentations_scan"]
    # A user may keep scans in a folder of this name.
    assert str(tmp_path / "s1" / "segmentations") in caplog.text and "left out as no scan" in caplog.text
    caplog.clear()
    assert [scan.name for scan in find_named_scans([tmp_path / "s1" / "segmentations"], recursive=True)] == ["liver"]
    assert not caplog.text


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
