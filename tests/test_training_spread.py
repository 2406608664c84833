"""Training with a model that is spread over the processes of a run, beside one process with the same batch."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import transformers
from safetensors.torch import load_file
from training_runs import command, losses, write_recipe

from mome.errors import InputError
from mome.training.config import DistributedSettings
from mome.training.config_file import load_run_config
from mome.training.find_batch import find_batch_size
from mome.training.launch import build_accelerator
from mome.training.setup import build_model
from mome.training.spread import check_spread

OLD = tuple(int(part) for part in transformers.__version__.split(".")[:2]) < (5, 23)
needs_dispatch = pytest.mark.skipif(OLD, reason="transformers before 5.23 spreads no other models")
STEPS = [
    "experts=swiglu(n=4, hidden=8)",
    "train.steps=20", "train.validate_every=10", "train.checkpoint_every=10", "train.learning_rate=0.003", "head=plain",
    "router=topk(k=2, balance_weight=0.01)", "train.gradient_accumulation=1",
]  # fmt: skip
PATCHES = 4  # of one step, over all processes


def train(recipe: Path, name: str, processes: int, *overrides: str) -> str:
    """Trains in the folder `name` beside the recipe; returns what was printed."""
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--standalone"]
    settings = [f"train.out={recipe.parent / name}", f"train.batch_size={PATCHES // processes}", *STEPS, *overrides]
    done = subprocess.run(
        [sys.executable, *(launcher if processes > 1 else []), *command(recipe, *settings)[1:]],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe, with a run of one process beside it."""
    recipe = write_recipe(tmp_path_factory.mktemp("spread"))
    train(recipe, "one", 1)
    return recipe


def tensors_of(run: Path) -> dict[str, dict]:
    """All tensors that a run has saved, by file."""
    files = [path for path in run.rglob("*.safetensors") if not path.name.startswith("random")]
    return {str(path.relative_to(run)): load_file(path) for path in files}


@needs_dispatch
@pytest.mark.wide
@pytest.mark.parametrize(
    "sizes",
    [
        {"fsdp_size": 2},
        {"fsdp_size": 2, "ep_size": 2},
        {"fsdp_size": 4, "ep_size": 2},
        {"fsdp_size": 2, "ep_size": 2, "dp_replicate_size": 2},
    ],
    ids=lambda sizes: "-".join(map(str, sizes.values())),
)
def test_a_spread_run_trains_like_one_process(one: Path, sizes: dict[str, int]) -> None:
    name = "-".join(map(str, sizes.values()))
    settings = [f"distributed.{key}={value}" for key, value in sizes.items()]
    processes = sizes["fsdp_size"] * sizes.get("dp_replicate_size", 1)
    assert f"{processes} processes" in train(one, name, processes, *settings)
    whole, spread = losses(one.parent / "one"), losses(one.parent / name)
    assert list(spread) == list(range(1, 21))
    # Rounding grows with every step, because a voxel between two experts may go to either; DDP differs by as much.
    assert max(abs(whole[step] - spread[step]) for step in range(1, 7)) <= 2e-6
    assert max(abs(whole[step] - spread[step]) for step in whole) <= 1e-3
    scores = [json.loads((one.parent / run / "validation.jsonl").read_text().splitlines()[-1]) for run in ("one", name)]
    assert scores[0]["dice/mean"] > 0.05
    assert scores[1] == pytest.approx(scores[0], abs=0.01)
    expected, found = tensors_of(one.parent / "one"), tensors_of(one.parent / name)
    assert expected.keys() == found.keys() and len(found) == 2 + 2 * 3  # model and best, and three files of two states
    for file, tensors in expected.items():
        assert tensors.keys() == found[file].keys()
        for key, tensor in tensors.items():
            difference = (tensor.double() - found[file][key].double()).abs().max().item()
            assert difference <= 1e-2 * max(1.0, tensor.double().abs().max().item()), (file, key)
    assert not [path for path in (one.parent / name).iterdir() if path.name.startswith(".")]


@needs_dispatch
@pytest.mark.wide
def test_a_spread_run_goes_on_bit_for_bit(one: Path) -> None:
    settings = ["distributed.fsdp_size=4", "distributed.ep_size=2"]
    train(one, "whole", 4, *settings)
    shutil.copytree(one.parent / "whole", one.parent / "broken")
    shutil.rmtree(one.parent / "broken" / "checkpoints" / "step_00000020")
    shutil.rmtree(one.parent / "broken" / "model")
    assert "resuming from step 10 of 20" in train(one, "broken", 4, *settings)
    assert losses(one.parent / "broken") == losses(one.parent / "whole")
    whole, broken = (tensors_of(one.parent / run) for run in ("whole", "broken"))
    assert whole.keys() == broken.keys()
    assert all((value == broken[file][key]).all() for file in whole for key, value in whole[file].items())


@needs_dispatch
@pytest.mark.wide
def test_processes_whose_running_statistics_differ_agree_on_the_best_model(one: Path) -> None:
    """Scores of a batch norm's own statistics had one process save a model, which waited for the other."""
    norm = "model.encoder=monai(network='UNet', arguments={'channels': [4, 8], 'strides': [2], 'norm': 'batch'})"
    often = ["train.validate_every=1", "train.checkpoint_every=0", "train.ema=0", "train.learning_rate=0.005"]
    train(one, "norm", 2, "distributed.fsdp_size=2", "distributed.ep_size=2", norm, *often)
    lines = [json.loads(line) for line in (one.parent / "norm" / "validation.jsonl").read_text().splitlines()]
    best = max(lines, key=lambda line: line["dice/mean"])
    assert best["dice/mean"] > 0.05
    record = json.loads((one.parent / "norm" / "best" / "validation.json").read_text())
    assert record["dice/mean"] == best["dice/mean"]


@needs_dispatch
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["lora.rank=2"], r"lora\.rank does not go with a model that is spread"),
        (["train.channels_last=true"], r"train\.channels_last does not go with"),
        (["router=label_group"], "router LabelGroupRouter reads the prompts"),
        (["experts=swiglu(n=3)"], "ep_size=2 does not divide the 3 experts"),
        (["distributed.fsdp_size=4"], "is 4, and this run has 2 processes"),
    ],
)
def test_what_cannot_be_spread_is_refused_before_data_are_read(
    overrides: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(tmp_path)
    run = load_run_config(
        recipe,
        [*STEPS, "distributed.fsdp_size=2", "distributed.ep_size=2", f"train.out={tmp_path / 'run'}", *overrides],
    )
    accelerator, (model, _) = build_accelerator(run.train), build_model(run)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match=message) as caught:
        check_spread(run, model, accelerator)
    assert len(str(caught.value).splitlines()) == 3
    assert not (tmp_path / "run").exists() and not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"ep_size": 2}, r"ep_size=2 is no divisor of distributed\.fsdp_size=1"),
        ({"fsdp_size": 6, "ep_size": 4}, "no divisor"),
        ({"dp_replicate_size": 2}, "copies a model that is not sharded"),
        ({"fsdp_size": 0}, "fsdp_size"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        DistributedSettings(**sizes)


def test_find_batch_measures_no_spread_model(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    sizes = ["distributed.fsdp_size=2", "distributed.dp_replicate_size=2"]
    with pytest.raises(InputError, match="one process, which holds the whole model") as caught:
        find_batch_size(load_run_config(recipe, sizes))
    remedy = (caught.value.hint or "").partition(" finds")[0].split()
    assert not load_run_config(recipe, [*sizes, *remedy]).distributed.spreads
