"""Runs in a hostile world: foreign and damaged run folders, bad training data, kills, locks and leftovers."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from stand_in_models import Threshold
from training_runs import losses, write_recipe

from mome.cli.train import main as train_main
from mome.errors import InputError
from mome.folder_lock import folder_lock
from mome.inference import Segmenter, segment_folder
from mome.inference.report import Report
from mome.processing import MoMEProcessor
from mome.temporary_names import remove_stale_parts, temporary_path
from mome.training.config_file import load_run_config
from mome.training.loop import LossNotFinite, train
from mome.training.progress import StepLog, StepReporter

SHORT = ("train.steps=4", "train.checkpoint_every=1", "train.validate_every=0", "train.log_every=0")


def train_in(folder: Path, capsys, code: int, words: str, *overrides: str) -> str:
    """Runs `examples/train.py` in this process, checks its code and its message, and returns what it printed."""
    arguments = ["--config", str(folder / "run.yaml"), f"train.out={folder / 'r'}", *overrides]
    assert train_main(arguments) == code
    captured = capsys.readouterr()
    if code:
        lines = captured.err.strip().splitlines()
        assert 1 <= len(lines) <= 3 and "Traceback" not in captured.err and "bug in mome" not in captured.err, captured
    printed = captured.out + captured.err
    assert words in " ".join(printed.split()), printed
    return printed


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A folder with a data set, its recipe, its cache, and a run `r` of four steps with two training states."""
    folder = tmp_path_factory.mktemp("finished")
    train(load_run_config(write_recipe(folder), [*SHORT, f"train.out={folder / 'r'}"]))
    return folder


