"""What to lower where the memory is not enough for a training step, or for a validation."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch

from mome.errors import InputError, lacks_memory
from mome.memory import as_text, process_bytes
from mome.training.config import TrainConfig


class StepOutOfMemory(InputError, MemoryError):
    """The memory is not enough for a training step."""


class ValidationOutOfMemory(InputError, MemoryError):
    """The memory is not enough to segment a validation case."""


@contextlib.contextmanager
def says_that_validation_is_too_large(device: torch.device) -> Iterator[None]:
    """Turns the lack of memory inside the block into a `ValidationOutOfMemory`.

    Args:
        device: Where the validation runs.

    Raises:
        ValidationOutOfMemory: Memory of the device or of the machine is not enough.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not lacks_memory(error):
            raise
        raise ValidationOutOfMemory(
            "the memory is not enough to segment a whole validation case during training",
            where=f"{device}, {_in_use(device)}",
            hint="train.validate_every=0, then mome evaluate; or smaller scans in 'validation'. The same command goes "
            "on from the last checkpoint",
        ) from error


@contextlib.contextmanager
def says_what_to_lower(config: TrainConfig, patch_size: Sequence[int], device: torch.device) -> Iterator[None]:
    """Turns the lack of memory inside the block into a `StepOutOfMemory`.

    Args:
        config: Settings of the loop.
        patch_size: Voxels (D, H, W).
        device: Where the steps run.

    Raises:
        StepOutOfMemory: Memory of the device or of the machine is not enough.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, StepOutOfMemory | ValidationOutOfMemory) or not lacks_memory(error):
            raise
        sides = "×".join(map(str, patch_size))
        raise StepOutOfMemory(
            f"the memory is not enough for a step of {config.batch_size} patches of {sides} voxels",
            where=f"{device}, {_in_use(device)}",
            hint="; ".join(remedies(config)) + "; with --restart, as these are another run's settings",
        ) from error


def remedies(config: TrainConfig) -> list[str]:
    """Returns the settings that lower the memory of a step, those that change the result least first."""
    found = []
    if config.batch_size > 1:
        batch, accumulated = config.batch_size // 2, config.gradient_accumulation * 2
        found.append(f"train.batch_size={batch} train.gradient_accumulation={accumulated}")
    if not config.gradient_checkpointing:
        found.append("train.gradient_checkpointing=true")
    if config.mixed_precision == "no":
        found.append("train.mixed_precision=bf16")
    return [*found, "a smaller patch_size=[…]"]


def _in_use(device: torch.device) -> str:
    """Says how much memory is used, and of a GPU also how much there is."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return f"{as_text(total - free)} of {as_text(total)} in use"
    return f"{as_text(process_bytes())} used by this process"
