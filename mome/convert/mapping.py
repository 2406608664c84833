"""From the names of a published file to the names of a model, and the refusal of files of another architecture."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mome.errors import InputError
from mome.registry import ENCODERS


@dataclass
class Conversion:
    """What a family says about a file.

    Attributes:
        config: Values for `MoMEConfig`; the rest of the model is that of a preset.
        tensors: Tensors by the names of the model.
        used: The names of the file's tensors that are used.
        processor: Settings of the network grid on which the weights were trained.
        trained_labels: The labels that the whole model was trained on; empty where parts of it are random.
        notes: Sentences that the user should know.
        fixed: Whether the file holds a whole model, so that no part of it may be chosen.
    """

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    used: set[str]
    processor: dict[str, Any]
    trained_labels: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    fixed: bool = False


def match_encoder(
    spec: dict[str, Any], source: Mapping[str, Tensor], *, required: Iterable[str], what: str, prefix: str = "network."
) -> tuple[dict[str, Tensor], set[str]]:
    """Finds an encoder's tensors in a file whose names are those of the wrapped network.

    Args:
        spec: The encoder, whose numbers were read from the file.
        source: The file's tensors.
        required: Beginnings of the names that must be there. Other parts, such as a decoder, may be missing as a whole.
        what: The name of the published network, for errors.
        prefix: What stands before the network's names in our encoder.

    Returns:
        Tensors by the model's names, and the names that are used of the file.

    Raises:
        InputError: A tensor is missing, or has another shape than the encoder's.
    """
    with torch.device("meta"):
        expected = ENCODERS.build(spec).state_dict()
    names = {name: name.removeprefix(prefix) for name in expected}
    present = {_part(key) for key in names.values() if key in source}
    found: dict[str, Tensor] = {}
    used: set[str] = set()
    required = tuple(required)
    for name, key in names.items():
        needed = key.startswith(required) or _part(key) in present
        if key not in source and needed:
            if key.endswith(("relative_position_index", "num_batches_tracked")):  # made from the config, or a count
                continue
            raise another_architecture(what, key, tuple(expected[name].shape), source)
        if key in source:
            if source[key].shape != expected[name].shape:
                raise InputError(
                    f"the file is no {what}: in its part '{_part(key)}', {key} has shape {tuple(source[key].shape)}, "
                    f"not {tuple(expected[name].shape)}",
                    hint=_OTHERS,
                )
            found[f"encoder.{name}"] = source[key]
            used.add(key)
    return found, used


_OTHERS = "check the family: mome convert --help lists them"


def another_architecture(
    what: str, key: str, shape: tuple[int, ...] | None, source: Mapping[str, Tensor]
) -> InputError:
    """The error for a file that lacks a tensor.

    Args:
        what: The name of the published network.
        key: The first tensor that is missing.
        shape: The shape that it would have, where that is known.
        source: The file's tensors.
    """
    first = min(source)
    shaped = f" of shape {shape}" if shape is not None else ""
    return InputError(
        f"the file is no {what}: its part '{_part(key)}' lacks {key}{shaped}; "
        f"the file has {first[:80]!r} of shape {tuple(source[first].shape)}",
        hint=_OTHERS,
    )


def _part(key: str) -> str:
    return key.split(".", 1)[0]


def count_blocks(source: Mapping[str, Tensor], pattern: str) -> list[int]:
    """The number of blocks in each stage, from names such as `layers.0.blocks.1.conv1.weight`.

    Args:
        source: The file's tensors.
        pattern: The name with `{stage}` and `{block}`.
    """
    stages: list[int] = []
    while pattern.format(stage=len(stages), block=0) in source:
        blocks = 1
        while pattern.format(stage=len(stages), block=blocks) in source:
            blocks += 1
        stages.append(blocks)
    return stages


def read_shape(source: Mapping[str, Tensor], key: str, what: str, dimensions: int) -> tuple[int, ...]:
    """The shape of a tensor from which a network's numbers are read.

    Raises:
        InputError: The tensor is missing, or has another number of dimensions.
    """
    if key not in source:
        raise another_architecture(what, key, None, source)
    shape = tuple(source[key].shape)
    if len(shape) != dimensions:
        raise InputError(
            f"the file is no {what}: in its part '{_part(key)}', {key} has shape {shape}, not {dimensions} dimensions",
            hint=_OTHERS,
        )
    return shape


def check_one_channel(channels: int, what: str) -> None:
    """Checks that a network reads one channel, as a CT has.

    Raises:
        InputError: It reads more.
    """
    if channels != 1:
        raise InputError(
            f"this {what} reads volumes of {channels} channels, and a CT has one", hint="weights for one channel"
        )
