"""An exponential moving average of the weights (EMA), and the model that a run ends with."""

from __future__ import annotations

import contextlib
import copy
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate import Accelerator
from torch import nn
from torch.optim.swa_utils import AveragedModel

from mome.atomic import atomic_write
from mome.model_card import CARD_FILE, own_card
from mome.processing import MoMEProcessor
from mome.training.adapters import Adapters
from mome.training.moving_average import growing_average
from mome.training.run_card import validation_section
from mome.training.spread import SpreadAverage, free_whole_parameters, is_spread

if TYPE_CHECKING:
    from mome.modeling import MoME

RECORD = "validation.json"  # beside the best model: the step and the score of its validation


Average = AveragedModel | SpreadAverage


def start_average(
    model: nn.Module, decay: float, device: torch.device, second: nn.Module | None = None
) -> Average | None:
    """Returns a moving average that starts at the model's weights; None if decay is 0.

    Buffers are copied from the model, not averaged.

    Args:
        model: The model.
        decay: The decay.
        device: Where the average is kept.
        second: Of a spread model, another one like it, which becomes the average.
    """
    if not decay:
        return None
    if second is not None:
        return SpreadAverage(second, decay)
    average = AveragedModel(model, multi_avg_fn=growing_average(decay), use_buffers=False)
    return average.to(device)


def averaged_model(accelerator: Accelerator, model: nn.Module, average: Average | None) -> MoME:
    """Returns the averaged model if there is one, else the model itself without the accelerator's wrappers."""
    return cast("MoME", accelerator.unwrap_model(model) if average is None else average.module)


def save_model(
    accelerator: Accelerator,
    model: MoME,
    processor: MoMEProcessor,
    folder: Path,
    adapters: Adapters | None = None,
    record: dict[str, Any] | None = None,
) -> None:
    """Saves a copy of a model with its processor; the model stays as it is.

    Args:
        accelerator: Its main process writes.
        model: What `averaged_model` returns.
        processor: Its processor.
        folder: Where; a folder that is there is replaced, except for a model card that somebody has changed.
        adapters: Are merged into the copy.
        record: Is written beside the model as `validation.json`, so that both always belong together.

    Raises:
        OutputError: The folder cannot be written; the one that was there stays.
    """
    sections = model.card_sections
    if record is not None:
        sections = (*sections, validation_section(record["step"], record["dice/mean"]))
    if is_spread(model):  # whose tensors all processes gather, and one writes
        _save_spread(accelerator, model, processor, folder, record, sections)
    elif accelerator.is_main_process:
        kept = copy.deepcopy(model) if adapters is None else adapters.merged(model)
        kept.card_sections = sections
        with atomic_write(folder, "the model") as part:
            kept.to(memory_format=torch.contiguous_format).save_pretrained(part)  # type: ignore[call-arg]
            _save_beside(part, folder, processor, record)
    accelerator.wait_for_everyone()


def _save_spread(
    accelerator: Accelerator,
    model: MoME,
    processor: MoMEProcessor,
    folder: Path,
    record: dict[str, Any] | None,
    sections: tuple[str, ...],
) -> None:
    """Saves a spread model, which cannot be copied; see `save_model`. Only the main process writes files that stay."""
    before, model.card_sections = model.card_sections, sections
    with contextlib.ExitStack() as stack:
        if accelerator.is_main_process:
            part = stack.enter_context(atomic_write(folder, "the model"))
        else:
            part = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        free_whole_parameters(model)
        model.save_pretrained(part)
        if accelerator.is_main_process:
            _save_beside(part, folder, processor, record)
    model.card_sections = before


def _save_beside(part: Path, before: Path, processor: MoMEProcessor, record: dict[str, Any] | None) -> None:
    """Writes what belongs to a saved model beside its own files, into the folder that will replace `before`."""
    processor.save_pretrained(part)
    if (card := own_card(before)) is not None:
        (part / CARD_FILE).write_bytes(card)
    if record is not None:
        (part / RECORD).write_text(json.dumps(record) + "\n")
