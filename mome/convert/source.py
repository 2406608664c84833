"""The tensors of a published file of weights. Nothing in it is executed."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mome.errors import InputError

# Where training scripts keep the weights beside the optimiser and the like.
_CONTAINERS = ("state_dict", "model_state_dict", "network_weights", "net", "model", "student")
# Wrappers that put their name before every key: DataParallel, torch.compile, Lightning, the authors' own classes.
_PREFIXES = ("module.", "_orig_mod.", "backbone.", "model.", "network.")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Reads the weights of a file, without the names of wrappers before their keys.

    Args:
        path: A safetensors file, a file of `torch.save`, or a folder with a model.safetensors.

    Returns:
        Tensors on the CPU by name.

    Raises:
        InputError: The file is missing or damaged, holds no weights, or holds Python objects beyond tensors, which
            cannot be read without executing them.
    """
    if path.is_dir():
        path = path / "model.safetensors"
    if not path.is_file():
        raise InputError("no such file of weights", where=str(path), hint="a .safetensors, .pt, .pth or .bin file")
    tensors = _from_safetensors(path) if path.suffix == ".safetensors" else _from_torch(path)
    return without_prefixes(tensors)


def without_prefixes(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Removes the names of wrappers that stand before all keys, or before some of them.

    A prefix is kept where two keys would become one.
    """
    current = dict(tensors)
    for _ in range(len(_PREFIXES)):  # wrappers nest
        for prefix in _PREFIXES:
            shorter = {key.removeprefix(prefix): tensor for key, tensor in current.items()}
            if len(shorter) == len(current):
                current = shorter
    return current


def _from_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"the weights are damaged or incomplete: {str(error).splitlines()[0][:120]}",
            where=str(path),
            hint="download the file again",
        ) from error


def _from_torch(path: Path) -> dict[str, Tensor]:
    try:
        with path.open("rb") as file:
            if not file.read(2).startswith((b"PK", b"\x80")):  # an archive, or a pickle of older versions
                raise ValueError("its first bytes are those of another format")
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        reason = "it holds Python objects beyond tensors, and reading those would execute code"
        if "weights_only" not in str(error).lower():
            reason = f"it is damaged, or no file of torch.save: {str(error).splitlines()[0][:100]}"
        raise InputError(
            f"the file is not read: {reason}",
            where=str(path),
            hint="save its tensors alone as safetensors, on a machine where you trust the file",
        ) from error
    except (RuntimeError, EOFError, ValueError, OSError, KeyError, UnicodeDecodeError) as error:
        raise InputError(
            f"the file is damaged, or no file of torch.save: {(str(error).splitlines() or [''])[0][:120]}",
            where=str(path),
            hint="download the file again",
        ) from error
    return _weights_in(content, str(path))


def _weights_in(content: Any, where: str) -> dict[str, Tensor]:
    """The named tensors of a file's content, directly or in one of the containers.

    Raises:
        InputError: There are none.
    """
    for _ in range(3):
        if not isinstance(content, Mapping):
            break
        found = {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)}
        inner = next((content[name] for name in _CONTAINERS if isinstance(content.get(name), Mapping)), None)
        if inner is None:
            if found:
                return found
            break
        content = inner
    raise InputError(
        "the file holds no named tensors",
        where=where,
        hint=f"a dict of tensors, or one under a key such as {', '.join(_CONTAINERS[:4])}",
    )
