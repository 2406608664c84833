"""Tensors and plain values in one safetensors file. Reading one executes nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mome.errors import InputError

_VALUES = "values"


def write_tensors(path: Path, tensors: Mapping[str, Tensor], values: Mapping[str, Any] | None = None) -> None:
    """Writes tensors of any shape and type, and JSON values into the file's header.

    Args:
        path: The file.
        tensors: Name → tensor, on any device and in any memory format.
        values: Name → JSON value.

    Raises:
        SafetensorError: The disk is full, or the folder cannot be written.
    """
    stored: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        plain = tensor.detach().to("cpu").contiguous()
        if plain.untyped_storage().data_ptr() in storages:  # the format has no tensors that share memory
            plain = plain.clone()
        storages.add(plain.untyped_storage().data_ptr())
        stored[name] = plain
    save_file(stored, path, metadata={_VALUES: json.dumps(dict(values or {}))})


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns the tensors and the values that `write_tensors` wrote; the tensors are copies in memory.

    Raises:
        InputError: The file is missing, damaged or of another kind.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - no mapping
            values = json.loads((file.metadata() or {}).get(_VALUES, "{}"))
    except (SafetensorError, OSError, ValueError, RuntimeError, RecursionError) as error:
        reason = (str(error).splitlines() or [""])[0][:120]
        raise InputError(f"the training state is damaged: {reason}", where=str(path)) from error
    if not isinstance(values, dict):
        raise InputError("the training state is damaged: its values are no JSON object", where=str(path))
    return tensors, values


def check_like(stored: Mapping[str, Tensor], current: Mapping[str, Tensor], path: Path) -> None:
    """Checks that stored tensors have the names, shapes and types of those that they will replace.

    Raises:
        InputError: A tensor is missing, is not known, or differs in shape or type.
    """
    for name in [*current, *stored]:
        if name in current and name in stored:
            ours, theirs = current[name], stored[name]
            if ours.shape == theirs.shape and ours.dtype == theirs.dtype:
                continue
            what = f"'{name}' is {_describe(theirs)}, not {_describe(ours)}"
        else:
            what = f"'{name}' is {'missing' if name in current else 'not of this model'}"
        raise InputError(
            f"the training state is of another model: {what}",
            where=str(path),
            hint="another train.out=…, or --restart to start again",
        )


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
