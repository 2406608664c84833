"""Tile sizes of every kernel, read from the tables of the package, `configs/<architecture>.json`.

The first row whose bounds hold for the shape applies. The choice depends on shapes and the device only, never on the
number of tokens or on timing, so that reruns are bit-equal.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .interpreter import interpreting
from .launch import Machine

_FOLDER = Path(__file__).parent.parent / "configs"
# A device without a table uses that of the nearest one whose limits it meets.
_NEAREST = {"sm_86": "sm_120", "sm_89": "sm_120", "sm_87": "sm_80", "sm_103": "sm_100", "sm_121": "sm_120"}


@functools.lru_cache
def table(arch: str) -> dict[str, list[dict[str, Any]]]:
    """The rows of an architecture, by kernel; an architecture without a table gets that of the smallest device."""
    for name in (arch, _NEAREST.get(arch, ""), "sm_120"):
        path = _FOLDER / f"{name}.json"
        if name and path.is_file():
            return json.loads(path.read_text())
    raise FileNotFoundError(f"{_FOLDER} has no table for {arch}")


def _first(machine: Machine, kernel: str, **bounds: int) -> dict[str, Any]:
    for row in table(machine.arch)[kernel]:
        if all(bounds[key] <= limit for key, limit in row["up_to"].items()):
            return row
    raise ValueError(f"configs/{machine.arch}.json has no row of {kernel} for {bounds}")


def linear(machine: Machine, n: int, k: int, element_size: int, gated: bool, epilogue: bool) -> dict[str, Any]:
    """Tiles of the grouped linear kernel: n output columns (of one half where gated), k inner.

    `epilogue` says that an activation or a kept z follows the product. Row lengths that are not a multiple of 16
    numbers (`odd` in the tables) are loaded value by value, which needs more registers.
    """
    odd = int(n % 16 != 0 or k % 16 != 0)
    return _first(machine, "linear", n=n, k=k, bytes=element_size, gated=int(gated), epilogue=int(epilogue), odd=odd)


def dw(machine: Machine, n: int, k: int, element_size: int) -> dict[str, Any]:
    """Tiles of the gradient of a matrix (n, k)."""
    odd = int(n % 16 != 0 or k % 16 != 0)
    return _first(machine, "dw", n=n, k=k, bytes=element_size, odd=odd)


def fused(machine: Machine, kernel: str, d: int, f: int, element_size: int, gated: bool) -> dict[str, Any] | None:
    """Tiles of a fused kernel (`mlp`, `mlp_dx`, `mlp_dw`) for width d and hidden width f; None if it is too wide."""
    for row in table(machine.arch)[kernel]:
        bounds = {"d": d, "f": f, "bytes": element_size, "gated": int(gated)}
        if all(bounds[key] <= limit for key, limit in row["up_to"].items()):
            return row
    return None


def precision(x: Tensor, machine: Machine) -> str:
    """How float32 products are computed: as tf32 where PyTorch allows it for matmuls, else as three tf32 products."""
    if x.dtype != torch.float32 or interpreting():
        return "ieee"
    matmul = torch.backends.cuda.matmul
    # torch refuses to read the older setting once the newer one has been set
    if matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32:
        return "tf32"
    return "ieee" if machine.arch.startswith("gfx") else "tf32x3"
