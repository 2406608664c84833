"""Any backbone of timm as an encoder: over the slices of a volume, or with its kernels inflated to 3D."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from mome.encoders.base import Encoder, Pyramid, Stride
from mome.encoders.inflate import inflate, inflated_kernels
from mome.encoders.padding import on_padded
from mome.errors import InputError, did_you_mean
from mome.layers.blocks import ConvStack
from mome.layers.decoder import UNetDecoder
from mome.layers.simple_pyramid import SimplePyramid
from mome.map_context import DEFAULT_CONTEXT, MapContext
from mome.registry import at_least

_MODES = ("slices", "inflate")


class Timm(Encoder):
    """The features of a timm backbone, and the U-Net decoder in three dimensions.

    The networks are those of https://github.com/huggingface/pytorch-image-models; the decoder is our choice.

    With `slices` the 2D network sees each slice; the decoder's 3D convolutions join the slices. Maps keep the
    resolution across the slices. A plain vision transformer, whose features have one stride, gets the simple feature
    pyramid of ViTDet. With `inflate` the kernels of a convolutional network become three-dimensional.

    The values [0, 1] of the volume are normalised by the mean and deviation that timm states for the network, averaged
    over its channels. The network starts from random weights. Weights of timm are loaded by
    `mome.encoders.timm_weights.load_timm_weights`.

    Attributes:
        network: timm's network.
        plane: 1 for the two axes of a slice, 0 for the axis across the slices.
        network_channels: Channels that the network reads.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Settings of `timm`.

        Args:
            model: A name of `timm.list_models()`, such as `resnet18`, `convnext_tiny` or `vit_small_patch16_dinov3`.
            mode: `slices` or `inflate`.
            slice_axis: The axis of the volume (D, H, W) across the slices. On the default grid, whose axes run right,
                anterior and superior, 2 gives axial slices.
            neighbours: Slices on either side that are further channels of the network's input; only with `slices`. The
                outermost slice is repeated at the borders.
            levels: Which of the network's features are used, 0 is the finest; empty for all of them.
            stem: Channels of two 3D convolutions at the volume's resolution, which give the decoder a map of stride 1;
                0 for none, where the network's finest map is then the finest.
            depth: Convolutions in each decoder stage.
            norm: Norm of the stem and the decoder, `instance` or `group`.
        """

        model: str = "resnet18"
        mode: str = "slices"
        slice_axis: int = 2
        neighbours: int = 0
        levels: tuple[int, ...] = ()
        stem: int = 16
        depth: int = 1
        norm: str = "instance"

    def __init__(self, config: Config, *, in_channels: int = 1) -> None:
        super().__init__()
        _check(config)
        self.config, self.in_channels = config, in_channels
        self.network_channels = in_channels * (2 * config.neighbours + 1)
        self.plane: Stride = tuple(int(axis != config.slice_axis) for axis in range(3))  # type: ignore[assignment]
        inflated = config.mode == "inflate"
        network = _create(config, self.network_channels)
        self.network = inflate(network, config.slice_axis, config.model) if inflated else network
        self.mean, self.std = _statistics(config.model)
        self.is_channels_last = str(getattr(network, "output_fmt", "NCHW")).endswith("NHWC")
        channels, reductions = list(network.feature_info.channels()), list(network.feature_info.reduction())
        steps = (1, 1, 1) if inflated else self.plane
        self.pyramid = None
        if len(reductions) > 1 and len(set(reductions)) == 1:
            self.pyramid = SimplePyramid(channels[-1], reductions[-1], self.plane)
            channels, reductions = list(self.pyramid.channels), list(self.pyramid.strides)
        _probe(config, self.network_channels, reductions[-1])
        strides = [_stride(reduction, steps) for reduction in reductions]
        self.stem = None
        if config.stem and reductions[0] > 1:
            self.stem = ConvStack(in_channels, config.stem, depth=2, norm=config.norm)
            channels, strides = [config.stem, *channels], [(1, 1, 1), *strides]
        _check_strides(strides, config.model)
        self.channels, self.strides = tuple(reversed(channels[:-1])), tuple(reversed(strides[:-1]))
        self.bottleneck_channels, self.size_divisor = channels[-1], strides[-1]
        self.decoder = UNetDecoder(channels, strides, depth=config.depth, norm=config.norm)

    def forward(self, x_BCDHW: Tensor, context: MapContext = DEFAULT_CONTEXT) -> Pyramid:
        return on_padded(self._pyramid, x_BCDHW, divisor=self.size_divisor, strides=self.strides)

    def _pyramid(self, x_BCDHW: Tensor) -> Pyramid:
        stages = self.features(x_BCDHW)
        if self.pyramid is not None:
            stages = self.pyramid(stages[-1])
        if self.stem is not None:
            stages = [self.stem(x_BCDHW), *stages]
        bottleneck = stages[-1]
        return Pyramid(self.decoder(stages), bottleneck)

    def features(self, x_BCDHW: Tensor) -> list[Tensor]:
        """The network's features of a volume, fine to coarse, each (B, C, D, H, W).

        With `slices` they are those that timm's network gives for each slice.
        """
        x_BCDHW = (x_BCDHW - self.mean) / self.std
        if self.config.mode == "inflate":
            return list(self.network(x_BCDHW))
        batch, axis = x_BCDHW.shape[0], 2 + self.config.slice_axis
        x_BCNHW = _with_neighbours(x_BCDHW.movedim(axis, 2), self.config.neighbours)
        maps = self.network(x_BCNHW.transpose(1, 2).flatten(0, 1).contiguous())  # every slice is one image
        if self.is_channels_last:
            maps = [map_NHWC.permute(0, 3, 1, 2) for map_NHWC in maps]
        return [map_NCHW.unflatten(0, (batch, -1)).transpose(1, 2).movedim(2, axis).contiguous() for map_NCHW in maps]

    @torch.no_grad()
    def init_weights_(self, init: ModuleType, std: float) -> None:
        """Fills timm's parameters and buffers as timm does: they are copied from a network that timm has built."""
        own = {**dict(self.network.named_parameters()), **dict(self.network.named_buffers())}
        missing = {key: tensor for key, tensor in own.items() if not getattr(tensor, "_is_hf_initialized", False)}
        if not missing or all(tensor.is_meta for tensor in missing.values()):
            return
        with torch.device("cpu"):
            fresh = _create(self.config, self.network_channels)
        values = {**dict(fresh.named_buffers()), **dict(fresh.named_parameters())}
        if self.config.mode == "inflate":
            values |= dict(inflated_kernels(fresh, self.config.slice_axis))
        for key, tensor in missing.items():
            init.copy_(tensor, values[key].to(tensor.device, tensor.dtype))


