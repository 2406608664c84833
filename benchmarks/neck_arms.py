"""The arms of `neck_study.py`, their common recipe, and a fusion that reads no text."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch
from neck_names import ARMS
from torch import Tensor, nn

from mome.registry import FUSIONS
from mome.routers.fusion.base import DotProduct, Fusion, mix_by_dot_product
from mome.routers.fusion.text_guided import ScaleScores
from mome.training.config import RunConfig, SourceConfig
from mome.training.config_file import load_run_config

RECIPE = Path(__file__).parent / "neck_study.yaml"


class VoxelFusion(Fusion):
    """The weights of `text_guided` with one learned query for all prompts: the voxel alone decides. Our choice."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """`voxel` has no settings."""

    def __init__(self, config: Config, *, channels: int, text_dim: int, scales: int) -> None:
        super().__init__()
        self.scores = ScaleScores(32, channels=channels, text_dim=1, scales=scales)

    def forward(self, features_BSCV: Tensor, text_PT: Tensor) -> Tensor:
        return mix_by_dot_product(features_BSCV, self.dot_product(text_PT))

    def dot_product(self, text_PT: Tensor) -> DotProduct:
        query_PC, bias_PS = self.scores(text_PT.new_ones(text_PT.shape[0], 1))
        return DotProduct(query_PC, bias_PS, 0)


FUSIONS.register("voxel", VoxelFusion, summary="one learned query for all prompts")


def recipe(arm: str, seed: int, out: Path, cached: Path | None, overrides: list[str]) -> RunConfig:
    """Returns the settings of one arm.

    Args:
        arm: A name of `ARMS`.
        seed: Of weights, patches and augmentation.
        out: The folder of the study.
        cached: The folder `cache` with the caches of the sources; None reads the scans that the recipe names.
        overrides: `key=value` for every arm.
    """
    base, parts = ARMS[arm]
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
