"""Options of the loop: best model, early stop, layer-wise decay, trackers, profile, batch finder, lack of memory."""

from __future__ import annotations

import errno
import json
import os
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import LoggerType
from tiny_parts import make_model
from torch import nn
from training_runs import losses, write_recipe

from mome import MoME
from mome.cli.train import main
from mome.errors import InputError, OutputError
from mome.training import find_batch, launch, loop, trackers
from mome.training.config import RunConfig, TrainConfig
from mome.training.config_file import load_run_config
from mome.training.find_batch import find_batch_size
from mome.training.launch import build_accelerator
from mome.training.optimizer import build_optimizer, layer_factors, set_learning_rate
from mome.training.out_of_memory import StepOutOfMemory, remedies, says_what_to_lower
from mome.training.profiling import StepProfiler
from mome.training.run_settings import _fixed_settings, check_same_run, tracker_settings
from mome.training.setup import build_model
from mome.training.trackers import missing_note, tracker_to_use


def run_of(folder: Path, *overrides: str):
    return load_run_config(write_recipe(folder), [f"train.out={folder / 'r'}", *overrides])


# -- the best model and an early end -------------------------------------------------------------------------


def scripted(monkeypatch, scores: list[float]) -> list[dict[str, torch.Tensor]]:
    """Lets validations return these scores in turn; returns the weights that each of them saw."""
    seen: list[dict[str, torch.Tensor]] = []

    def validate(model: MoME, *arguments: object) -> dict[str, float]:
        seen.append({name: value.clone() for name, value in model.state_dict().items()})
        return {"dice/mean": scores[len(seen) - 1]}

    monkeypatch.setattr(loop, "validate", validate)
    return seen


def test_the_best_model_is_kept_and_the_training_ends_early(tmp_path: Path, monkeypatch, capsys) -> None:
    run = run_of(tmp_path, "train.steps=12", "train.validate_every=2", "train.patience=2", "train.channels_last=true")
    seen = scripted(monkeypatch, [0.1, 0.3, float("nan"), 0.3, 0.9, 0.9])
    folder = loop.train(run)
    assert len(seen) == 4 and sorted(losses(tmp_path / "r")) == list(range(1, 9))  # two without improvement after 4
    best, last = (MoME.from_pretrained(tmp_path / "r" / name).state_dict() for name in ("best", "model"))
    assert all(torch.equal(best[name], value) for name, value in seen[1].items())
    assert all(torch.equal(last[name], value) for name, value in seen[3].items()) and folder.name == "model"
    lines = [json.loads(line) for line in (tmp_path / "r" / "validation.jsonl").read_text().splitlines()]
    assert [(line["step"], line["dice/mean"]) for line in lines] == [(2, 0.1), (4, 0.3), (6, None), (8, 0.3)]
    printed = capsys.readouterr().out
    assert "2 validations without an improvement" in printed and "mean Dice 0.300 after 4 steps" in printed
    # The same command finds the run ended, and a larger patience goes on with it.
    before = losses(tmp_path / "r")
    loop.train(run)
    assert losses(tmp_path / "r") == before and len(seen) == 4
    options = ["train.steps=12", "train.validate_every=2", "train.patience=3", "train.channels_last=true"]
    loop.train(load_run_config(tmp_path / "run.yaml", [f"train.out={tmp_path / 'r'}", *options]))
    assert sorted(losses(tmp_path / "r")) == list(range(1, 13)) and len(seen) == 6


def test_a_run_of_an_earlier_release_goes_on(tmp_path: Path) -> None:
    run = run_of(tmp_path)
    (tmp_path / "r").mkdir()
    stored = _fixed_settings(run)
    del stored["train"]["layer_decay"], stored["lora"], stored["sources"][0]["layout"], stored["sources"][0]["real"]
    (tmp_path / "r" / "run.json").write_text(json.dumps(stored))
    check_same_run(tmp_path / "r", run)
    with pytest.raises(InputError, match="another 'train.layer_decay'"):
        check_same_run(tmp_path / "r", load_run_config(tmp_path / "run.yaml", ["train.layer_decay=0.5"]))
    other = f"sources=[{{kind: cases, folder: {tmp_path}/data, dataset: openkbp, part: train}}]"
    with pytest.raises(InputError, match="another 'sources'"):
        check_same_run(tmp_path / "r", load_run_config(tmp_path / "run.yaml", [other]))
    stored["train"]["of another release"] = None
    (tmp_path / "r" / "run.json").write_text(json.dumps(stored))
    with pytest.raises(InputError, match="another 'train.of another release'"):
        check_same_run(tmp_path / "r", run)


# -- the optimiser -------------------------------------------------------------------------------------------


