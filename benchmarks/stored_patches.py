"""Augmented training patches in files, made ahead by several processes and read by every training with the same seed.

Volumes are kept in 8 bits and masks in one bit each. A patch is the same whether it is read from a file or drawn.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mome.data.sampling import PatchDataset

_PATIENCE_S = 60


def pack(sample: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """Returns a sample of a `PatchDataset` in 8 bits per voxel and one bit per mask."""
    return {
        "volume": (sample["volume"] * 255).round().to(torch.uint8).numpy(),
        "targets": np.packbits(sample["targets"].numpy(), axis=0, bitorder="little"),
        "supervised": sample["supervised"].numpy().astype(np.uint8),
        "origin": sample["origin"].numpy(),
    }


def unpack(packed: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Returns the batch that packed patches, stacked along a first axis, stand for, on a device."""
    if device.type == "cuda":  # a copy from pinned memory does not wait for the steps before
        packed = {name: values.pin_memory() for name, values in packed.items()}
    moved = {name: values.to(device, non_blocking=True) for name, values in packed.items()}
    prompts = moved["supervised"].shape[1]
    bits = torch.arange(8, device=device, dtype=torch.uint8).view(1, 1, 8, 1, 1, 1)
    masks = (moved["targets"][:, :, None] >> bits) & 1
    return {
        "volume": moved["volume"].float() / 255,
        "targets": masks.flatten(1, 2)[:, :prompts],
        "supervised": moved["supervised"].bool(),
        "origin": moved["origin"],
    }


class StoredPatches:
    """The patches of one seed in a folder.

    Args:
        folder: The folder; the first process to come makes its files.
        dataset: Makes the patches.
        slots: Number of patches that the files hold; the newest replace those that the one reader has read. None holds
            all patches of the run, for any number of readers.
    """

    def __init__(self, folder: Path, dataset: PatchDataset, slots: int | None = None) -> None:
        self.dataset = dataset
        self.slots = count = min(slots or len(dataset), len(dataset))
        patch, prompts = dataset.patch, len(dataset.names)
        shapes = {
            "volume": (np.uint8, (count, 1, *patch)),
            "targets": (np.uint8, (count, -(-prompts // 8), *patch)),
            "supervised": (np.uint8, (count, prompts)),
            "origin": (np.int64, (count, 3)),
            "holds": (np.int64, (count,)),  # number of the patch, from 1
            "position": (np.int64, (1,)),
        }
        folder.mkdir(parents=True, exist_ok=True)
        self.arrays: dict[str, np.memmap] = {}
        for name, (dtype, shape) in shapes.items():
            path = folder / f"{name}.bin"
            with path.open("ab") as file:  # all processes make the same sparse file
                file.truncate(int(np.prod(shape)) * np.dtype(dtype).itemsize)
            self.arrays[name] = np.memmap(path, dtype, "r+", shape=shape)

    def write(self, worker: int, workers: int) -> None:
        """Makes every `workers`-th patch, as far ahead of the reader as there are slots; returns after the last one."""
        for number in range(worker, len(self.dataset), workers):
            slot = number % self.slots
            if self.arrays["holds"][slot] == number + 1:
                continue
            while number >= self.arrays["position"][0] + self.slots:
                time.sleep(0.02)
            for name, values in pack(self.dataset[number]).items():
                self.arrays[name][slot] = values
            self.arrays["holds"][slot] = number + 1

    def batch(self, start: int, size: int) -> dict[str, Tensor]:
        """Returns packed patches `start` to `start + size`, once they are made; TimeoutError after a minute."""
        if self.slots < len(self.dataset):
            self.arrays["position"][0] = start
        numbers = np.arange(start, start + size)
        slots = numbers % self.slots
        latest = time.time() + _PATIENCE_S
        while (self.arrays["holds"][slots] != numbers + 1).any():
            if time.time() > latest:
                raise TimeoutError(f"patches {start} to {start + size} were not made within {_PATIENCE_S} s")
            time.sleep(0.002)
        names = ("volume", "targets", "supervised", "origin")
        return {name: torch.from_numpy(self.arrays[name][slots]) for name in names}


def drawn_batch(dataset: PatchDataset, start: int, size: int) -> dict[str, Tensor]:
    """Returns packed patches like `StoredPatches.batch`, made at once by this process."""
    samples = [pack(dataset[start + i]) for i in range(size)]
    return {name: torch.from_numpy(np.stack([sample[name] for sample in samples])) for name in samples[0]}
