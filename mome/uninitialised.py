"""Finds weights that a part's code made without values, which would be whatever the memory held before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from mome.errors import InputError


@contextmanager
def uninitialised_as_nan() -> Iterator[None]:
    """Inside the block `torch.empty` fills floating-point memory with NaN, which PyTorch does in deterministic mode."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]


def refuse_uninitialised(model: nn.Module) -> None:
    """Checks that every weight of a model that was made inside of `uninitialised_as_nan` has values.

    Raises:
        InputError: One is NaN.
    """
    for owner_name, owner in model.named_modules():
        for name, parameter in owner.named_parameters(recurse=False):
            if parameter.is_floating_point() and not parameter.is_meta and bool(parameter.isnan().any()):
                raise InputError(
                    f"{type(owner).__name__} leaves its parameter {name!r} without values",
                    where=owner_name,
                    hint="give it values in init_weights_ or in the constructor; see CONTRIBUTING.md",
                )
