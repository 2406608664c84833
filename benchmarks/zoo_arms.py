"""The arms of `benchmarks/zoo_runs.py`, the patients they are trained on, and the recipe that they share."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

from mome import MoME
from mome.atomic import atomic_write
from mome.errors import InputError
from mome.training.config import RunConfig, SourceConfig
from mome.training.config_file import load_run_config
from mome.training.sources import open_source, patch_dataset

RECIPE = Path(__file__).parent.parent / "examples" / "configs" / "mome_ct_tiny.yaml"
SWIGLU = "swiglu(n=4, hidden=24)"
BASE = "topk-1"  # the parts of the preset; step times are ratios to this arm
TRAINED, HELD_OUT = 40, 4  # patients
HELD_OUT_BATCHES = 8  # of two patches

ROUTERS = {
    BASE: "topk(k=1)", "topk-2": "topk(k=2)", "noisy_topk": "noisy_topk(k=2)", "switch": "switch",
    "sigmoid": "sigmoid(k=1)", "group_limited": "group_limited(k=1)", "relu": "relu(k=1)",
    "expert_choice": "expert_choice(capacity=1.0)", "soft": "soft", "sinkhorn": "sinkhorn(k=1)", "hash": "hash",
    "uniform": "uniform", "hierarchical": "hierarchical", "label_group": "label_group", "depth": "depth",
}  # fmt: skip
EXPERTS = {
    "geglu": "geglu(n=4, hidden=24)", "shared": f"shared(routed={SWIGLU})", "conv": "conv(n=2)", "lora": "lora(n=4)",
    "film": "film(n=2)",
}  # fmt: skip
FUSIONS = ("uniform", "learned", "last", "gated", "pooled", "cross_attention")
ARMS: dict[str, dict[str, str]] = {
    **{name: {"experts": SWIGLU, "router": router} for name, router in ROUTERS.items()},
    "linear": {"experts": "linear"},
    "mlp": {"experts": "mlp(n=1)"},
    **{name: {"experts": experts, "router": "topk(k=1)"} for name, experts in EXPERTS.items()},
    "adaptive": {"experts": f"adaptive(experts={SWIGLU})", "router": "topk(k=2)"},
    **{f"{name}-fusion": {"experts": SWIGLU, "router": "topk(k=1)", "fusion": name} for name in FUSIONS},
    "mask_embedding": {"experts": SWIGLU, "router": "topk(k=1)", "head": "mask_embedding"},
}


def split(data: Path, out: Path) -> None:
    """Makes two folders of cases in `out`, `trained` and `held_out`, of links to files of the training patients."""
    source = data / "openkbp" / "train"
    if not (source / "cases.json").is_file():
        raise InputError("no folder openkbp/train with a cases.json", where=str(data), hint="name the folder above it")
    cases: dict[str, Any] = json.loads((source / "cases.json").read_text())
    most = max(len(case["annotated"]) for case in cases.values())
    held_out = [name for name, case in cases.items() if len(case["annotated"]) == most][-HELD_OUT:]
    for folder, names in (("trained", [n for n in cases if n not in held_out][:TRAINED]), ("held_out", held_out)):
        for name in names:
            for kind in ("images", "labels"):
                link = out / folder / kind / f"{name}.nii.gz"
                link.parent.mkdir(parents=True, exist_ok=True)
                if not link.is_symlink():
                    link.symlink_to((source / kind / link.name).resolve())
        with atomic_write(out / folder / "cases.json", "the list of cases") as part:
            part.write_text(json.dumps({name: cases[name] for name in names}))


def recipe(arm: str, args: argparse.Namespace) -> RunConfig:
    """The settings of one arm."""
    run = load_run_config(RECIPE, [f"{key}={value}" for key, value in ARMS[arm].items()])
    source = SourceConfig(folder=str(args.out / "trained"), dataset="openkbp")
    settings = {
        "steps": args.steps, "ema": 0.0, "checkpoint_every": 25, "keep_checkpoints": 1, "log_every": 0,
        "tracker": "none", "threads": args.threads, "mixed_precision": args.precision, "out": str(args.out / arm),
    }  # fmt: skip
    return dataclasses.replace(
        run,
        bank="trained",
        sources=(source,),
        validation=(),
        cache=str(args.out / "cache"),
        model={**run.model, "patch_size": [args.patch] * 3},
        train=dataclasses.replace(run.train, **settings),
    )


def held_out_batches(run: RunConfig, folder: Path, model: MoME) -> list[dict[str, torch.Tensor]]:
    """Patches of the held-out patients, two to a batch, drawn as in training."""
    assert model.processor is not None
    cache = open_source(SourceConfig(folder=str(folder), dataset="openkbp"), run, model.processor)
    patches = patch_dataset(run, [cache], model.config.patch_size, model.processor, 2 * HELD_OUT_BATCHES)
    patches.augmentation = None
    pairs = [(patches[2 * i], patches[2 * i + 1]) for i in range(HELD_OUT_BATCHES)]
    return [{key: torch.stack([one[key], other[key]]) for key in one} for one, other in pairs]