class Stages(nn.Module):
    """A model whose encoder has a list of two layers and one behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Module()
        self.encoder.stages = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
        self.encoder.decoder = nn.Linear(2, 2)
        self.encoder.token = nn.Parameter(torch.zeros(3))
        self.head = nn.Linear(2, 2)


def test_layers_of_the_encoder_have_their_learning_rates() -> None:
    model = Stages()
    optimizer = build_optimizer(model, TrainConfig(layer_decay=0.5, weight_decay=0.1))
    set_learning_rate(optimizer, 0.8)
    rates = {p: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    assert len(rates) == 9
    assert rates[model.head.weight] == (0.8, 0.1) and rates[model.head.bias] == (0.8, 0.0)
    assert rates[model.encoder.decoder.weight] == (0.4, 0.1)
    assert rates[model.encoder.stages[1].weight] == (0.2, 0.1) and rates[model.encoder.stages[0].bias] == (0.1, 0.0)
    assert rates[model.encoder.token] == (0.1, 0.0)  # what belongs to no layer comes first
    # Without decay the groups are those of earlier releases, whose training states number the parameters by them.
    plain = build_optimizer(model, TrainConfig())
    assert [len(group["params"]) for group in plain.param_groups] == [4, 5] and not layer_factors(model, 1.0)


@pytest.mark.parametrize("experts", ["linear", "mlp(n=4, hidden=8)", "film(n=4)", "cross_attention(n=4, heads=2)"])
def test_biases_that_are_stacked_by_expert_do_not_decay(experts: str) -> None:
    model = make_model(experts=experts)
    groups = build_optimizer(model, TrainConfig(weight_decay=0.1)).param_groups
    decays = {parameter: group["weight_decay"] for group in groups for parameter in group["params"]}
    stacked = [parameter for name, parameter in model.named_parameters() if "bias" in name and parameter.ndim == 2]
    assert len(stacked) >= 2 and {decays[bias] for bias in stacked} == {0.0}
    assert {decays[p] for p in model.scale_experts.parameters() if p.ndim >= 3} == {0.1}  # weights of experts, kernels


def test_encoders_are_split_into_their_layers(tmp_path: Path) -> None:
    model, _ = build_model(run_of(tmp_path))
    factors = layer_factors(model, 0.5)
    assert set(factors) == set(model.encoder.parameters()) and len(set(factors.values())) >= 3
    first, last = next(iter(model.encoder.parameters())), list(model.encoder.parameters())[-1]
    assert factors[first] < factors[last] == 0.5


# -- trackers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["wandb", "mlflow", "trackio"])
def test_a_tracker_that_is_not_installed_is_refused(tmp_path: Path, name: str, monkeypatch, capsys) -> None:
    monkeypatch.setattr(trackers, "is_installed", lambda package: package != name)
    run_of(tmp_path)
    assert main(["--config", str(tmp_path / "run.yaml"), f"train.tracker={name}", f"train.out={tmp_path / 'r'}"]) == 2
    assert f'pip install "mome[{name}]"' in capsys.readouterr().err and not (tmp_path / "r").exists()


def test_a_tracker_that_accelerate_does_not_take_is_refused(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(trackers, "is_installed", lambda package: True)
    with pytest.raises(InputError, match="cannot be used: Accelerate does not find"):
        build_accelerator(TrainConfig(tracker="wandb", out=str(tmp_path)))


def test_the_default_tracker_may_be_missing(monkeypatch) -> None:
    assert tracker_to_use("none") is None and missing_note("none") is None
    monkeypatch.setattr(trackers, "is_installed", lambda package: False)
    assert tracker_to_use("tensorboard") is None and "mome[train]" in str(missing_note("tensorboard"))


def test_a_tracker_by_name_gets_settings_losses_and_scores(tmp_path: Path, monkeypatch) -> None:
    """A module stands for the package trackio; what Accelerate hands to it is what the server would get."""
    logged: list[dict[str, float]] = []
    started: dict[str, Any] = {}

    class Run:
        def log(self, values: dict[str, float], step: int | None = None, **options: object) -> None:
            logged.append({**values, "step": step})

        def finish(self) -> None:
            started["finished"] = True

    package = ModuleType("trackio")
    package.init = lambda **options: (started.update(options), Run())[1]  # type: ignore[attr-defined]
    package.config = SimpleNamespace(update=lambda values, **options: started.update(config=values))  # type: ignore[attr-defined]
    package.__spec__ = ModuleSpec("trackio", None)
    monkeypatch.setitem(sys.modules, "trackio", package)
    monkeypatch.setattr("accelerate.tracking._available_trackers", [LoggerType.TRACKIO])
    loop.train(
        run_of(tmp_path, "train.tracker=trackio", "train.steps=2", "train.log_every=1", "train.validate_every=2")
    )
    assert started["project"] == "mome" and started["name"] == "r" and started["finished"]
    assert [line["step"] for line in logged if "loss" in line] == [1, 2]
    assert str(tmp_path) not in str(started) + str(logged)  # no path of this machine is sent
    assert any("dice/mean" in line for line in logged) and started["config"]["train.steps"] == 2


# -- memory and time -----------------------------------------------------------------------------------------


def test_lack_of_memory_says_what_to_lower(tmp_path: Path, monkeypatch, capsys) -> None:
    def too_much(*arguments: object) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: 9 bytes")

    monkeypatch.setattr(loop, "optimizer_step", too_much)
    run_of(tmp_path)
    given = ["--config", str(tmp_path / "run.yaml"), f"train.out={tmp_path / 'r'}", "train.batch_size=4"]
    assert main(given) == 2
    lines = capsys.readouterr().err.strip().splitlines()[-3:]
    assert lines[0] == "the memory is not enough for a step of 4 patches of 16×16×16 voxels"
    assert "used by this process" in lines[1]
    assert "train.batch_size=2 train.gradient_accumulation=4; train.gradient_checkpointing=true" in lines[2]
    smallest = TrainConfig(batch_size=1, gradient_checkpointing=True, mixed_precision="bf16")
    assert remedies(smallest) == ["a smaller patch_size=[…]"]
    with pytest.raises(StepOutOfMemory), says_what_to_lower(smallest, [8] * 3, torch.device("cpu")):
        raise torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(RuntimeError, match="shapes"), says_what_to_lower(smallest, [8] * 3, torch.device("cpu")):
        raise RuntimeError("shapes")


def test_lack_of_memory_in_a_validation_is_not_said_to_be_a_steps(tmp_path: Path, monkeypatch, capsys) -> None:
    def too_much(*arguments: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(loop, "validate", too_much)
    run_of(tmp_path)
    given = ["--config", str(tmp_path / "run.yaml"), f"train.out={tmp_path / 'r'}", "train.validate_every=1"]
    assert main(given) == 2
    lines = capsys.readouterr().err.strip().splitlines()[-3:]
    assert lines[0] == "the memory is not enough to segment a whole validation case during training"
    assert "used by this process" in lines[1] and "train.validate_every=0" in lines[2]


def test_trackers_get_no_path_of_this_machine(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "towers" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    given = {
        "text_encoder": "bank(file='/home/a.name/labels.safetensors', width=32)",
        "extra_experts": [{"name": "exported", "file": "relative.pt2", "spacing": [1.5, 1.5, 1.5]}],
        "experts": "swiglu(n=8)",
        "encoder": {"name": "timm", "model": "hf-hub:timm/resnet18"},
        "dim": 8,
    }
    sent = tracker_settings(RunConfig(model=given))
    assert sent["model.text_encoder"] == "bank(file='<path>', width=32)" and "relative" not in str(sent)
    assert sent["model.experts"] == "swiglu(n=8)" and sent["model.dim"] == "8"
    assert "hf-hub:timm/resnet18" in sent["model.encoder"] and "[1.5, 1.5, 1.5]" in sent["model.extra_experts"]
    local = tracker_settings(RunConfig(model={"text_encoder": "hf(model='towers/mine')"}))
    of_hub = tracker_settings(RunConfig(model={"text_encoder": "hf(model='org/tower')"}))
    assert "mine" not in str(local) and "org/tower" in str(of_hub)


def test_a_profile_of_some_steps(tmp_path: Path, capsys) -> None:
    plain = run_of(tmp_path, "train.steps=6", "train.validate_every=0")
    loop.train(plain)
    other = load_run_config(
        tmp_path / "run.yaml", [f"train.out={tmp_path / 'p'}", "train.steps=6", "train.validate_every=0"]
    )
    loop.train(other, profile=2)
    assert losses(tmp_path / "p") == losses(tmp_path / "r")
    table = (tmp_path / "p" / "profile" / "table.txt").read_text()
    assert "conv" in table and "ms of CPU a step" in table and table.splitlines()[1] in capsys.readouterr().out
    assert json.loads((tmp_path / "p" / "profile" / "trace.json").read_text())["traceEvents"]


def test_a_profile_on_the_cpu_of_a_machine_with_a_gpu(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    profiler = StepProfiler(tmp_path, 2, torch.device("cpu"))
    with profiler:
        for _ in range(4):
            torch.ones(64, 64) @ torch.ones(64, 64)
            profiler.step()
    assert "ms of CPU a step" in profiler.table and "aten::mm" in profiler.table


@pytest.mark.parametrize("last", [2, 4])
def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path, monkeypatch, last: int) -> None:
    """Gradients may be infinite in a step whose loss is finite; the next loss would say so, after a checkpoint."""
    real = loop.optimizer_step
    steps = iter(range(1, 5))

    def breaking(accelerator, model, *arguments):
        found = real(accelerator, model, *arguments)
        if next(steps) == last:
            torch.nn.init.constant_(next(model.parameters()), float("inf"))
        return found

    monkeypatch.setattr(loop, "optimizer_step", breaking)
    run = run_of(tmp_path, "train.steps=4", "train.checkpoint_every=2", "train.validate_every=0")
    with pytest.raises(loop.LossNotFinite, match=f"the weights are not finite after step {last} "):
        loop.train(run)
    saved = sorted(path.name for path in (tmp_path / "r").glob("checkpoints/step_*"))
    assert saved == (["step_00000002"] if last == 4 else []) and not (tmp_path / "r" / "model").exists()


def test_the_batch_that_fits(tmp_path: Path, monkeypatch) -> None:
    run = run_of(tmp_path)
    for memory in (2e8, 4e8):
        monkeypatch.setattr(find_batch, "available_bytes", lambda memory=memory: memory)
        found = find_batch_size(run)
        assert found.size > 1 and found.step_bytes <= 0.9 * memory
        assert found.step_bytes * (found.size + 1) / found.size > 0.9 * memory and "estimated" in str(found)
    monkeypatch.setattr(find_batch, "available_bytes", lambda: 1e5)
    with pytest.raises(InputError, match="not enough for one patch of 16×16×16"):
        find_batch_size(run)


def test_the_moving_average_takes_memory_of_the_batch(tmp_path: Path, monkeypatch) -> None:
    without, with_average = run_of(tmp_path / "a", "train.ema=0"), run_of(tmp_path / "b", "train.ema=0.9")
    weights = sum(parameter.numel() for parameter in build_model(without)[0].parameters())
    monkeypatch.setattr(find_batch, "available_bytes", lambda: 2e8)
    plain, averaged = find_batch_size(without), find_batch_size(with_average)
    per_patch = (plain.step_bytes - 16 * weights) / plain.size
    assert averaged.step_bytes == pytest.approx(20 * weights + averaged.size * per_patch)
    started = []
    monkeypatch.setattr(find_batch, "start_average", lambda *given: started.append(given))
    find_batch._two_steps(with_average, 1, torch.device("cpu"))
    assert [given[1:] for given in started] == [(0.9, torch.device("cpu"))]


def test_the_command_prints_the_batch_and_trains_nothing(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(find_batch, "available_bytes", lambda: 2e8)
    given = ["--config", str(write_recipe(tmp_path)), f"train.out={tmp_path / 'r'}"]
    assert main([*given, "--find-batch"]) == 0
    assert capsys.readouterr().out.startswith("train.batch_size=") and not (tmp_path / "r").exists()
    assert main([*given, "--profile", "-1"]) == 2 and "--profile is a number of steps" in capsys.readouterr().err


@pytest.mark.parametrize("most", [0, 1, 5, 6, 31, 4096])
def test_the_search_finds_the_largest_batch(tmp_path: Path, monkeypatch, most: int) -> None:
    """Steps of a GPU that holds `most` patches and a tenth."""
    tried: list[int] = []

    def step(run: object, size: int, device: object) -> float | None:
        tried.append(size)
        return 90.0 * size / max(most, 0.5) if size <= most * 2 else None

    monkeypatch.setattr(find_batch, "_bytes_of_step", step)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (60, 100))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 40)
    assert find_batch._measured(None, torch.device("cuda", 0)).size == most and len(tried) <= 26


def test_a_memory_format_that_gives_wrong_gradients_is_refused(tmp_path: Path, monkeypatch) -> None:
    # an Accelerator of another test would keep its precision
    monkeypatch.setattr(launch, "Accelerator", lambda **_: SimpleNamespace(device=torch.device("cpu"), log_with=[]))
    config = run_of(tmp_path, "train.channels_last=true", "train.mixed_precision=bf16", "train.cpu=true").train
    with pytest.raises(InputError, match="wrong gradients on a CPU"):
        build_accelerator(config)


def test_a_tracker_that_cannot_write_is_named(tmp_path: Path) -> None:
    for number, hint in ((errno.ENOSPC, "free some disk space"), (errno.ECONNREFUSED, "train.tracker=none")):
        with pytest.raises(OutputError, match="the tracker's log could not be written") as caught:
            with trackers.tracker_errors(tmp_path):
                raise OSError(number, os.strerror(number))
        assert str(caught.value).splitlines()[2].startswith(f"  try: {hint}") and str(tmp_path) in str(caught.value)


def test_a_tracker_on_a_full_disk_ends_the_run(tmp_path: Path, monkeypatch) -> None:
    def full(self: object, *values: object, **more: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("accelerate.Accelerator.log", full)
    with pytest.raises(OutputError, match="the tracker's log could not be written"):
        loop.train(run_of(tmp_path, "train.steps=2", "train.log_every=1"))
