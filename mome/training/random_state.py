"""The states of the random generators of one process: of Python, NumPy, torch, and every GPU."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mome.errors import InputError
from mome.training.tensor_file import read_tensors, write_tensors


def save_random_state(path: Path) -> None:
    """Writes the current states."""
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    tensors = {
        "python": torch.tensor(words, dtype=torch.int64),
        "numpy": torch.from_numpy(np.asarray(keys).astype(np.int64)),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        tensors |= {f"cuda.{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    values: dict[str, Any] = {
        "python": [version, gauss],
        "numpy": [str(kind), int(position), int(has_gauss), float(cached)],
    }
    write_tensors(path, tensors, values)


def load_random_state(path: Path) -> str | None:
    """Sets all generators to the states in a file.

    Returns:
        A note for the user if the state was written with another number of GPUs; the generators of GPUs without a
        stored state stay as they are.

    Raises:
        InputError: The file is missing or damaged.
    """
    tensors, values = read_tensors(path)
    stored = sum(name.startswith("cuda.") for name in tensors)
    here = torch.cuda.device_count() if torch.cuda.is_available() else 0
    try:
        version, gauss = values["python"]
        random.setstate((version, tuple(tensors["python"].tolist()), gauss))
        kind, position, has_gauss, cached = values["numpy"]
        keys = tensors["numpy"].numpy().astype(np.uint32)
        np.random.set_state((kind, keys, position, has_gauss, cached))
        torch.set_rng_state(_as_bytes(tensors["torch"]))
        for i in range(min(stored, here)):
            torch.cuda.set_rng_state(_as_bytes(tensors[f"cuda.{i}"]), i)
    except (LookupError, TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise InputError(
            f"the random states are damaged: {str(error)[:120]}", where=str(path), hint="--restart starts again"
        ) from error
    if stored == here:
        return None
    return f"the training state was written with {stored} GPUs, and here are {here}: losses may differ"


def _as_bytes(tensor: Tensor) -> Tensor:
    """Checks that a tensor has the form of a state of torch's generators, a list of bytes.

    Raises:
        ValueError: It has another type.
    """
    if tensor.dtype != torch.uint8 or tensor.ndim != 1:
        raise ValueError(f"a random state is a list of bytes, got {tensor.dtype}")
    return tensor
