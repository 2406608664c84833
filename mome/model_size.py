"""Limits on the size of a model, checked before anything is allocated: a config may come from anybody.

The limits are our choice. They are far above any network that fits one machine today.
"""

from __future__ import annotations

import contextlib
import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks

from mome.errors import InputError

MAX_PARAMETERS = 20 * 10**9
MAX_MODULES = 20_000
MAX_TILE_BYTES = 64 * 2**30

_Built = TypeVar("_Built")
# The most entries of a list in a spec, such as the channels of the stages.
_MAX_ITEMS = 64
_HINT = "smaller widths, depths or numbers of experts"


def build_within_limits(build: Callable[[], _Built]) -> _Built:
    """Returns `build()`, after a first build on the meta device has shown that the modules keep to the limits.

    Args:
        build: Makes modules; it is called twice unless the default device is meta.

    Raises:
        InputError: There would be more than 20 billion parameters, more than the machine's memory holds, or more than
            20,000 modules.
    """
    kind = torch.empty(0).device.type
    with torch.device("meta"), _counted() as count:
        built = build()
    if kind == "meta":
        return built
    if kind == "cpu":
        check_memory(count["parameters"])
    return build()


def check_memory(numbers: int) -> None:
    """Checks that the machine has the memory for so many numbers in float32.

    Raises:
        InputError: They need more than all of it.
    """
    needed, there = 4 * numbers, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        raise InputError(
            f"the model's {numbers:,} parameters need {needed / 2**30:,.1f} GiB, the machine has {there / 2**30:,.1f}",
            hint=_HINT,
        )


@contextlib.contextmanager
def _counted() -> Iterator[dict[str, int]]:
    """Counts what this thread's modules register inside the block, and stops the build at the first excess."""
    count = {"parameters": 0, "modules": 0}
    thread = threading.get_ident()

    def on_tensor(module: nn.Module, name: str, tensor: Tensor | None) -> None:
        if tensor is not None and threading.get_ident() == thread:
            count["parameters"] += tensor.numel()
            if count["parameters"] > MAX_PARAMETERS:
                raise InputError(
                    f"the model has more than {count['parameters']:,} parameters, the limit is {MAX_PARAMETERS:,}",
                    hint=_HINT,
                )

    def on_module(module: nn.Module, name: str, child: nn.Module | None) -> None:
        if threading.get_ident() == thread:
            count["modules"] += 1
            if count["modules"] > MAX_MODULES:
                raise InputError(f"the model has more than {MAX_MODULES:,} layers, which is the limit", hint=_HINT)

    handles = [
        hooks.register_module_parameter_registration_hook(on_tensor),
        hooks.register_module_buffer_registration_hook(on_tensor),
        hooks.register_module_module_registration_hook(on_module),
    ]
    try:
        yield count
    except RuntimeError as error:
        if "overflow" not in str(error):
            raise
        raise InputError("a layer of the model has more numbers than a tensor can hold", hint=_HINT) from error
    finally:
        for handle in handles:
            handle.remove()


def check_tile(patch: Sequence[int], stride: Sequence[int], channels: int) -> None:
    """Checks the memory of one tile's maps at the finest scale, in float32.

    Args:
        patch: Voxels (D, H, W) of a tile.
        stride: Voxels of the tile per voxel of the finest map.
        channels: Channels of the maps that exist at once.

    Raises:
        InputError: They need more than 64 GiB.
    """
    voxels = math.prod(math.ceil(side / step) for side, step in zip(patch, stride, strict=True))
    needed = 4 * voxels * channels
    if needed > MAX_TILE_BYTES:
        raise InputError(
            f"patch_size {list(patch)} with {channels} channels needs {needed / 2**30:,.0f} GiB for the maps of one "
            f"tile, the limit is {MAX_TILE_BYTES / 2**30:.0f} GiB",
            hint="patch_size=[96, 96, 96]",
        )


def numbers_within(limit: int, value: Any, where: str) -> None:
    """Checks every whole number and the length of every list inside a spec, however deeply it is nested.

    Args:
        limit: The largest number that is allowed.
        value: A dict, list or number of a config.
        where: The name of the value, as in "encoder", for the error.

    Raises:
        InputError: A number is larger, or a list has more than 64 entries.
    """
    if isinstance(value, dict):
        for key, item in value.items():
            numbers_within(limit, item, f"{where}.{key}")
    elif isinstance(value, list | tuple):
        if len(value) > _MAX_ITEMS:
            raise InputError(f"{where} has {len(value):,} entries, the limit is {_MAX_ITEMS}", hint=_HINT)
        for item in value:
            numbers_within(limit, item, where)
    elif type(value) is int and abs(value) > limit:
        raise InputError(f"{where} is {f'{value:,}':.40}, the limit is {limit:,}", hint=_HINT)
