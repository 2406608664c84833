"""SegResNet (Myronenko 2018, arXiv 1810.11654) through MONAI, with its decoder pyramid exposed."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mome.encoders.base import Encoder, Pyramid
from mome.encoders.padding import on_padded
from mome.errors import InputError, did_you_mean
from mome.map_context import DEFAULT_CONTEXT, MapContext
from mome.registry import at_least

LAYOUTS = ("deep_supervision", "original")
NORMS = ("batch", "instance", "group")
_GROUPS = 8  # MONAI's default


class SegResNet(Encoder):
    """MONAI's residual U-Net without its output layers, so that weights published for it keep their meaning.

    Source: Myronenko 2018 (arXiv 1810.11654).

    Stage i has `filters`·2^i channels; the last one is the bottleneck. Each decoder map is the sum of the upsampled
    coarser map and the encoder's map, followed by residual blocks.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Settings of `segresnet`. The defaults are the network of CT-FM (Pai et al. 2025, arXiv 2501.09001).

        Args:
            layout: `deep_supervision` is MONAI's SegResNetDS, which upsamples by transposed convolutions; `original` is
                MONAI's SegResNet, which upsamples by a 1×1×1 convolution and trilinear interpolation.
            filters: Channels of the finest stage.
            blocks_down: Residual blocks in each encoder stage, fine to coarse.
            blocks_up: Residual blocks in each decoder stage, coarse to fine; one in each where None.
            norm: `batch`, `instance` (affine) or `group` (8 groups).
            resolution: Voxel size along D, H, W, in any unit, only for `deep_supervision`. Axes with larger voxels are
                not downsampled until the others have caught up. None takes all axes alike.
        """

        layout: str = "deep_supervision"
        filters: int = 32
        blocks_down: tuple[int, ...] = (1, 2, 2, 4, 4)
        blocks_up: tuple[int, ...] | None = None
        norm: str = "batch"
        resolution: tuple[float, ...] | None = None

    def __init__(self, config: Config, *, in_channels: int = 1) -> None:
        super().__init__()
        _check(config)
        stages = len(config.blocks_down)
        blocks_up = config.blocks_up or (1,) * (stages - 1)
        norm = ("group", {"num_groups": _GROUPS}) if config.norm == "group" else (config.norm, {"affine": True})
        common = {
            "spatial_dims": 3,
            "init_filters": config.filters,
            "in_channels": in_channels,
            "out_channels": 1,
            "blocks_down": tuple(config.blocks_down),
            "blocks_up": tuple(blocks_up),
            "norm": norm,
        }
        self.is_original = config.layout == "original"
        self.network: Any
        if self.is_original:
            from monai.networks.nets import SegResNet as MonaiSegResNet

            self.network = MonaiSegResNet(**common)  # type: ignore[arg-type]
            del self.network.conv_final
            steps = [(2, 2, 2)] * (stages - 1)
        else:
            from monai.networks.nets import SegResNetDS

            resolution = None if config.resolution is None else tuple(config.resolution)
            self.network = network = SegResNetDS(**common, resolution=resolution)  # type: ignore[arg-type]
            for level in network.up_layers:
                del level["head"]  # type: ignore[operator]
            scales = network.anisotropic_scales or [(2, 2, 2)] * stages
            steps = [(int(d), int(h), int(w)) for d, h, w in scales[: stages - 1]]
        fine_to_coarse = list(
            itertools.accumulate(steps, lambda a, b: (a[0] * b[0], a[1] * b[1], a[2] * b[2]), initial=(1, 1, 1))
        )
        self.strides = tuple(reversed(fine_to_coarse[:-1]))
        self.size_divisor = fine_to_coarse[-1]
        self.channels = tuple(config.filters * 2**stage for stage in reversed(range(stages - 1)))
        self.bottleneck_channels = config.filters * 2 ** (stages - 1)

    def forward(self, x_BCDHW: Tensor, context: MapContext = DEFAULT_CONTEXT) -> Pyramid:
        run = self._original if self.is_original else self._deep_supervision
        return on_padded(run, x_BCDHW, divisor=self.size_divisor, strides=self.strides)

    def _deep_supervision(self, x_BCDHW: Tensor) -> Pyramid:
        x, stages = self.network.encoder.conv_init(x_BCDHW), []
        for level in self.network.encoder.layers:
            x = level["blocks"](x)
            stages.append(x)
            x = level["downsample"](x)
        x, maps = stages[-1], []
        for level, skip in zip(self.network.up_layers, reversed(stages[:-1]), strict=True):
            x = level["blocks"](level["upsample"](x) + skip)
            maps.append(x)
        return Pyramid(tuple(maps), stages[-1])

    def _original(self, x_BCDHW: Tensor) -> Pyramid:
        x, stages = self.network.convInit(x_BCDHW), []
        for stage in self.network.down_layers:
            x = stage(x)
            stages.append(x)
        maps = []
        for upsample, blocks, skip in zip(
            self.network.up_samples, self.network.up_layers, reversed(stages[:-1]), strict=True
        ):
            x = blocks(upsample(x) + skip)
            maps.append(x)
        return Pyramid(tuple(maps), stages[-1])


def _check(config: SegResNet.Config) -> None:
    for key, value, known in (("layout", config.layout, LAYOUTS), ("norm", config.norm, NORMS)):
        if value not in known:
            raise InputError(
                f"{key} of segresnet is {' or '.join(known)}, got {value!r:.40}{did_you_mean(value, known)}"
            )
    stages = len(config.blocks_down)
    if stages < 2:
        raise InputError(
            f"blocks_down of segresnet has at least two stages, got {list(config.blocks_down)}",
            hint="blocks_down=[1, 2, 2, 4]",
        )
    if config.blocks_up is not None and len(config.blocks_up) != stages - 1:
        raise InputError(
            f"blocks_up of segresnet has one entry less than blocks_down, {stages - 1}, got {list(config.blocks_up)}",
            hint=f"blocks_up={[1] * (stages - 1)}",
        )
    at_least(1, "segresnet", filters=config.filters, blocks_down=min(config.blocks_down))
    at_least(1, "segresnet", blocks_up=min(config.blocks_up or (1,)))
    if config.norm == "group" and config.filters % _GROUPS:
        raise InputError(
            f"norm 'group' of segresnet divides the filters by {_GROUPS}, got filters={config.filters}",
            hint=f"filters={max(_GROUPS, config.filters // _GROUPS * _GROUPS)}, or norm='instance'",
        )
    if config.resolution is not None:
        if config.layout == "original":
            raise InputError(
                "segresnet has a resolution only in the layout 'deep_supervision'", hint="leave resolution out"
            )
        if len(config.resolution) != 3 or not all(0 < size < float("inf") for size in config.resolution):
            raise InputError(
                f"resolution of segresnet is three positive numbers, got {list(config.resolution)}",
                hint="resolution=[3.0, 1.0, 1.0]",
            )
