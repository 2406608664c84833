"""The weight files of a checkpoint: finding them, and comparing their tensors with a model before anything is loaded.

A safetensors file begins with the names, types and shapes of its tensors, so this reads no weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers.utils.hub import cached_file

from mome.errors import InputError
from mome.git_lfs import refuse_pointer
from mome.json_file import read_json_object
from mome.loaded_weights import shown

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_COPY = "copy or download the checkpoint again"


class StoredTensor(NamedTuple):
    """What is compared of a tensor.

    Attributes:
        shape: Its shape.
        is_float: Whether its numbers are floating-point numbers.
    """

    shape: tuple[int, ...]
    is_float: bool


def stored_tensors(place: str, hub: dict[str, Any]) -> dict[str, StoredTensor] | None:
    """Reads the headers of a checkpoint's files.

    Args:
        place: A folder or a Hub id.
        hub: Arguments for downloads, such as `revision`.

    Returns:
        The tensors by name, or None where there is no safetensors file.

    Raises:
        InputError: The index names a file outside the checkpoint's folder, or one that is missing.
        SafetensorError: A file is damaged.
        OSError: A download failed.
    """
    files = weight_files(place, hub)
    if files is None:
        return None
    found = {}
    for file in files:
        refuse_pointer(file)
        with safe_open(file, framework="pt") as stored:
            for name in stored.keys():  # noqa: SIM118 - not a dict
                header = stored.get_slice(name)
                is_float = header.get_dtype().startswith(("F", "BF"))
                found[name] = StoredTensor(tuple(header.get_shape()), is_float)
    return found


def weight_files(place: str, hub: dict[str, Any]) -> list[str] | None:
    """Returns the paths of a checkpoint's safetensors files, downloaded where the place is a Hub id; None without any.

    Raises:
        InputError: The index names a file outside the checkpoint's folder, or one that is missing.
        OSError: A download failed.
    """
    single = find_file(place, _SINGLE, hub)
    return [single] if single is not None else _shards(place, hub)


def expected_tensors(model: nn.Module) -> dict[str, StoredTensor]:
    """The tensors that a checkpoint of the model holds; of tied tensors only the first name is stored."""
    tied = getattr(model, "_tied_weights_keys", None) or {}
    return described({name: tensor for name, tensor in model.state_dict().items() if name not in tied})


def described(tensors: Mapping[str, Tensor]) -> dict[str, StoredTensor]:
    """What is compared of tensors in memory."""
    return {name: StoredTensor(tuple(t.shape), t.dtype.is_floating_point) for name, t in tensors.items()}


def check_tensors(
    stored: Mapping[str, StoredTensor],
    expected: Mapping[str, StoredTensor],
    promised: Mapping[str, StoredTensor],
    *,
    where: str,
    allow_missing: bool,
    allow_mismatched: bool,
) -> None:
    """Checks that a checkpoint holds what the model takes from it.

    Args:
        stored: The checkpoint's tensors.
        expected: The tensors of the model that is to be loaded.
        promised: The tensors of the model that the checkpoint's own config describes. A tensor that overrides have
            added, or given another shape, is new and need not be stored.
        where: The checkpoint, for errors.
        allow_missing: Whether tensors may be missing; they are then initialised.
        allow_mismatched: Whether tensors may have another shape; they are then initialised.

    Raises:
        InputError: A tensor is missing, has another shape, or holds integers where the model has floating-point
            numbers.
    """
    needed = {name: tensor for name, tensor in expected.items() if promised.get(name) == tensor}
    missing = [name for name in needed if name not in stored]
    if missing and not allow_missing:
        if len(missing) > len(expected) // 2:
            raise InputError(
                f"{len(missing)} of {len(expected)} weights are not in the checkpoint: it is of another architecture",
                where=where,
            )
        raise InputError(
            f"{len(missing)} of {len(expected)} tensors are not in the checkpoint: {shown(missing)}",
            where=where,
            hint=f"{_COPY}; MoME.from_pretrained(…, allow_missing=True) makes them new and untrained",
        )
    held = [name for name in expected if name in stored]
    wrong = [name for name in held if stored[name].is_float != expected[name].is_float]
    if wrong:
        kinds = ("integers or booleans", "floating-point numbers")
        raise InputError(
            f"{len(wrong)} tensors hold {kinds[stored[wrong[0]].is_float]}, the model's hold "
            f"{kinds[expected[wrong[0]].is_float]}: {shown(wrong)}",
            where=where,
            hint=_COPY,
        )
    other = [name for name in held if name in needed and stored[name].shape != expected[name].shape]
    if other and not allow_mismatched:
        name = other[0]
        raise InputError(
            "the checkpoint's weights do not fit its config: it is of another architecture; "
            f"{name} has shape {stored[name].shape}, not {expected[name].shape}",
            where=where,
        )


def find_file(place: str, name: str, hub: dict[str, Any]) -> str | None:
    """The path of a file of the checkpoint, downloaded where the place is a Hub id; None where there is none."""
    if Path(place).is_dir():
        path = Path(place) / name
        return str(path) if path.is_file() else None
    return cached_file(place, name, _raise_exceptions_for_missing_entries=False, **hub)


def _shards(place: str, hub: dict[str, Any]) -> list[str] | None:
    index = find_file(place, _INDEX, hub)
    if index is None:
        return None
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise InputError(f"{_INDEX} has no weight_map of tensors to files", where=index, hint=_COPY)
    files = []
    for name in _checked_names(weight_map.values(), index):
        file = find_file(place, name, hub)
        if file is None:
            raise InputError(f"{_INDEX} names {name!r:.60}, which is not there", where=index, hint=_COPY)
        files.append(file)
    return files


def _checked_names(names: Iterable[str], index: str) -> list[str]:
    """The file names of an index, each once; a name with a folder in it would be read from outside the checkpoint."""
    unique = sorted(set(names))
    for name in unique:
        if "/" in name or "\\" in name or not name.endswith(".safetensors"):
            raise InputError(
                f"{_INDEX} names {name!r:.60}, which is no safetensors file of the checkpoint's own folder", where=index
            )
    return unique


def shapes_on_meta(build: Any, config: Any) -> dict[str, StoredTensor]:
    """The tensors of a model that is built without values.

    Args:
        build: The model's class.
        config: Its config.
    """
    with torch.device("meta"):
        return expected_tensors(build(config))
