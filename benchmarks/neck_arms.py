"""The arms of `neck_study.py` and their common recipe."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from neck_fusions import register_fusions
from neck_names import ARMS, CANDIDATES
from torch import nn

from mome.training.config import RunConfig, SourceConfig
from mome.training.config_file import load_run_config

RECIPE = Path(__file__).parent / "neck_study.yaml"
register_fusions()


def recipe(arm: str, seed: int, out: Path, cached: Path | None, overrides: list[str]) -> RunConfig:
    """Returns the settings of one arm.

    Args:
        arm: A name of `ARMS` or `CANDIDATES`.
        seed: Of weights, patches and augmentation.
        out: The folder of the study.
        cached: The folder `cache` with the caches of the sources; None reads the scans that the recipe names.
        overrides: `key=value` for every arm.
    """
    base, parts = {**ARMS, **CANDIDATES}[arm]
    run = load_run_config(RECIPE, overrides)
    return dataclasses.replace(
        run,
        preset=base or run.preset,
        model={**run.model, **parts},
        sources=run.sources if cached is None else cached_sources(run.sources, cached),
        train=dataclasses.replace(run.train, seed=seed, out=str(out / f"{arm}_{seed}")),
    )


def cached_sources(sources: tuple[SourceConfig, ...], cached: Path) -> tuple[SourceConfig, ...]:
    """Returns the same sources, read from a folder of caches that another machine has built."""
    return tuple(
        SourceConfig(kind="cached", folder=str(_only(cached, source)), weight=source.weight) for source in sources
    )


def _only(cached: Path, source: SourceConfig) -> Path:
    """Returns the one cache of a source inside a folder of caches."""
    stem = "phantom" if source.kind == "phantom" else str(source.dataset)
    found = sorted(path.parent for path in cached.glob(f"{stem}-*/index.json"))
    if len(found) != 1:
        raise SystemExit(f"{cached} holds {len(found)} caches of {stem}, not one")
    return found[0]


def segresnet(labels: tuple[str, ...], seed: int) -> nn.Module:
    """MONAI's SegResNet with one output channel per label."""
    from monai.networks.nets import SegResNet

    torch.manual_seed(seed)
    return SegResNet(spatial_dims=3, init_filters=16, in_channels=1, out_channels=len(labels))
