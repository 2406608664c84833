"""The batches of one process. The step number alone decides which samples a batch holds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

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
    numbers = _Numbers(range(start * accumulated, steps * accumulated), size, processes, rank)
    on_device = dataset.augmentation is None or dataset.augmentation.runs_on(accelerator.device)
    # A DataLoader draws a seed from its generator when it starts. With the global generator, a resumed run would draw
    # once more than an uninterrupted one, and everything random after it would differ.
    loader = DataLoader(
        _StoredPatches(dataset),
        batch_sampler=numbers,
        num_workers=config.workers,
        generator=torch.Generator(),
        collate_fn=dataset.collate if on_device else dataset.finished,
        pin_memory=accelerator.device.type == "cuda",  # so that a batch is copied while the GPU computes
    )
    started = iter(loader)  # forks the workers before the progress bar starts its thread
    return (dataset.finish(batch, accelerator.device) for batch in _plain_errors(started))


@dataclass(frozen=True)
class _Numbers:
    """The numbers of the samples of every batch; they are computed one batch at a time, since a run may be long."""

    batches: range
    size: int
    processes: int
    rank: int

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.batches:
            first = (batch * self.processes + self.rank) * self.size
            yield list(range(first, first + self.size))


class _StoredPatches(Dataset):
    """The samples of a `PatchDataset` as they are stored: small to send from a worker, and augmented as batches."""

    def __init__(self, patches: PatchDataset) -> None:
        self.patches = patches

    def __len__(self) -> int:
        return len(self.patches)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        return self.patches.read(number)


def _plain_errors(batches: Iterator[dict[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """Yields the batches; removes the traceback that a DataLoader writes into the error of a worker process."""
    try:
        yield from batches
    except InputError as error:
        _, worker, message = str(error).rpartition("mome.errors.InputError: ")
        if not worker:
            raise
        raise InputError(message.strip()) from error