def _check(config: Timm.Config) -> None:
    import timm

    name = config.model
    if not name or ":" in name or "/" in name or not timm.is_model(name):
        known = timm.list_models()
        raise InputError(
            f"timm has no model {name!r:.60}{did_you_mean(name.split('.')[0][:60], known)}",
            hint="timm.list_models('*resnet*') lists names; weights of the Hub are loaded by load_timm_weights",
        )
    if config.mode not in _MODES:
        raise InputError(
            f"mode of timm is slices or inflate, got {config.mode!r:.40}{did_you_mean(config.mode, _MODES)}",
            hint="mode='slices' fits every network",
        )
    if config.slice_axis not in (0, 1, 2):
        raise InputError(f"slice_axis of timm is 0, 1 or 2, got {config.slice_axis}", hint="slice_axis=2 is axial")
    at_least(0, "timm", neighbours=config.neighbours, stem=config.stem)
    at_least(1, "timm", depth=config.depth)
    if config.mode == "inflate" and config.neighbours:
        raise InputError("neighbours of timm are for mode='slices': inflated kernels see them", hint="neighbours=0")
    if len(set(config.levels)) != len(config.levels) or any(level < 0 for level in config.levels):
        raise InputError(f"levels of timm are different numbers from 0, got {list(config.levels)}")


