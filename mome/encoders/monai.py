"""Networks of MONAI that have no part of their own, by name, with their decoder pyramids exposed."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mome.encoders.base import Encoder, Pyramid, Stride
from mome.encoders.padding import cropped, pad
from mome.errors import InputError, did_you_mean
from mome.map_context import DEFAULT_CONTEXT, MapContext
from mome.spec import brief

_Arguments = dict[str, Any]


class Network(NamedTuple):
    """Where a MONAI network has its decoder maps; names of modules follow from its arguments.

    Attributes:
        maps: The modules that return the decoder maps, coarse to fine.
        bottleneck: The module that returns the deepest map.
        divisor: The numbers that the sides D, H, W are multiples of.
        output: The output layer, which is replaced by an identity. None where the finest map is what the network
            returns, in as many channels as its finest stage.
        reads_bottleneck: Whether the deepest map is what that module reads instead of what it returns.
        aliases: Attributes that repeat modules of other names; they are removed, so that every tensor has one name.
    """

    maps: Callable[[_Arguments], list[str]]
    bottleneck: Callable[[_Arguments], str]
    divisor: Callable[[_Arguments], Stride]
    output: str | None
    reads_bottleneck: bool = False
    aliases: tuple[str, ...] = ()


def _strides(arguments: _Arguments) -> Stride:
    """The product of the strides of all stages along each axis."""
    steps = [(step,) * 3 if isinstance(step, int) else tuple(step) for step in arguments["strides"]]
    d, h, w = (math.prod(step[axis] for step in steps) for axis in range(3))
    return d, h, w


def _levels(arguments: _Arguments) -> range:
    """The levels of a network that has one decoder map for each entry of `channels` but the last, coarse to fine."""
    return range(len(arguments["channels"]) - 2, -1, -1)


NETWORKS = {
    "AttentionUnet": Network(
        maps=lambda a: ["model.1" + ".submodule.1" * level + ".merge" for level in _levels(a)],
        bottleneck=lambda a: "model.1" + ".submodule.1" * _levels(a)[0] + ".submodule",
        divisor=_strides,
        output="model.2",
    ),
    "BasicUNet": Network(
        maps=lambda a: ["upcat_4", "upcat_3", "upcat_2", "upcat_1"],
        bottleneck=lambda a: "down_4",
        divisor=lambda a: (16, 16, 16),
        output="final_conv",
    ),
    "DynUNet": Network(
        maps=lambda a: [f"skip_layers{'.next_layer' * i}.upsample" for i in range(len(a["strides"]) - 2, -1, -1)],
        bottleneck=lambda a: "skip_layers" + ".next_layer" * (len(a["strides"]) - 1),
        divisor=_strides,
        output="output_block",
        aliases=("input_block", "downsamples", "bottleneck", "upsamples"),
    ),
    "UNet": Network(
        maps=lambda a: ["model" + ".1.submodule" * level + ".2" for level in _levels(a)],
        bottleneck=lambda a: "model" + ".1.submodule" * (_levels(a)[0] + 1),
        divisor=_strides,
        output=None,
    ),
    "UNETR": Network(
        maps=lambda a: ["decoder5", "decoder4", "decoder3", "decoder2"],
        bottleneck=lambda a: "decoder5",
        divisor=lambda a: (16, 16, 16),
        output="out",
        reads_bottleneck=True,
    ),
    "VNet": Network(
        maps=lambda a: ["up_tr256", "up_tr128", "up_tr64", "up_tr32"],
        bottleneck=lambda a: "down_tr256",
        divisor=lambda a: (16, 16, 16),
        output="out_tr",
    ),
}
# Networks of MONAI that other parts wrap, by the name of the part.
_OWN_PARTS = {
    "SwinUNETR": "swin_unetr",
    "SegResNet": "segresnet(layout='original')",
    "SegResNetDS": "segresnet",
    "MedNeXt": "mednext",
}
# Arguments that follow from the rest of the model.
_MANAGED = ("spatial_dims", "in_channels", "out_channels", "deep_supervision", "deep_supr_num", "save_attn")


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
        known = _known(config.network)
        self.network, arguments = _built(config, known, in_channels)
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
            raise _refused(config, error) from error
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


def _known(name: str) -> Network:
    """The entry of a network.

    Raises:
        InputError: It is not in the table.
    """
    if name in NETWORKS:
        return NETWORKS[name]
    if name in _OWN_PARTS:
        raise InputError(f"MONAI's {name} has a part of its own", hint=f'encoder="{_OWN_PARTS[name]}"')
    raise InputError(
        f"the decoder maps of the MONAI network {name!r:.60} are not known{did_you_mean(name, NETWORKS)}",
        hint=f"networks: {', '.join(NETWORKS)}; parts of their own: segresnet, swin_unetr, mednext",
    )


def _built(config: MonaiNetwork.Config, known: Network, in_channels: int) -> tuple[nn.Module, _Arguments]:
    """The network, and all its arguments with their defaults.

    Raises:
        InputError: An unknown or missing argument, or one that MONAI refuses.
    """
    from monai.networks import nets

    network_class = getattr(nets, config.network)
    names = [name for name in inspect.signature(network_class).parameters if name not in _MANAGED]
    for key in config.arguments:
        if key in _MANAGED:
            raise InputError(f"the argument '{key}' of {config.network} follows from the model", hint="leave it out")
        if key not in names:
            raise InputError(
                f"MONAI's {config.network} has no argument {key!r:.60}{did_you_mean(key, names)}",
                hint="arguments: " + ", ".join(names),
            )
    given = {key: _tuples(value) for key, value in config.arguments.items()}
    managed = {"spatial_dims": 3, "in_channels": in_channels, "out_channels": 1}
    try:
        if known.output is None:
            managed["out_channels"] = given["channels"][0]
        bound = inspect.signature(network_class).bind(**managed, **given)
        bound.apply_defaults()
        _check_lists(bound.arguments)
        return network_class(**managed, **given), dict(bound.arguments)
    except InputError:
        raise
    except (TypeError, ValueError, AssertionError, KeyError, IndexError, AttributeError, ZeroDivisionError) as error:
        raise _refused(config, error) from error


def _check_lists(arguments: _Arguments) -> None:
    """Checks what MONAI itself would not refuse: the strides of the stages and the size of a patch."""
    strides, channels = arguments.get("strides"), arguments.get("channels")
    if channels is not None and (len(channels) < 2 or len(strides or ()) != len(channels) - 1):
        raise InputError(
            f"channels have at least two entries and strides one less, got {brief(channels)} and {brief(strides)}",
            hint="channels=[16, 32, 64], strides=[2, 2]",
        )
    size = arguments.get("img_size")
    if size is not None:
        sides = (size,) * 3 if isinstance(size, int) else tuple(size)
        if len(sides) != 3 or any(type(side) is not int or side < 32 or side % 16 for side in sides):
            raise InputError(
                f"img_size is three multiples of 16 that are at least 32, got {brief(size)}",
                hint="img_size=[96, 96, 96]",
            )


def _refused(config: MonaiNetwork.Config, error: Exception) -> InputError:
    reason = " ".join(str(error).split())[:160] or type(error).__name__
    if isinstance(error, KeyError):
        reason = f"the argument {reason} is missing"
    return InputError(
        f"MONAI's {config.network} cannot be built: {reason}", where=f"arguments {brief(config.arguments)}"
    )


def _tuples(value: Any) -> Any:
    """The value with every list, however deeply nested, as a tuple: MONAI takes names with arguments as pairs."""
    if isinstance(value, list | tuple):
        return tuple(_tuples(item) for item in value)
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return value
