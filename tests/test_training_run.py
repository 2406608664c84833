"""Training runs: killed and resumed, launched by accelerate, refused, and on a full disk."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from training_runs import RECIPE, command, losses, write_recipe

from mome.errors import InputError, OutputError
from mome.training import checkpoint
from mome.training.checkpoint import TrainingState, latest_checkpoint, save_checkpoint
from mome.training.config import SourceConfig
from mome.training.config_file import load_run_config
from mome.training.loop import train
from mome.training.run_settings import check_same_run, save_run_settings


@pytest.mark.wide
def test_a_killed_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    subprocess.run(command(recipe, f"train.out={whole}"), check=True, capture_output=True)
    victim = subprocess.Popen(
        command(recipe, f"train.out={broken}"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and victim.poll() is None:
        if (broken / "log.jsonl").is_file() and len((broken / "log.jsonl").read_text().splitlines()) >= 5:
            os.kill(victim.pid, signal.SIGKILL)
            break
        time.sleep(0.002)
    victim.wait()
    assert victim.returncode == -signal.SIGKILL and not (broken / "model").exists()
    subprocess.run(command(recipe, f"train.out={broken}"), check=True, capture_output=True)
    assert losses(broken) == losses(whole) and sorted(losses(whole)) == list(range(1, 13))
    weights = [(run / "model" / "model.safetensors").read_bytes() for run in (whole, broken)]
    assert weights[0] == weights[1]
    assert len(list((broken / "checkpoints").iterdir())) <= 2


def test_accelerate_launch_with_overrides(tmp_path: Path) -> None:
    """The command of the README, its experts swapped and its steps set from the command line."""
    recipe = write_recipe(tmp_path)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    done = subprocess.run(
        [
            *launch,
            *command(recipe, "experts=swiglu(n=8)", "train.steps=2", f"train.out={tmp_path / 'r'}")[1:],
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    config = json.loads((tmp_path / "r" / "model" / "config.json").read_text())
    assert config["experts"]["n"] == 8 and sorted(losses(tmp_path / "r")) == [1, 2]


def test_a_folder_with_another_run_is_refused(tmp_path: Path) -> None:
    recipe = tmp_path / "run.yaml"
    recipe.write_text(RECIPE.format(root=tmp_path))
    check_same_run(tmp_path / "r", load_run_config(recipe, []))
    save_run_settings(tmp_path / "r", load_run_config(recipe, []))
    check_same_run(tmp_path / "r", load_run_config(recipe, ["train.threads=2", "train.out=elsewhere"]))
    for override, key in (("train.seed=3", "train.seed"), ("experts=linear", "model.experts"), ("loss=x", "loss")):
        with pytest.raises(InputError, match=f"another '{key}'") as caught:
            check_same_run(tmp_path / "r", load_run_config(recipe, [override]))
        assert len(str(caught.value).splitlines()) <= 3
    # A run that an earlier release began has the defaults of settings that are new.
    file = tmp_path / "r" / "run.json"
    settings = json.loads(file.read_text())
    del settings["sampling"]["cut"]
    file.write_text(json.dumps(settings))
    check_same_run(tmp_path / "r", load_run_config(recipe, []))
    with pytest.raises(InputError, match=r"another 'sampling\.cut'"):
        check_same_run(tmp_path / "r", load_run_config(recipe, ["sampling.cut=0.4"]))


def test_a_run_does_not_go_on_with_other_cases(tmp_path: Path) -> None:
    recipe, out = write_recipe(tmp_path), tmp_path / "r"
    few = ["train.steps=2", "train.checkpoint_every=1", f"train.out={out}"]
    train(load_run_config(recipe, few))
    train(load_run_config(recipe, few))  # the same cases
    scans = sorted(tmp_path.rglob("c0.nii.gz"))
    assert len(scans) == 2, scans
    for path in scans:  # another scan and another label map under the name of the first case
        path.write_bytes(path.with_name("c1.nii.gz").read_bytes())
    with pytest.raises(InputError, match="the training cases have changed") as caught:
        train(load_run_config(recipe, few))
    assert len(str(caught.value).splitlines()) == 3
    train(load_run_config(recipe, few), resume=False)


def test_labels_of_a_source_that_is_never_drawn_are_not_trained(tmp_path: Path, capsys) -> None:
    recipe = write_recipe(tmp_path)
    run = load_run_config(recipe, ["train.steps=1", f"train.out={tmp_path / 'r'}"])
    never = SourceConfig(kind="phantom", count=1, weight=0.0)
    model = train(dataclasses.replace(run, labels=[*run.labels, "spinal_cord"], sources=[*run.sources, never]))
    assert "no training case annotates spinal_cord" in capsys.readouterr().out
    assert "spinal_cord" not in json.loads((model / "config.json").read_text())["trained_labels"]


@pytest.mark.parametrize("override", ["loss=bce_dicee", "sources=[{kind: cases, folder: /none, dataset: openkbp}]"])
def test_a_run_that_cannot_start_leaves_nothing_behind(tmp_path: Path, override: str) -> None:
    recipe = write_recipe(tmp_path)
    with pytest.raises(InputError):
        train(load_run_config(recipe, [override, f"train.out={tmp_path / 'r'}"]))
    assert not list(tmp_path.glob("r/*.json*"))


def test_a_full_disk_leaves_the_earlier_state(tmp_path: Path, monkeypatch) -> None:
    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(torch.nn.Linear(2, 2))
    state = TrainingState(accelerator, model, accelerator.prepare(torch.optim.AdamW(model.parameters())))
    save_checkpoint(state, tmp_path, 1, keep=1)

    def full(path: Path, *arguments: object) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_tensors", full)
    with pytest.raises(OutputError, match="the training state could not be written: No space left") as caught:
        save_checkpoint(state, tmp_path, 2, keep=1)
    assert len(str(caught.value).splitlines()) == 3 and model is not None
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]
    assert latest_checkpoint(tmp_path) == (tmp_path / "step_00000001", 1)