def _create(config: Timm.Config, channels: int) -> Any:
    """Builds timm's network with random weights. Only the user loads weights; nothing is ever downloaded here."""
    import timm

    options: dict[str, Any] = {"pretrained": False, "features_only": True, "in_chans": channels}
    if config.levels:
        options["out_indices"] = tuple(sorted(config.levels))
    # Swin networks of timm are built for one image size and need the first word to accept others, transformers with
    # position embeddings the second. Networks that know neither refuse them with a TypeError.
    refused = None
    ways: tuple[dict[str, Any], ...] = ({"strict_img_size": False}, {"dynamic_img_size": True}, {})
    for sizes in ways:
        try:
            return timm.create_model(config.model, **options, **sizes)
        except TypeError as error:
            refused = error
        except (
            RuntimeError,
            AssertionError,
            IndexError,
            ValueError,
            KeyError,
            AttributeError,
            NotImplementedError,
        ) as error:
            raise _no_features(config, error) from error
    raise _no_features(config, refused)


def _no_features(config: Timm.Config, error: BaseException | None) -> InputError:
    levels = f", levels={list(config.levels)}" if config.levels else ""
    return InputError(
        f"the timm model '{config.model}'{levels} gives no features: {type(error).__name__}: {error}"[:200],
        hint="another model; timm.create_model(name, features_only=True) must work for it",
    )


def _statistics(model: str) -> tuple[float, float]:
    """Mean and standard deviation of the images that the network is made for, averaged over the channels."""
    import timm
    import timm.data

    settings = timm.get_pretrained_cfg(model)
    mean: tuple[float, ...] = timm.data.IMAGENET_DEFAULT_MEAN
    std: tuple[float, ...] = timm.data.IMAGENET_DEFAULT_STD
    if settings is not None:
        mean, std = settings.mean, settings.std
    return sum(mean) / len(mean), sum(std) / len(std)


@lru_cache(maxsize=8)  # a model is built twice: first without values, to count its parameters
def _probe(config: Timm.Config, channels: int, divisor: int) -> None:
    """Runs the network on slices without values, so that one that takes a single image size is refused when built."""
    with torch.device("meta"):
        network = _create(config, channels).eval()
    try:
        with torch.no_grad():
            network(torch.empty(1, channels, 2 * divisor, 3 * divisor, device="meta"))
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"the timm model '{config.model}' takes no slices of {2 * divisor} × {3 * divisor}: {reason}"[:200],
            hint="a model without a fixed image size, such as resnet18, convnext_tiny or vit_small_patch16_dinov3",
        ) from error


def _check_strides(strides: Sequence[Stride], model: str) -> None:
    pairs = zip(strides[:-1], strides[1:], strict=True)
    if len(strides) < 2 or any(c % f for fine, coarse in pairs for f, c in zip(fine, coarse, strict=True)):
        raise InputError(
            f"the decoder needs two strides or more, each a multiple of the one before; '{model}' gives "
            f"{[max(stride) for stride in strides]}",
            hint="other levels, or stem=16",
        )


def _stride(reduction: int, steps: Stride) -> Stride:
    d, h, w = (reduction if step else 1 for step in steps)
    return d, h, w


def _with_neighbours(x_BCNHW: Tensor, neighbours: int) -> Tensor:
    """Adds the slices before and after each slice to its channels: (B, C·(2n + 1), N, H, W), offset −n first."""
    if not neighbours:
        return x_BCNHW
    count = x_BCNHW.shape[2]
    at_N = torch.arange(count, device=x_BCNHW.device)
    shifted = [x_BCNHW[:, :, (at_N + i).clamp(0, count - 1)] for i in range(-neighbours, neighbours + 1)]
    return torch.cat(shifted, dim=1)