@pytest.fixture
def run_folder(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, from which the fifth and sixth step can be trained."""
    shutil.copytree(finished / "r", tmp_path / "r")
    text = (finished / "run.yaml").read_text()
    (tmp_path / "run.yaml").write_text(text)
    return tmp_path


def rewrite_sums(state: Path) -> None:
    """Writes the checksums of a changed state, as somebody does who wants it to be loaded."""
    contents = json.loads((state / "state.json").read_text())
    contents["sha256"] = {name: hashlib.sha256((state / name).read_bytes()).hexdigest() for name in contents["sha256"]}
    (state / "state.json").write_text(json.dumps(contents))


# -- training states ----------------------------------------------------------------------------------------------


def test_a_state_has_no_pickle(finished: Path) -> None:
    states = sorted((finished / "r" / "checkpoints").iterdir())
    assert [state.name for state in states] == ["step_00000003", "step_00000004"]
    for state in states:
        names = {path.name for path in state.iterdir()}
        assert names == {
            "state.json", "model.safetensors", "average.safetensors", "optimizer.safetensors", "random_0.safetensors",
        }  # fmt: skip
    contents = json.loads((states[1] / "state.json").read_text())
    assert contents["step"] == 4 and contents["samples"] == 16 and contents["processes"] == 1


class Malice:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return Path.touch, (self.marker,)


def test_a_foreign_run_folder_runs_no_code(run_folder: Path, capsys) -> None:
    marker = run_folder / "hacked"
    state = run_folder / "r" / "checkpoints" / "step_00000004"
    names = ("custom_checkpoint_0.pkl", "random_states_0.pkl", "optimizer.bin", "pytorch_model.bin", "scaler.pt")
    for name in names:
        (state / name).write_bytes(pickle.dumps(Malice(marker)))
        torch.save(Malice(marker), state / f"torch_{name}")
    train_in(run_folder, capsys, 0, "", *SHORT)
    for name in ("state.json", "model.safetensors", "optimizer.safetensors", "average.safetensors"):
        (state / name).unlink()
    train_in(run_folder, capsys, 2, "state.json", *SHORT)
    assert not marker.exists()


@pytest.mark.parametrize("damage", ["truncated", "emptied", "missing", "flipped"])
@pytest.mark.parametrize("name", ["model", "average", "optimizer", "random_0"])
def test_a_damaged_state_is_refused(run_folder: Path, capsys, name: str, damage: str) -> None:
    state = run_folder / "r" / "checkpoints" / "step_00000004"
    path = state / f"{name}.safetensors"
    data = bytearray(path.read_bytes())
    if damage == "flipped":
        data[-5] ^= 1
    path.write_bytes(b"" if damage == "emptied" else data[: len(data) // 2] if damage == "truncated" else data)
    if damage == "missing":
        path.unlink()
    assert str(state) in train_in(run_folder, capsys, 2, f"damaged: {name}.safetensors", *SHORT)
    shutil.rmtree(state)  # as the message advises
    train_in(run_folder, capsys, 0, "resuming from step 3 of 4", *SHORT)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "null",
        "{}",
        '{"format": 2}',
        "[" * 100_000,
        '{"format": 1, "step": 4, "processes": [], "sha256": 3}',
    ],
)
def test_a_state_json_of_another_form(run_folder: Path, capsys, content: str) -> None:
    path = run_folder / "r" / "checkpoints" / "step_00000004" / "state.json"
    path.write_text(content)
    train_in(run_folder, capsys, 2, str(path.parent), *SHORT)


def change(state: Path, name: str, edit) -> None:
    path = state / f"{name}.safetensors"
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = edit(load_file(path))
    save_file(tensors, path, metadata=metadata)
    rewrite_sums(state)


@pytest.mark.parametrize(
    ("name", "edit"),
    [
        ("model", lambda t: dict(list(t.items())[1:])),
        ("model", lambda t: {**t, "other": torch.zeros(1)}),
        ("model", lambda t: {k: v.double() for k, v in t.items()}),
        ("model", lambda t: {k: v.flatten()[:1].clone() for k, v in t.items()}),
        ("average", lambda t: {k: v.int() for k, v in t.items()}),
        ("optimizer", lambda t: {f"9999.{k}": v for k, v in t.items()}),
        ("optimizer", lambda t: {f"x{k}": v for k, v in t.items()}),
        ("optimizer", lambda t: {k: torch.zeros(3, 3, 3) for k in t}),
        ("random_0", lambda t: {k: v for k, v in t.items() if k != "torch"}),
        ("random_0", lambda t: {**t, "torch": torch.zeros(3, dtype=torch.uint8)}),
        ("random_0", lambda t: {**t, "torch": torch.zeros(5000)}),
        ("random_0", lambda t: {**t, "python": torch.zeros(3, dtype=torch.int64)}),
        ("random_0", lambda t: {**t, "python": -torch.ones(625, dtype=torch.int64)}),
        ("random_0", lambda t: {**t, "numpy": torch.zeros(3, dtype=torch.int64)}),
    ],
)
def test_a_state_of_another_model_is_refused(run_folder: Path, capsys, name: str, edit) -> None:
    change(run_folder / "r" / "checkpoints" / "step_00000004", name, edit)
    train_in(run_folder, capsys, 2, f"{name}.safetensors", *SHORT)


def test_folders_that_are_no_states(run_folder: Path, capsys) -> None:
    checkpoints = run_folder / "r" / "checkpoints"
    for name in ("step_abc", "step_", "step_1", "step_-0000001", "step_00000005.old"):
        (checkpoints / name).mkdir()
        train_in(run_folder, capsys, 2, f"{checkpoints / name}", *SHORT)
        (checkpoints / name).rmdir()
    (checkpoints / "step_00000009").symlink_to(checkpoints / "step_00000004")
    train_in(run_folder, capsys, 2, "not a training state", *SHORT)
    (checkpoints / "step_00000009").unlink()
    (checkpoints / "step_00000003").rename(checkpoints / "step_00000007")  # its state.json says 3
    train_in(run_folder, capsys, 2, "", *SHORT)
    (checkpoints / "step_00000007").rename(checkpoints / "step_00000003")
    (checkpoints / "step_notes").write_text("a file is no state")
    (checkpoints / "step_00000005.part").mkdir()
    train_in(run_folder, capsys, 0, "resuming from step 4", *SHORT)
    assert not (checkpoints / "step_00000005.part").exists()


@pytest.mark.parametrize(
    "content", [b"[]", b"null", b"{", b"", b"\xff\xfe{\0}\0", b"[" * 100_000, b'{"labels": 3}', b"{}"]
)
def test_run_settings_of_another_form(run_folder: Path, capsys, content: bytes) -> None:
    (run_folder / "r" / "run.json").write_bytes(content)
    train_in(run_folder, capsys, 2, str(run_folder / "r"), *SHORT)
    train_in(run_folder, capsys, 0, "saved", *SHORT, "--restart")


def test_a_state_of_more_processes_is_refused(run_folder: Path, capsys) -> None:
    path = run_folder / "r" / "checkpoints" / "step_00000004" / "state.json"
    contents = json.loads(path.read_text())
    path.write_text(json.dumps({**contents, "processes": 2, "samples": 32}))
    train_in(run_folder, capsys, 2, "launch as many processes", *SHORT)


def test_a_log_of_another_form_is_cut_not_fatal(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n7\n[]\n{"step": "x"}\n{"step": 2}\n{"step": 3}\n' + "[" * 100_000 + '\n{"st')
    StepLog(path, 2).write(step=3)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]


@pytest.mark.parametrize(
    ("ema", "accumulation"),
    [
        (0.9, 2),
        pytest.param(0.0, 2, marks=pytest.mark.wide),
        pytest.param(0.9, 1, marks=pytest.mark.wide),
        pytest.param(0.0, 1, marks=pytest.mark.wide),
    ],
)
@pytest.mark.parametrize("channels_last", [False, pytest.param(True, marks=pytest.mark.wide)])
def test_a_stopped_run_goes_on_bit_for_bit(
    tmp_path: Path, monkeypatch, ema: float, accumulation: int, channels_last: bool
) -> None:
    recipe = write_recipe(tmp_path)
    settings = [
        f"train.ema={ema}", f"train.gradient_accumulation={accumulation}", "train.steps=6",
        "train.validate_every=0", f"train.channels_last={str(channels_last).lower()}",
    ]  # fmt: skip
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(load_run_config(recipe, [*settings, f"train.out={whole}"]))
    real = StepReporter.step

    def stop(self: StepReporter, done: int, *rest: object) -> None:
        if done == 5:
            raise KeyboardInterrupt
        real(self, done, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(StepReporter, "step", stop)
    with pytest.raises(KeyboardInterrupt):
        train(load_run_config(recipe, [*settings, f"train.out={broken}"]))
    monkeypatch.setattr(StepReporter, "step", real)
    train(load_run_config(recipe, [*settings, f"train.out={broken}"]))
    assert losses(broken) == losses(whole) and len(losses(whole)) == 6
    weights = [(run / "model" / "model.safetensors").read_bytes() for run in (whole, broken)]
    assert weights[0] == weights[1]


def test_a_loss_that_is_not_finite(run_folder: Path, capsys) -> None:
    printed = train_in(run_folder, capsys, 2, "the training diverged", *SHORT, "train.learning_rate=1e30", "--restart")
    assert "the step's cases are c" in printed
    assert str(run_folder / "r") in printed and len([x for x in printed.splitlines() if "try:" in x]) == 1
    assert issubclass(LossNotFinite, FloatingPointError)


def test_a_full_disk_at_a_training_state(run_folder: Path, capsys) -> None:
    """Files of this process may have 6 kB at most, so that the weights of a state cannot be written."""
    checkpoints = run_folder / "r" / "checkpoints"
    shutil.rmtree(checkpoints / "step_00000004")
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6000, hard))
    try:
        printed = train_in(run_folder, capsys, 1, "the training state could not be written", *SHORT)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert str(checkpoints / "step_00000004") in printed and "free some disk space" in printed
    assert [path.name for path in checkpoints.iterdir()] == ["step_00000003"]
    train_in(run_folder, capsys, 0, "resuming from step 3 of 4", *SHORT)


def test_a_folder_that_another_process_trains_in(run_folder: Path, capsys) -> None:
    with folder_lock(run_folder / "r") as free:
        assert free
        before = sorted((run_folder / "r" / "checkpoints").iterdir())
        for more in ((), ("--restart",)):
            train_in(run_folder, capsys, 2, "another process trains in this folder", *SHORT, *more)
        assert sorted((run_folder / "r" / "checkpoints").iterdir()) == before
    train_in(run_folder, capsys, 0, "resuming from step 4", *SHORT)


def test_a_fork_does_not_hold_the_lock(tmp_path: Path) -> None:
    with folder_lock(tmp_path) as free:
        assert free
        worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
        worker.start()
        with folder_lock(tmp_path) as again:
            assert not again
    with folder_lock(tmp_path, wait_s=5) as free:
        assert free
    worker.kill()
    worker.join()


# -- training data ------------------------------------------------------------------------------------------------


def relabel(folder: Path, name: str, edit) -> None:
    path = folder / "data" / "labels" / f"{name}.nii.gz"
    image = nib.load(path)
    nib.save(nib.Nifti1Image(edit(np.asanyarray(image.dataobj)), image.affine), path)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda a: np.full(a.shape, 200, np.uint8), "no structure annotated in case 'c1' has a voxel"),
        (lambda a: np.zeros(a.shape, np.uint8), "no structure annotated in case 'c1' has a voxel"),
        (lambda a: np.full(a.shape, 0.5, np.float32), "c1.nii.gz"),
        (lambda a: np.full(a.shape, np.nan, np.float32), "c1.nii.gz"),
        (lambda a: np.full(a.shape, np.inf, np.float32), "c1.nii.gz"),
        (lambda a: np.full(a.shape, -1, np.int16), "c1.nii.gz"),
        (lambda a: a.astype(np.float32) + 0.3, "c1.nii.gz"),
    ],
)
def test_labels_that_are_none(tmp_path: Path, capsys, edit, words: str) -> None:
    write_recipe(tmp_path)
    relabel(tmp_path, "c1", edit)
    train_in(tmp_path, capsys, 2, words, *SHORT)
    assert not (tmp_path / "r").exists() and not list((tmp_path / "cache").iterdir())


def test_odd_labels_are_named(tmp_path: Path, capsys) -> None:
    write_recipe(tmp_path)
    relabel(tmp_path, "c0", lambda a: (a + 0.0004).astype(np.float32))  # as after a slope
    relabel(tmp_path, "c1", lambda a: np.where(a == 6, 77, a).astype(np.uint8))
    for _ in range(2):  # also when the cache is there already
        printed = train_in(tmp_path, capsys, 0, "77", *SHORT, "--restart")
        assert "'c1'" in printed and "mandible" in printed and "'c0'" not in printed


def test_a_case_without_trained_structures_is_named(tmp_path: Path, capsys) -> None:
    write_recipe(tmp_path)
    listed = {"c0": ["parotid_gland_left"], "c1": [], "c2": ["parotid_gland_left"]}
    (tmp_path / "data" / "cases.json").write_text(json.dumps({k: {"annotated": v} for k, v in listed.items()}))
    printed = train_in(tmp_path, capsys, 0, "case 'c1': none of the trained structures is annotated", *SHORT)
    assert "no training case annotates parotid_gland_right, mandible" in " ".join(printed.split())


@pytest.mark.parametrize("value", [np.nan, 0.0, -1024.0, np.inf])
def test_an_image_that_shows_nothing(tmp_path: Path, capsys, value: float) -> None:
    write_recipe(tmp_path)
    path = tmp_path / "data" / "images" / "c2.nii.gz"
    image = nib.load(path)
    nib.save(nib.Nifti1Image(np.full(image.shape, value, np.float32), image.affine), path)
    assert str(path) in train_in(tmp_path, capsys, 2, "c2", *SHORT)


def test_a_validation_without_a_case(tmp_path: Path, capsys) -> None:
    write_recipe(tmp_path)
    shutil.copytree(tmp_path / "data", tmp_path / "val")
    validation = f"validation=[{{kind: cases, folder: {tmp_path / 'val'}, dataset: openkbp}}]"
    arguments = (*SHORT, validation, "train.validate_every=2")
    for cases, words in (({}, "lists no case"), ({"c0": {"annotated": []}}, "no validation case annotates")):
        (tmp_path / "val" / "cases.json").write_text(json.dumps(cases))
        train_in(tmp_path, capsys, 2, words, *arguments)
    train_in(tmp_path, capsys, 2, "there are no validation cases", *SHORT, "validation=[]", "train.validate_every=2")


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.wide)])
@pytest.mark.parametrize("damage", ["zeroed", "truncated", "missing", "another shape", "no array", "pickle"])
@pytest.mark.parametrize("kind", ["volume", "labels"])
def test_a_damaged_cache_is_noticed(tmp_path: Path, capsys, kind: str, damage: str, workers: int) -> None:
    if workers and kind == "labels":
        pytest.skip("the same path as for volumes")
    write_recipe(tmp_path)
    train_in(tmp_path, capsys, 0, "", *SHORT, "train.steps=1")
    for path in tmp_path.glob(f"cache/*/*.{kind}.npy"):
        array = np.load(path)
        if damage == "missing":
            path.unlink()
        elif damage == "truncated":
            path.write_bytes(path.read_bytes()[:-100])
        elif damage == "no array":
            path.write_bytes(b"nothing")
        elif damage == "pickle":
            np.save(path, np.array([{}], dtype=object), allow_pickle=True)
        else:
            np.save(path, np.zeros_like(array) if damage == "zeroed" else array[:-1])
    printed = train_in(tmp_path, capsys, 2, f".{kind}.npy", *SHORT, f"train.workers={workers}", "--restart")
    assert "remove this folder" in printed
    shutil.rmtree(tmp_path / "cache")
    train_in(tmp_path, capsys, 0, "", *SHORT, "train.steps=1", "--restart")


def test_an_index_of_another_form(tmp_path: Path, capsys) -> None:
    write_recipe(tmp_path)
    train_in(tmp_path, capsys, 0, "", *SHORT, "train.steps=1")
    (path,) = tmp_path.glob("cache/*/index.json")
    whole = json.loads(path.read_text())
    bad: list[object] = [[], None, {}, {"cases": {}}, {"cases": [1]}]
    for key, value in (
        ("file", "../00000"), ("file", 3), ("annotated", "mandible"), ("annotated", ["liver"]), ("shape", [1]),
        ("checksums", None), ("checksums", {}), ("notes", None), ("name", 1),
    ):  # fmt: skip
        bad.append({**whole, "cases": [{**whole["cases"][0], key: value}]})
    for content in bad:
        path.write_text(json.dumps(content))
        assert "index.json" in train_in(tmp_path, capsys, 2, "", *SHORT, "train.steps=1")
    path.write_text(json.dumps(whole)[:-20])
    train_in(tmp_path, capsys, 2, "index.json", *SHORT, "train.steps=1")


# -- leftovers ----------------------------------------------------------------------------------------------------


def ended_process(path: Path) -> Path:
    """A temporary path of a process that has ended."""
    code = (
        "from mome.temporary_names import temporary_path; from pathlib import Path\n"
        f"print(temporary_path(Path({str(path)!r})))"
    )
    return Path(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip())


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


def ct(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    hu = np.random.default_rng(len(path.name)).normal(0, 60, (8, 8, 8)).astype(np.int16)
    nib.save(nib.Nifti1Image(hu, np.diag([2.0, 2, 2, 1])), path)
    return path


def segmenter() -> Segmenter:
    return Segmenter(Threshold(0.5), MoMEProcessor(spacing=[2, 2, 2], hu_window=[-100, 100]))


def test_runs_sweep_the_folder_they_write(tmp_path: Path, run_folder: Path, capsys) -> None:
    out = tmp_path / "out"
    out.mkdir()
    stale = ended_process(out / "a_liver.nii.gz")
    stale.write_text("half")
    segment_folder(segmenter(), [ct(tmp_path / "a.nii.gz")], out, ["liver"])
    assert sorted(path.name for path in out.iterdir()) == ["a_liver.nii.gz", "report.json"]
    stale = ended_process(run_folder / "r" / "model")
    stale.mkdir()
    train_in(run_folder, capsys, 0, "", *SHORT)
    assert not stale.exists()


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
    with pytest.raises(InputError, match="not a mask of this scan"):
        segment_folder(segmenter(), [two], out, ["liver"])
    assert (out / "ct_liver.nii.gz").read_bytes() == before
    segment_folder(segmenter(), [one], out, ["liver"])  # the same scan again
    segment_folder(segmenter(), [two], out, ["liver"], overwrite=True)
    (out / "ct_spleen.nii.gz").write_bytes(b"somebody's own")
    with pytest.raises(InputError, match="not a mask of this scan"):
        segment_folder(segmenter(), [two], out, ["spleen"])
    assert (out / "ct_spleen.nii.gz").read_bytes() == b"somebody's own"


# -- killed at random times ---------------------------------------------------------------------------------------


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
