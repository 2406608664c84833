"""An exponential moving average of the weights (EMA), and the model that a run ends with."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from accelerate import Accelerator
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from mome.atomic import atomic_write
from mome.processing import MoMEProcessor

if TYPE_CHECKING:
    from mome.modeling import MoME


def start_average(model: nn.Module, decay: float, accelerator: Accelerator) -> AveragedModel | None:
    """Returns a moving average that starts at the model's weights; None if decay is 0.

    Buffers are copied from the model, not averaged.
    """
    if not decay:
        return None
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=False)
    return average.to(accelerator.device)


def averaged_model(accelerator: Accelerator, model: nn.Module, average: AveragedModel | None) -> MoME:
    """Returns the averaged model if there is one, else the model itself without the accelerator's wrappers."""
    return cast("MoME", accelerator.unwrap_model(model) if average is None else average.module)


def save_copy(accelerator: Accelerator, model: MoME, processor: MoMEProcessor, folder: Path) -> None:
    """Saves a model that goes on training, with its processor; the model stays as it is.

    Raises:
        OutputError: The folder cannot be written; the one that was there stays.
    """
    if accelerator.is_main_process:
        kept = copy.deepcopy(model)
        _write(kept, processor, folder)
    accelerator.wait_for_everyone()


def save_model(
    accelerator: Accelerator, model: nn.Module, average: AveragedModel | None, processor: MoMEProcessor, folder: Path
) -> None:
    """Saves the averaged model, or the model itself without an average, with its processor.

    Raises:
        OutputError: The folder cannot be written; a partial one is removed.
    """
    final = accelerator.unwrap_model(model)
    if average is not None:
        final.load_state_dict(average.module.state_dict())
    if accelerator.is_main_process:
        _write(final, processor, folder)
    accelerator.wait_for_everyone()


def _write(model: nn.Module, processor: MoMEProcessor, folder: Path) -> None:
    """Writes a model and its processor; the model's weights become contiguous."""
    with atomic_write(folder, "the model") as part:
        model.to(memory_format=torch.contiguous_format).save_pretrained(part)  # type: ignore[call-overload,operator]
        processor.save_pretrained(part)
