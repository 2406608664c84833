"""Runs in a hostile world: foreign and damaged run folders, losses that are not finite, full disks and locks."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import pickle
import resource
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from hostile_helpers import SHORT, ct, ended_process, segmenter, train_in
from safetensors.torch import load_file, save_file
from training_runs import losses, write_recipe

from mome.folder_lock import folder_lock
from mome.inference import segment_folder
from mome.training.config_file import load_run_config
from mome.training.loop import LossNotFinite, train
from mome.training.progress import StepLog, StepReporter


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
        '{"format": 1}',
        "[" * 100_000,
        '{"format": 2, "step": 4, "processes": [], "sha256": 3}',
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


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path, capsys) -> None:
    """The loss of the last step is that of the weights before it."""
    write_recipe(tmp_path)
    wild = ("train.weight_decay=1e29", "train.learning_rate=1e20", "train.steps=1", "train.ema=0")
    printed = train_in(tmp_path, capsys, 2, "the weights are not finite after step 1", *SHORT, *wild)
    assert "the step's cases are c" in printed
    assert sorted(path.name for path in (tmp_path / "r").iterdir()) == ["log.jsonl", "run.json", "validation.jsonl"]


@pytest.mark.parametrize("setting", ["learning_rate", "weight_decay"])
def test_a_rate_that_float32_cannot_hold(tmp_path: Path, capsys, setting: str) -> None:
    write_recipe(tmp_path)
    train_in(tmp_path, capsys, 2, f"train.{setting} is", *SHORT, f"train.{setting}=3e38")
