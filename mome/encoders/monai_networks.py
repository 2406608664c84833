"""The networks of MONAI that `monai` wraps, where their decoder maps are, and the arguments that they take."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from mome.encoders.base import Stride
from mome.errors import InputError, did_you_mean
from mome.spec import brief

Arguments = dict[str, Any]


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
        example: Arguments that build the network, where some have no defaults.
    """

    maps: Callable[[Arguments], list[str]]
    bottleneck: Callable[[Arguments], str]
    divisor: Callable[[Arguments], Stride]
    output: str | None
    reads_bottleneck: bool = False
    aliases: tuple[str, ...] = ()
    example: str | None = None


def _strides(arguments: Arguments) -> Stride:
    """The product of the strides of all stages along each axis."""
    steps = [(step,) * 3 if isinstance(step, int) else tuple(step) for step in arguments["strides"]]
    d, h, w = (math.prod(step[axis] for step in steps) for axis in range(3))
    return d, h, w


def _levels(arguments: Arguments) -> range:
    """The levels of a network that has one decoder map for each entry of `channels` but the last, coarse to fine."""
    return range(len(arguments["channels"]) - 2, -1, -1)


NETWORKS = {
    "AttentionUnet": Network(
        maps=lambda a: ["model.1" + ".submodule.1" * level + ".merge" for level in _levels(a)],
        bottleneck=lambda a: "model.1" + ".submodule.1" * _levels(a)[0] + ".submodule",
        divisor=_strides,
        output="model.2",
        example="{'channels': [16, 32, 64], 'strides': [2, 2]}",
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
        example="{'kernel_size': [3, 3, 3], 'strides': [1, 2, 2], 'upsample_kernel_size': [2, 2]}",
    ),
    "UNet": Network(
        maps=lambda a: ["model" + ".1.submodule" * level + ".2" for level in _levels(a)],
        bottleneck=lambda a: "model" + ".1.submodule" * (_levels(a)[0] + 1),
        divisor=_strides,
        output=None,
        example="{'channels': [16, 32, 64], 'strides': [2, 2]}",
    ),
    "UNETR": Network(
        maps=lambda a: ["decoder5", "decoder4", "decoder3", "decoder2"],
        bottleneck=lambda a: "decoder5",
        divisor=lambda a: (16, 16, 16),
        output="out",
        reads_bottleneck=True,
        example="{'img_size': [96, 96, 96]}",
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
# What MONAI and torch raise of arguments that make no network.
_REFUSALS = (
    TypeError, ValueError, AssertionError, LookupError, AttributeError, ZeroDivisionError, RuntimeError,
)  # fmt: skip
# Arguments that follow from the rest of the model.
_MANAGED = ("spatial_dims", "in_channels", "out_channels", "deep_supervision", "deep_supr_num", "save_attn")


def known_network(name: str) -> Network:
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


def build_network(name: str, given: Arguments, known: Network, in_channels: int) -> tuple[nn.Module, Arguments]:
    """Builds a network.

    Args:
        name: The network's name.
        given: Its arguments; lists stand for tuples.
        known: Its entry in `NETWORKS`.
        in_channels: Channels of the volume.

    Returns:
        The network, and all its arguments with their defaults.

    Raises:
        InputError: An unknown or missing argument, or one that MONAI refuses.
    """
    from monai.networks import nets

    network_class = getattr(nets, name)
    names = [key for key in inspect.signature(network_class).parameters if key not in _MANAGED]
    for key in given:
        if key in _MANAGED:
            raise InputError(f"the argument '{key}' of {name} follows from the model", hint="leave it out")
        if key not in names:
            raise InputError(
                f"MONAI's {name} has no argument {key!r:.60}{did_you_mean(key, names)}",
                hint="arguments: " + ", ".join(names),
            )
    arguments = {key: _tuples(value) for key, value in given.items()}
    managed = {"spatial_dims": 3, "in_channels": in_channels, "out_channels": 1}
    try:
        if known.output is None:
            managed["out_channels"] = arguments["channels"][0]
        bound = inspect.signature(network_class).bind(**managed, **arguments)
        bound.apply_defaults()
        _check_lists(bound.arguments)
        return network_class(**managed, **arguments), dict(bound.arguments)
    except InputError:
        raise
    except _REFUSALS as error:
        raise refused(name, given, error) from error


def _check_lists(arguments: Arguments) -> None:
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


def refused(name: str, given: Arguments, error: Exception) -> InputError:
    """Returns the error for arguments that a network refuses, with an example where one is missing."""
    reason = " ".join(str(error).split())[:160] or type(error).__name__
    if isinstance(error, KeyError):
        reason = f"the argument {reason} is missing"
    example = NETWORKS[name].example if "missing" in reason else None
    return InputError(
        f"MONAI's {name} cannot be built: {reason}",
        where=f"arguments {brief(given)}",
        hint=example and f"arguments={example}",
    )


def _tuples(value: Any) -> Any:
    """The value with every list, however deeply nested, as a tuple: MONAI takes names with arguments as pairs."""
    if isinstance(value, list | tuple):
        return tuple(_tuples(item) for item in value)
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return value
