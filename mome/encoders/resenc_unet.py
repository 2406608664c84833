"""nnU-Net's residual encoder U-Net through the package dynamic-network-architectures, with its decoder pyramid exposed.

Source: Isensee et al. 2024, *nnU-Net Revisited* (arXiv 2404.09556), and the experiment planners of nnU-Net.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from mome.encoders.base import Encoder, Pyramid, Stride
from mome.encoders.padding import on_padded
from mome.errors import InputError, did_you_mean
from mome.layers.average_pool import average_pool
from mome.layers.sparse import SparseResidual, stages_with_layer
from mome.map_context import DEFAULT_CONTEXT, MapContext
from mome.registry import at_least, part
from mome.routers.routing import Routing

# Stages of the presets. nnU-Net plans six for patches with sides of 128 to 255 voxels, which both its M and its L have:
# these differ in the patch and the batch that fit into 8 and 24 GB, not in the network. S is our choice, for patches of
# 64 to 127 voxels.
STAGES = {"S": 5, "M": 6, "L": 6}
# Channels and residual blocks of stage i, from nnU-Net's planners; blocks beyond the fourth entry are 6.
_FEATURES, _MOST_FEATURES = 32, 320
_BLOCKS = (1, 3, 4, 6)


class ResEncUNet(Encoder):
    """nnU-Net's network without its output layers, so that weights published for it keep their meaning.

    Source: Isensee et al. 2024, *nnU-Net Revisited* (arXiv 2404.09556).

    A stem, residual stages with instance norm and leaky ReLU, and a decoder of transposed convolutions with one
    convolution in each stage. New weights are nnU-Net's, too: every residual block starts as its skip connection.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Settings of `resenc_unet`.

        Args:
            preset: `S`, `M` or `L`: five, six and six stages of nnU-Net's widths and depths.
            features: Channels of the stages, fine to coarse; those of the preset, min(320, 32·2^i), where None.
            blocks: Residual blocks in each stage, fine to coarse; those of the preset, 1, 3, 4, 6, 6, …, where None.
            strides: Downsampling (D, H, W) before each stage, 1 or 2 along an axis; the first is [1, 1, 1]. None takes
                2 along every axis.
            kernels: Sides (D, H, W) of the kernels of each stage, odd. None takes 3 along every axis; nnU-Net plans
                1 along an axis that is not downsampled yet.
            layer: A sparse layer with a residual after stages of the encoder, as in
                `moe(experts=swiglu(n=8), router=topk(k=2))`; None for none.
            layer_stages: The stages that it follows, 0 is the finest; empty for every n-th stage, with the layer's
                `every`. The cost grows with the voxels of the stage.
        """

        preset: str = "M"
        features: tuple[int, ...] | None = None
        blocks: tuple[int, ...] | None = None
        strides: tuple[tuple[int, ...], ...] | None = None
        kernels: tuple[tuple[int, ...], ...] | None = None
        layer: Any = part("layers", None)
        layer_stages: tuple[int, ...] = ()

    def __init__(self, config: Config, *, in_channels: int = 1) -> None:
        super().__init__()
        features, blocks, steps, kernels = _plan(config)
        self.network = _network_class()(
            input_channels=in_channels,
            n_stages=len(features),
            features_per_stage=features,
            conv_op=nn.Conv3d,
            kernel_sizes=kernels,
            strides=steps,
            n_blocks_per_stage=blocks,
            num_classes=1,
            n_conv_per_stage_decoder=[1] * (len(features) - 1),
            conv_bias=True,
            norm_op=nn.InstanceNorm3d,
            norm_op_kwargs={"eps": 1e-5, "affine": True},
            nonlin=nn.LeakyReLU,
            nonlin_kwargs={"inplace": True},
        )
        del self.network.decoder.seg_layers
        del self.network.decoder.encoder  # the decoder repeats the encoder, whose tensors would have two names
        _prepare(self.network)
        fine_to_coarse = list(itertools.accumulate(steps, lambda a, b: tuple(x * y for x, y in zip(a, b, strict=True))))
        self.strides = tuple(reversed(fine_to_coarse[:-1]))
        self.size_divisor = fine_to_coarse[-1]
        self.channels = tuple(reversed(features[:-1]))
        self.bottleneck_channels = features[-1]
        self.stage_strides = tuple(fine_to_coarse)
        self.sparse = nn.ModuleDict(
            {
                str(stage): SparseResidual(
                    config.layer,
                    channels=features[stage],
                    stride=self.stage_strides[stage],
                    norm="instance",
                    owner="encoder 'resenc_unet'",
                )
                for stage in stages_with_layer(config.layer, config.layer_stages, len(features), "resenc_unet")
            }
        )

    def forward(self, x_BCDHW: Tensor, context: MapContext = DEFAULT_CONTEXT) -> Pyramid:
        run = partial(self._pyramid, context=context)
        return on_padded(run, x_BCDHW, divisor=self.size_divisor, strides=self.strides)

    def _pyramid(self, x_BCDHW: Tensor, context: MapContext) -> Pyramid:
        encoder, decoder = self.network.encoder, self.network.decoder
        x, stages = encoder.stem(x_BCDHW), []
        routings: list[Routing] = []
        for index, stage in enumerate(encoder.stages):
            x = stage(x)
            if str(index) in self.sparse:
                x, routing = self.sparse[str(index)](x, context.with_stride(self.stage_strides[index]))
                routings += [routing] if routing is not None else []
            stages.append(x)
        maps = []
        for up, blocks, skip in zip(decoder.transpconvs, decoder.stages, reversed(stages[:-1]), strict=True):
            x = blocks(torch.cat([up(x), skip], dim=1))
            maps.append(x)
        return Pyramid(tuple(maps), stages[-1], tuple(routings))

    @torch.no_grad()
    def init_weights_(self, init: ModuleType, std: float) -> None:
        """Fills the last norm of every residual block with zeros, so that the block adds nothing to its skip."""
        for stage in self.network.encoder.stages:
            for block in stage.blocks:
                norm = block.conv2.all_modules[-1]
                init.zeros_(norm.weight)
                init.zeros_(norm.bias)


class _AveragePool(nn.AvgPool3d):
    """Pools in every precision; see `mome.layers.average_pool`."""

    def forward(self, input: Tensor) -> Tensor:
        return average_pool(input, self.kernel_size, self.stride)


def _prepare(network: nn.Module) -> None:
    """Gives every tensor one name, and replaces the poolings."""
    for module in list(network.modules()):
        if hasattr(module, "all_modules"):  # the sequence that runs; its members are also attributes of their own
            for alias in {"conv", "norm", "nonlin"} & set(dict(module.named_children())):
                delattr(module, alias)
        for name, child in module.named_children():
            if type(child) is nn.AvgPool3d:
                setattr(module, name, _AveragePool(child.kernel_size, child.stride))


def _network_class() -> Any:
    """The class of the package.

    Raises:
        InputError: The package is not installed.
    """
    try:
        from dynamic_network_architectures.architectures.unet import ResidualEncoderUNet
    except ImportError as error:
        raise InputError(
            "encoder 'resenc_unet' needs the package dynamic-network-architectures, which is not installed",
            hint="pip install --no-deps dynamic-network-architectures (without --no-deps it installs an old timm)",
        ) from error
    return ResidualEncoderUNet


def _plan(config: ResEncUNet.Config) -> tuple[list[int], list[int], list[Stride], list[Stride]]:
    """Features, blocks, strides and kernels of the stages, checked against each other.

    Raises:
        InputError: An unknown preset, lists of other lengths, or a stride, kernel or number that is out of range.
    """
    if config.preset not in STAGES:
        raise InputError(
            f"preset of resenc_unet is {', '.join(STAGES)}, got {config.preset!r:.40}"
            f"{did_you_mean(config.preset, STAGES)}"
        )
    given = [value for value in (config.features, config.blocks, config.strides, config.kernels) if value is not None]
    stages = len(given[0]) if given else STAGES[config.preset]
    features = config.features or [min(_MOST_FEATURES, _FEATURES * 2**i) for i in range(stages)]
    blocks = config.blocks or [_BLOCKS[min(i, len(_BLOCKS) - 1)] for i in range(stages)]
    steps = config.strides or [(1, 1, 1)] + [(2, 2, 2)] * (stages - 1)
    kernels = config.kernels or [(3, 3, 3)] * stages
    lists = {"features": features, "blocks": blocks, "strides": steps, "kernels": kernels}
    lengths = {key: len(value) for key, value in lists.items()}
    if stages < 2 or len(set(lengths.values())) > 1:
        shown = ", ".join(f"{key} {length}" for key, length in lengths.items())
        raise InputError(
            f"resenc_unet has at least two stages and one entry for each in every list, got {shown}",
            hint="give all lists the same length",
        )
    at_least(1, "resenc_unet", features=min(features), blocks=min(blocks))
    for key in ("strides", "kernels"):
        if any(len(triple) != 3 for triple in lists[key]):  # type: ignore[arg-type]
            raise InputError(f"{key} of resenc_unet are triples (D, H, W), got {lists[key]!r:.80}")
    if any(step not in (1, 2) for triple in steps for step in triple) or math.prod(steps[0]) != 1:
        raise InputError(
            f"strides of resenc_unet are 1 or 2, and 1 in the first stage, got {[list(step) for step in steps]!r:.80}",
            hint="strides=[[1, 1, 1], [1, 2, 2], [2, 2, 2]]",
        )
    if any(math.prod(step) == 1 for step in steps[1:]):
        raise InputError("every stage of resenc_unet but the first is downsampled along some axis")
    if any(side < 1 or side % 2 == 0 for triple in kernels for side in triple):
        raise InputError(f"kernels of resenc_unet are odd, got {[list(kernel) for kernel in kernels]!r:.80}")
    return (
        list(features),
        list(blocks),
        [(step[0], step[1], step[2]) for step in steps],
        [(kernel[0], kernel[1], kernel[2]) for kernel in kernels],
    )
