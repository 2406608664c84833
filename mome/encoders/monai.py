"""Networks of MONAI that have no part of their own, by name, with their decoder pyramids exposed."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from types import ModuleType

import torch
from torch import Tensor, nn

from mome.encoders.base import Encoder, Pyramid, Stride
from mome.encoders.monai_networks import build_network, known_network, refused
from mome.encoders.padding import cropped, pad
from mome.errors import InputError
from mome.map_context import DEFAULT_CONTEXT, MapContext


class MonaiNetwork(Encoder):
    """Runs the owner's own forward and collects what the modules of `NETWORKS` return.

    The networks are those of https://github.com/Project-MONAI/MONAI.

    The output layer is left out; all other weights keep the owner's names. One encoder runs one forward at a time, not
    several in threads. Strides and channels are found by running the network once on the meta device, where nothing is
    computed.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Settings of `monai`.

        Args:
            network: The name of a class of `monai.networks.nets`, one of `NETWORKS`.
            arguments: Arguments of that class, by name; lists stand for tuples. `in_channels`, `out_channels` and
                `spatial_dims` follow from the model. UNETR needs `img_size`, the largest patch; smaller ones are
                padded to it.
        """

        network: str = "BasicUNet"
        arguments: dict = field(default_factory=dict)  # type: ignore[type-arg]

    def __init__(self, config: Config, *, in_channels: int = 1) -> None:
        super().__init__()
        known = known_network(config.network)
        self.network, arguments = build_network(config.network, config.arguments, known, in_channels)
        if known.output is not None:
            parent, _, child = known.output.rpartition(".")
            self.network.get_submodule(parent).register_module(child, nn.Identity())
        for alias in known.aliases:
            delattr(self.network, alias)
        for module in self.network.modules():  # a norm of MONAI's transformer blocks that runs with a second input only
            if getattr(module, "with_cross_attention", True) is False:
                del module.norm_cross_attn, module.cross_attn
        names = known.maps(arguments)
        self.map_names, self.bottleneck_name = tuple(names), known.bottleneck(arguments)
        self.reads_bottleneck = known.reads_bottleneck
        self.size_divisor = known.divisor(arguments)
        if "img_size" in arguments:
            size = arguments["img_size"]
            self.max_sides = (size, size, size) if isinstance(size, int) else (size[0], size[1], size[2])
        self._outputs: dict[str, Tensor] = {}
        try:
            self._find_shapes(in_channels)
        except (ValueError, RuntimeError) as error:
            raise refused(config.network, config.arguments, error) from error
        self._collect_from(self.network)

    def forward(self, x_BCDHW: Tensor, context: MapContext = DEFAULT_CONTEXT) -> Pyramid:
        sides = x_BCDHW.shape[2:]
        if self.max_sides is None:
            added = [-side % step for side, step in zip(sides, self.size_divisor, strict=True)]
        else:
            added = [largest - side for side, largest in zip(sides, self.max_sides, strict=True)]
            if min(added) < 0:
                raise InputError(
                    f"this network was built for volumes of at most {list(self.max_sides)} voxels, got {list(sides)}",
                    hint=f"encoder arguments img_size={list(sides)}, or a smaller patch_size",
                )
        return cropped(self._pyramid(pad(x_BCDHW, added)), sides, self.strides)

    def _pyramid(self, x_BCDHW: Tensor) -> Pyramid:
        try:
            self.network(x_BCDHW)
            return Pyramid(tuple(self._outputs[name] for name in self.map_names), self._outputs["bottleneck"])
        finally:
            self._outputs.clear()

    def _keep(self, name: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self._outputs[name] = output

    def _keep_input(self, name: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self._outputs[name] = inputs[0]

    def _collect_from(self, network: nn.Module) -> None:
        for name in self.map_names:
            network.get_submodule(name).register_forward_hook(partial(self._keep, name))
        keep = self._keep_input if self.reads_bottleneck else self._keep
        network.get_submodule(self.bottleneck_name).register_forward_hook(partial(keep, "bottleneck"))

    @torch.no_grad()
    def _find_shapes(self, in_channels: int) -> None:
        """Sets channels and strides, from a run of a copy whose tensors are on the meta device."""
        tensors = (*self.network.parameters(), *self.network.buffers())
        on_meta = {id(tensor): nn.Parameter(tensor.to("meta"), requires_grad=False) for tensor in tensors}
        copied = copy.deepcopy(self.network, on_meta).eval()
        self._collect_from(copied)
        sides = self.max_sides or tuple(2 * step for step in self.size_divisor)  # norms need two voxels
        try:
            copied(torch.empty(1, in_channels, *sides, device="meta"))
            shapes = {name: tensor.shape for name, tensor in self._outputs.items()}
        finally:
            self._outputs.clear()
        self.channels = tuple(shapes[name][1] for name in self.map_names)
        self.strides = tuple(_ratio(sides, shapes[name][2:]) for name in self.map_names)
        self.bottleneck_channels = shapes["bottleneck"][1]

    @torch.no_grad()
    def init_weights_(self, init: ModuleType, std: float) -> None:
        """Fills MONAI's bare parameters, such as position embeddings, and the slopes of PReLU."""
        for module in self.network.modules():
            if isinstance(module, nn.PReLU):
                init.constant_(module.weight, 0.25)
            elif not type(module).__module__.startswith("torch."):
                for parameter in module.parameters(recurse=False):
                    init.trunc_normal_(parameter, std=std)


def _ratio(sides: Sequence[int], coarse: Sequence[int]) -> Stride:
    d, h, w = (side // size for side, size in zip(sides, coarse, strict=True))
    return d, h, w
