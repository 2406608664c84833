"""The batches of one process. The step number alone decides which samples a batch holds."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader

from mome.data.sampling import PatchDataset
from mome.errors import InputError
from mome.training.config import TrainConfig


def samples_per_step(config: TrainConfig, accelerator: Accelerator) -> int:
    """Returns the number of patches of one optimiser step, over all processes and accumulated batches."""
    return config.batch_size * config.gradient_accumulation * accelerator.num_processes


def batches_from(
    start: int, steps: int, dataset: PatchDataset, config: TrainConfig, accelerator: Accelerator
) -> Iterator[dict[str, Tensor]]:
    """Returns the batches of this process from step `start` on, `gradient_accumulation` of them per step.

    Args:
        start: First step, from 0.
        steps: Steps of the whole run.
        dataset: Its samples are numbered; batch b of the run takes `batch_size` samples for each process in turn.
        config: Settings of the loop.
        accelerator: Knows the number of processes and this one's index.

    Returns:
        An iterator over what `PatchDataset` returns, stacked along a batch axis, on the accelerator's device. It
        raises the `InputError` of a damaged cache.
    """
    size, processes, rank = config.batch_size, accelerator.num_processes, accelerator.process_index
    accumulated = config.gradient_accumulation
    numbers = [
        [(batch * processes + rank) * size + i for i in range(size)]
        for batch in range(start * accumulated, steps * accumulated)
    ]
    # A DataLoader draws a seed from its generator when it starts. With the global generator, a resumed run would draw
    # once more than an uninterrupted one, and everything random after it would differ.
    device = accelerator.device
    loader = DataLoader(
        dataset,
        batch_sampler=numbers,
        num_workers=config.workers,
        generator=torch.Generator(),
        pin_memory=device.type == "cuda",  # so that a batch is copied while the GPU computes
    )
    started = iter(loader)  # forks the workers before the progress bar starts its thread
    return (
        {key: value.to(device, non_blocking=True) for key, value in batch.items()} for batch in _plain_errors(started)
    )


def _plain_errors(batches: Iterator[dict[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """Yields the batches; removes the traceback that a DataLoader writes into the error of a worker process."""
    try:
        yield from batches
    except InputError as error:
        _, worker, message = str(error).rpartition("mome.errors.InputError: ")
        if not worker:
            raise
        raise InputError(message.strip()) from error
