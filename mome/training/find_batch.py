"""Finds the largest batch of a run that fits the memory."""

from __future__ import annotations

import gc
import math
from dataclasses import dataclass

import torch

from mome.activation_checkpointing import checkpoint_activations
from mome.errors import InputError, lacks_memory
from mome.memory import as_text, available_bytes
from mome.training.adapters import Adapters
from mome.training.config import RunConfig
from mome.training.memory import BYTES_PER_AVERAGED_WEIGHT, BYTES_PER_WEIGHT, bytes_per_voxel
from mome.training.optimizer import build_optimizer
from mome.training.setup import build_model
from mome.training.text_rows import text_rows
from mome.training.weight_average import start_average

_SPARE = 0.9  # share of the memory that a batch may take; allocators lose some to fragments (our choice)
_MOST = 4096


@dataclass(frozen=True)
class FoundBatch:
    """The result of `find_batch_size`.

    Attributes:
        size: Patches per process and forward pass.
        step_bytes: Memory of a step of this size with the weights.
        memory_bytes: Memory of the device that may be used.
        is_measured: Whether steps were run; on the CPU they are estimated, because a process that takes too much
            memory there is killed.
    """

    size: int
    step_bytes: float
    memory_bytes: float
    is_measured: bool

    def __str__(self) -> str:
        how = "measured" if self.is_measured else "estimated"
        return (
            f"train.batch_size={self.size}: a step takes {as_text(self.step_bytes)} of {as_text(self.memory_bytes)} "
            f"({how}); a tenth is left free"
        )


def find_batch_size(run: RunConfig, device: torch.device | None = None) -> FoundBatch:
    """Returns the largest `train.batch_size` with which a step of this run fits the memory of one device.

    Args:
        run: The run; no data are read.
        device: Where the steps run; None for the first GPU, or for the CPU where there is none.

    Raises:
        InputError: Not even one patch fits, or the run spreads its model over processes.
    """
    if run.distributed.spreads:
        whole = " ".join(f"distributed.{key}=1" for key, size in run.distributed.arguments().items() if size > 1)
        raise InputError(
            "a batch is looked for in one process, which holds the whole model, and this run spreads it",
            where=f"distributed.fsdp_size={run.distributed.fsdp_size}",
            hint=f"{whole} finds a batch that fits in any case",
        )
    if device is None:
        device = torch.device("cuda", 0) if torch.cuda.is_available() and not run.train.cpu else torch.device("cpu")
    found = _measured(run, device) if device.type == "cuda" else _estimated(run)
    if found.size < 1:
        raise InputError(
            f"the memory is not enough for one patch of {'×'.join(map(str, _patch(run)))} voxels",
            where=f"{device}, {as_text(found.memory_bytes)}",
            hint="train.gradient_checkpointing=true, train.mixed_precision=bf16, or a smaller patch_size=[…]",
        )
    return found


def _patch(run: RunConfig) -> list[int]:
    return list(build_model(run)[0].config.patch_size)


def _estimated(run: RunConfig) -> FoundBatch:
    """Estimates the batch from what autograd keeps of a small patch."""
    memory = available_bytes()
    model, _ = build_model(run)
    if run.train.gradient_checkpointing:
        checkpoint_activations(model)
    per_weight = BYTES_PER_WEIGHT + (BYTES_PER_AVERAGED_WEIGHT if run.train.ema else 0)
    weights = per_weight * sum(parameter.numel() for parameter in model.parameters())
    prompts = min(run.sampling.prompts or len(run.labels), len(run.labels))
    per_patch = bytes_per_voxel(model, prompts) * math.prod(model.config.patch_size)
    size = int(max(0.0, min(_SPARE * memory - weights, 1e15)) / per_patch)
    return FoundBatch(min(size, _MOST), weights + size * per_patch, memory, is_measured=False)


def _measured(run: RunConfig, device: torch.device) -> FoundBatch:
    """Runs steps of random patches: doubles the batch until it does not fit, then halves the interval."""
    torch.cuda.empty_cache()
    memory = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)  # what other programs leave
    fits, too_large, taken = 0, _MOST + 1, 0.0
    size = 1
    while fits + 1 < too_large:
        bytes_ = _bytes_of_step(run, size, device)
        if bytes_ is not None and bytes_ <= _SPARE * memory:
            fits, taken = size, bytes_
        else:
            too_large = size
        size = min(2 * size, _MOST) if too_large > _MOST else (fits + too_large) // 2
    return FoundBatch(fits, taken, memory, is_measured=True)


def _bytes_of_step(run: RunConfig, size: int, device: torch.device) -> float | None:
    """Returns the largest memory of two steps with a batch of this size; None where the memory is not enough."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    try:
        _two_steps(run, size, device)
        return float(torch.cuda.max_memory_reserved(device))
    except RuntimeError as error:
        if not lacks_memory(error):
            raise
        return None


def _two_steps(run: RunConfig, size: int, device: torch.device) -> None:
    """Makes two optimiser steps; the second has the moments of the optimiser, too."""
    config = run.train
    model, _ = build_model(run)
    text_PT = text_rows(model, run).at(0)[: run.sampling.prompts or None]
    if run.lora.rank:
        Adapters(model, run.lora)
    model.to(device).train()  # type: ignore[arg-type]  # transformers wraps Module.to
    if config.gradient_checkpointing:
        checkpoint_activations(model)
    if config.channels_last:
        model.to(memory_format=torch.channels_last_3d)  # type: ignore[call-arg]  # transformers wraps Module.to
    optimizer = build_optimizer(model, config)
    average = start_average(model, config.ema, device)
    patch = model.config.patch_size
    volume = torch.rand(size, 1, *patch, device=device)
    targets = torch.zeros(size, len(text_PT), *patch, dtype=torch.uint8, device=device)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.mixed_precision, torch.float32)
    for _ in range(2):
        with torch.autocast(device.type, dtype, enabled=config.mixed_precision != "no"):
            output = model(volume, text_PT.to(device))
        (model.segmentation_loss(output.compared, targets, None) + output.aux_loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        if average is not None:
            average.update_parameters(model)
