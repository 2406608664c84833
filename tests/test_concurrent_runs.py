"""Several runs in one folder, and runs that were killed: what they leave, and that no entry is lost."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from hostile_helpers import ct, ended_process, segmenter
from training_runs import losses, write_recipe

from mome.errors import InputError
from mome.inference import folder, segment_folder
from mome.inference.fingerprint import scan_identity
from mome.inference.report import Report, changed_masks, read_report
from mome.inference.study_run import StudyRun
from mome.processing import MoMEProcessor
from mome.temporary_names import remove_stale_parts, temporary_path


def test_stale_temporary_files_are_removed(tmp_path: Path) -> None:
    stale = [ended_process(tmp_path / "a.nii.gz"), tmp_path / ".0123456789abcdef.part.nii.gz"]
    folder = tmp_path / ".0123456789abcdee.part"
    mine = temporary_path(tmp_path / "a.nii.gz")
    elsewhere = tmp_path / ("." + "0" * 32 + ".part.nii.gz")
    others = [tmp_path / name for name in (".a.part", "x.part", ".part", ".0123456789ABCDEF.part", ".0123.part.nii.gz")]
    for path in (*stale, mine, elsewhere, *others):
        path.write_text("")
    folder.mkdir()
    (folder / "index.json").write_text("")
    link = tmp_path / ".0123456789abcde0.part"
    link.symlink_to(mine)
    assert sorted(remove_stale_parts(tmp_path)) == sorted([*stale, folder])
    assert sorted(tmp_path.iterdir()) == sorted([mine, elsewhere, link, *others])
    assert remove_stale_parts(tmp_path / "none") == []


# -- two processes, one folder ------------------------------------------------------------------------------------


def test_two_runs_into_one_folder_lose_no_entry(tmp_path: Path) -> None:
    out = tmp_path / "out"
    first, second = (
        [ct(tmp_path / f"{name}.nii.gz") for name in "ab"],
        [ct(tmp_path / f"{name}.nii.gz") for name in "cd"],
    )

    def other_run(entry: dict[str, object]) -> None:
        if entry["name"] == "a":
            segment_folder(segmenter(), second, out, ["liver"])

    segment_folder(segmenter(), first, out, ["liver"], on_done=other_run)
    names = [entry["name"] for entry in json.loads((out / "report.json").read_text())["studies"]]
    assert sorted(names) == ["a", "b", "c", "d"]
    assert len(list(out.glob("*_liver.nii.gz"))) == 4


def add_entries(path: Path, letter: str) -> None:
    report = Report(path)
    for i in range(20):
        report.add(f"{letter}{i}", {"name": f"{letter}{i}"})


def test_entries_of_many_processes_are_merged(tmp_path: Path) -> None:
    path, context = tmp_path / "report.json", multiprocessing.get_context("fork")
    running = [context.Process(target=add_entries, args=(path, letter)) for letter in "abc"]
    for process in running:
        process.start()
    for process in running:
        process.join(60)
        assert process.exitcode == 0
    assert len(Report(path).entries) == 60 and [entry.name for entry in tmp_path.iterdir()] == ["report.json"]


def test_a_scan_that_another_process_finished_meanwhile_is_skipped(tmp_path: Path) -> None:
    out, scans = tmp_path / "out", [ct(tmp_path / f"{name}.nii.gz") for name in "ab"]

    def other_run(entry: dict[str, object]) -> None:
        if entry["name"] == "a":
            segment_folder(segmenter(), scans[1:], out, ["liver"])

    entries = segment_folder(segmenter(), scans, out, ["liver"], resume=True, on_done=other_run)
    assert [entry.get("skipped", False) for entry in entries] == [False, True]


def test_masks_of_another_scan_are_not_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    one, two = ct(tmp_path / "1" / "ct.nii.gz"), tmp_path / "2" / "ct.nii.gz"
    ct(two.with_name("other.nii.gz")).rename(two)
    segment_folder(segmenter(), [one], out, ["liver"])
    before = (out / "ct_liver.nii.gz").read_bytes()
    with pytest.raises(InputError, match="no report here says that it is a mask of this scan"):
        segment_folder(segmenter(), [two], out, ["liver"])
    assert (out / "ct_liver.nii.gz").read_bytes() == before
    segment_folder(segmenter(), [one], out, ["liver"])  # the same scan again
    segment_folder(segmenter(), [two], out, ["liver"], overwrite=True)
    (out / "ct_spleen.nii.gz").write_bytes(b"somebody's own")
    with pytest.raises(InputError, match="no report here says that it is a mask of this scan"):
        segment_folder(segmenter(), [two], out, ["spleen"])
    assert (out / "ct_spleen.nii.gz").read_bytes() == b"somebody's own"


def test_a_map_of_other_structures_is_not_replaced(tmp_path: Path) -> None:
    """It was, and the structures that only the earlier map held were lost without a word."""
    out, scan = tmp_path / "out", ct(tmp_path / "ct.nii.gz")
    segment_folder(segmenter(), [scan], out, ["liver"], multilabel=True)
    before = (out / "ct.nii.gz").read_bytes()
    for prompts in (["spleen"], ["liver", "spleen"]):
        with pytest.raises(
            InputError, match="there already, with other structures: liver\n  in: .*ct.nii.gz\n.*--overw"
        ):
            segment_folder(segmenter(), [scan], out, prompts, multilabel=True)
    assert (out / "ct.nii.gz").read_bytes() == before
    segment_folder(segmenter(), [scan], out, ["hepar"], multilabel=True)  # the same structure by another word
    segment_folder(segmenter(), [scan], out, ["spleen"])  # files of their own stand beside the map
    (entry,) = segment_folder(segmenter(), [scan], out, ["spleen"], multilabel=True, overwrite=True)
    assert entry["status"] == "done" and (out / "ct.nii.gz").read_bytes() != before
    damaged = {**entry, "structures": [{"name": ["spleen"]}]}  # a report that somebody else has written
    (out / "report.json").write_text(json.dumps({"studies": [damaged]}))
    with pytest.raises(InputError, match="with other structures"):
        segment_folder(segmenter(), [scan], out, ["spleen"], multilabel=True)


def test_masks_that_another_run_makes_meanwhile_are_not_replaced(tmp_path: Path) -> None:
    """Both runs began with an empty folder, so that neither met the other's masks at its start."""
    out, scans = tmp_path / "out", [ct(tmp_path / f"{name}.nii.gz") for name in "abcd"]
    others = [ct(tmp_path / "2" / f"{name}.nii.gz") for name in "abcd"]
    np.copyto(hu := np.asanyarray(nib.load(others[3]).dataobj).copy(), 7)
    nib.save(nib.Nifti1Image(hu, np.diag([2.0, 2, 2, 1])), others[3])

    def other_run(entry: dict[str, object]) -> None:
        if entry["name"] == "a":
            segment_folder(segmenter(), others[3:], out, ["liver"])

    with pytest.raises(InputError, match="another run has meanwhile written other masks of 'd'"):
        segment_folder(segmenter(), scans, out, ["liver"], on_done=other_run)
    (entry,) = [entry for entry in read_report(out / "report.json").values() if entry["name"] == "d"]
    assert entry["status"] == "done" and changed_masks(entry, out) == []
    assert entry["scan"] == scan_identity(others[3]) and not [p for p in out.iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize(
    ("one", "other", "is_refused"),
    [
        ({"statistics": True, "files": ["preview"]}, {}, False),  # what lies beside the masks changes none of them
        ({"prompts": ["liver", "spleen"]}, {}, False),
        ({"multilabel": True}, {"multilabel": True}, False),
        ({"multilabel": True, "prompts": ["spleen"]}, {"multilabel": True}, True),  # the map would lose the liver
    ],
)
def test_equal_masks_that_another_run_makes_meanwhile_are_replaced(
    tmp_path: Path, one: dict[str, Any], other: dict[str, Any], is_refused: bool
) -> None:
    out, scans = tmp_path / "out", [ct(tmp_path / f"{name}.nii.gz") for name in "abcd"]

    def run(scans: list[Path], *, prompts: Sequence[str] = ("liver",), **options: Any) -> list[dict[str, Any]]:
        return segment_folder(segmenter(), scans, out, prompts, **options)

    def other_run(entry: dict[str, Any]) -> None:
        if entry["name"] == "a":
            run(scans[3:], **other)

    with pytest.raises(InputError, match="other masks of 'd'") if is_refused else contextlib.nullcontext():
        assert [entry["status"] for entry in run(scans, on_done=other_run, **one)] == ["done"] * 4


def test_two_runs_do_not_write_one_mask_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has written its masks before the other has an entry, where nothing keeps them apart."""
    out, one, two = tmp_path / "out", ct(tmp_path / "1" / "a.nii.gz"), tmp_path / "2" / "a.nii.gz"
    ct(two.with_name("other.nii.gz")).rename(two)
    out.mkdir()
    (out / ".b.writing").touch()  # as a run leaves it that was killed
    write, both = StudyRun.write, threading.Barrier(2)

    def write_and_wait(run: StudyRun) -> None:
        write(run)
        with contextlib.suppress(threading.BrokenBarrierError):
            both.wait(1)

    monkeypatch.setattr(StudyRun, "write", write_and_wait)
    with ThreadPoolExecutor() as threads:
        runs = {scan: threads.submit(segment_folder, segmenter(), [scan], out, ["liver"]) for scan in (one, two)}
    refused = [scan for scan, run in runs.items() if isinstance(run.exception(), InputError)]
    (entry,) = read_report(out / "report.json").values()
    assert len(refused) == 1 and entry["scan"] == scan_identity(two if refused == [one] else one)
    assert changed_masks(entry, out) == []
    assert sorted(path.name for path in out.iterdir()) == ["a_liver.nii.gz", "report.json"]


# -- killed at random times ---------------------------------------------------------------------------------------


def test_no_run_replaces_the_table_of_one_that_measured_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that had read the report, and was slow to write its table, took the rows of a later run out of it."""
    scans, out, real = [ct(tmp_path / f"{name}.nii.gz") for name in "ab"], tmp_path / "out", folder.write_table
    later = threading.Thread(target=lambda: segment_folder(segmenter(), scans[1:], out, ["liver"], statistics=True))

    def slow(path: Path, names: list[str]) -> None:
        if names == ["a_statistics.json"]:
            later.start()
            later.join(3.0)  # it waits for this run, or has ended
        real(path, names)

    monkeypatch.setattr(folder, "write_table", slow)
    segment_folder(segmenter(), scans[:1], out, ["liver"], statistics=True)
    later.join()
    rows = (out / "statistics.csv").read_text().splitlines()[1:]
    assert [row.split(",")[0] for row in rows] == ["a", "b"] and not list(out.glob(".*"))


def kill(kind: str, kills: int, *arguments: Path) -> None:
    script = Path(__file__).with_name("killed_runs.py")
    done = subprocess.run(
        [sys.executable, str(script), kind, str(kills), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


KILLS = [pytest.param(5, marks=pytest.mark.wide), pytest.param(20, marks=pytest.mark.long)]


@pytest.mark.parametrize("kills", KILLS)
@pytest.mark.timeout(600)
def test_a_folder_run_killed_at_random_times(tmp_path: Path, kills: int) -> None:
    from small_models import liver_and_spleen

    liver_and_spleen().save_pretrained(tmp_path / "model")
    MoMEProcessor(spacing=[4, 4, 4]).save_pretrained(tmp_path / "model")
    rng = np.random.default_rng(1)
    for i in range(6):
        hu = rng.normal(0, 80, (40, 44, 40)).astype(np.int16)
        ct(tmp_path / "scans" / f"s{i}.nii.gz")
        nib.save(nib.Nifti1Image(hu, np.diag([3.0, 3, 3, 1])), tmp_path / "scans" / f"s{i}.nii.gz")
    kill("segment", kills, tmp_path)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    names = sorted(path.name for path in whole.iterdir())
    assert sorted(path.name for path in broken.iterdir()) == names and len(names) == 13
    for name in names:
        if name != "report.json":
            assert (whole / name).read_bytes() == (broken / name).read_bytes(), name
    studies = json.loads((broken / "report.json").read_text())["studies"]
    assert sorted(study["name"] for study in studies) == [f"s{i}" for i in range(6)]


@pytest.mark.parametrize("kills", KILLS)
@pytest.mark.timeout(600)
def test_a_training_killed_at_random_times(tmp_path: Path, kills: int) -> None:
    write_recipe(tmp_path)
    kill("train", kills, tmp_path)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert losses(broken) == losses(whole) and len(losses(whole)) == 16
    weights = [(run / "model" / "model.safetensors").read_bytes() for run in (whole, broken)]
    assert weights[0] == weights[1]
    assert not list(broken.rglob("*.part*")) and len(list((broken / "checkpoints").iterdir())) == 2
