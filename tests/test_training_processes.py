"""Training with several processes: the losses of one, launchers, and a process that is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import training_double
from training_runs import REPOSITORY, command, losses, write_recipe

from mome.errors import InputError
from mome.training.launch import ProcessLost, check_launch, other_processes_live
from mome.yaml_file import read_yaml

CONFIGS = REPOSITORY / "examples/configs/accelerate"
STEPS = ["train.steps=20", "train.validate_every=10", "train.gradient_accumulation=1"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def run_double(recipe: Path, name: str, processes: int, *overrides: str, wait: bool = True) -> subprocess.Popen:
    """Trains in float64 with a batch of two over all processes; the records lie beside the run."""
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"] if processes == 2 else []
    folder = recipe.parent
    settings = [f"train.out={folder / name}", f"train.batch_size={2 // processes}", *STEPS, *overrides]
    program = [sys.executable, *launcher, training_double.__file__, str(folder / f"{name}-records")]
    started = subprocess.Popen(
        [*program, "--config", str(recipe), *settings],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=ENVIRONMENT,
    )
    if wait:
        printed = finished(started)
        assert started.returncode == 0, printed[-3000:]
    return started


def finished(started: subprocess.Popen) -> str:
    """Waits until a run has ended, and returns what it printed; ends a run that hangs."""
    try:
        return started.communicate(timeout=90)[0]
    except subprocess.TimeoutExpired:
        started.terminate()  # torchrun ends its processes
        raise


def validated(recipe: Path, name: str) -> list[str]:
    """The digests of all validated volumes, sorted."""
    files = (recipe.parent / f"{name}-records").glob("*.validated")
    return sorted(line for file in files for line in file.read_text().splitlines())


@pytest.mark.wide
@pytest.mark.parametrize("router", ["topk(k=1)", "topk(k=2, balance_weight=0.01, z_weight=0.001)"])
def test_two_processes_train_like_one(tmp_path: Path, router: str) -> None:
    recipe = write_recipe(tmp_path)
    for processes, name in ((1, "one"), (2, "two")):
        run_double(recipe, name, processes, f"router={router}")
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert list(one) == list(two) == list(range(1, 21))
    assert max(abs(one[step] - two[step]) for step in one) <= 1e-8
    scores = [(tmp_path / name / "validation.jsonl").read_text() for name in ("one", "two")]
    assert scores[0] == scores[1] and len(scores[0].splitlines()) == 2
    # three patients, each of them once in both validations, whichever process has it
    alone, shared = validated(recipe, "one"), validated(recipe, "two")
    assert alone == shared and len(alone) == 6 and len(set(alone)) == 3
    assert all((tmp_path / "two-records" / f"{rank}.validated").read_text() for rank in range(2))


@pytest.mark.wide
def test_a_killed_process_ends_the_run_which_then_goes_on_bit_for_bit(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    run_double(recipe, "whole", 2)
    broken = run_double(recipe, "broken", 2, wait=False)
    log, deadline = tmp_path / "broken" / "log.jsonl", time.monotonic() + 120
    while time.monotonic() < deadline and (not log.is_file() or len(log.read_text().splitlines()) < 8):
        time.sleep(0.005)
    os.kill(int((tmp_path / "broken-records" / "1.pid").read_text()), signal.SIGKILL)
    printed = finished(broken)
    assert broken.returncode != 0 and not (tmp_path / "broken" / "model").exists()
    said = [line for line in printed.splitlines() if "another process of this run has ended" in line]
    assert said or "stopped by SIGTERM" in printed, printed[-3000:]
    assert "Signal 9 (SIGKILL)" in printed
    run_double(recipe, "broken", 2)
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")
    weights = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("whole", "broken")]
    assert weights[0] == weights[1]


@pytest.mark.wide
def test_the_configuration_for_two_processes_starts_two(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    launch = [sys.executable, "-m", "accelerate.commands.launch"]
    settings = ["train.steps=2", "train.validate_every=0", "train.checkpoint_every=1"]
    for options, name in ((["--config_file", str(CONFIGS / "two_cpu_processes.yaml")], "two"),
                          (["--cpu", "--num_processes", "2"], "refused")):  # fmt: skip
        done = subprocess.run(
            [*launch, *options, *command(recipe, *settings, f"train.out={tmp_path / name}", "train.cpu=true")[1:]],
            capture_output=True,
            text=True,
            check=False,
            env=ENVIRONMENT,
        )
        if name == "two":
            assert done.returncode == 0, done.stderr[-2000:]
            assert "training with 2 processes on cpu, joined by gloo" in done.stdout
            state = json.loads((tmp_path / "two/checkpoints/step_00000002/state.json").read_text())
            assert state["processes"] == 2 and state["samples"] == 16
        else:
            assert done.returncode and not (tmp_path / name).exists()
            assert "was asked for several processes and has started one" in done.stderr


def test_a_launch_that_starts_too_few_processes_is_refused() -> None:
    by_accelerate = {"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    with pytest.raises(InputError, match="has started one") as caught:
        check_launch(by_accelerate)
    assert len(str(caught.value).splitlines()) == 3 and "two_cpu_processes.yaml" in str(caught.value)
    for good in ({}, {"ACCELERATE_MIXED_PRECISION": "no"}, {"MASTER_PORT": "1"}, {**by_accelerate, "WORLD_SIZE": "2"},
                 {**by_accelerate, "OMPI_COMM_WORLD_SIZE": "2"}):  # fmt: skip
        check_launch(good)


def test_a_lost_connection_is_told_from_other_errors(tmp_path: Path) -> None:
    class Two:
        num_processes, process_index = 2, 0

    with pytest.raises(ProcessLost, match="process 0 of 2 stops: another process") as caught:
        with other_processes_live(Two(), tmp_path):
            raise RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:5123")
    assert len(str(caught.value).splitlines()) == 3
    with pytest.raises(RuntimeError, match="shapes"):
        with other_processes_live(Two(), tmp_path):
            raise RuntimeError("shapes do not fit")
    with pytest.raises(ProcessLost), other_processes_live(Two(), tmp_path):
        raise torch.distributed.DistBackendError("NCCL error: remote process exited")
    Two.num_processes = 1
    with pytest.raises(RuntimeError, match="closed by peer"), other_processes_live(Two(), tmp_path):
        raise RuntimeError("Connection closed by peer")


def test_the_configurations_for_accelerate_can_be_read() -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    wanted = {"one_gpu": (1, 1), "eight_gpus": (8, 1), "two_nodes": (16, 2), "two_cpu_processes": (2, 1)}
    assert {path.stem for path in CONFIGS.iterdir()} == set(wanted)
    for name, counts in wanted.items():
        path = CONFIGS / f"{name}.yaml"
        config = load_config_from_file(str(path))
        assert (config.num_processes, config.num_machines) == counts
        several = counts[0] > 1
        assert str(read_yaml(path.read_text())["distributed_type"]) == ("MULTI_GPU" if several else "NO")
