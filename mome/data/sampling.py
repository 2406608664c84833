"""Training patches as a pure function of (seed, sample number): a resumed run sees what it would have seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from mome.data.augmentation import Augmentation
from mome.data.cache import CachedCase, CaseCache
from mome.errors import InputError


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How patches are drawn.

    Args:
        foreground: Share of the patches that are centred near a voxel of a randomly chosen annotated structure
            (every structure equally often, so that small and rarely annotated ones are seen).
        jitter: Largest shift of such a centre, as a share of the patch's side.
    """

    foreground: float = 0.8
    jitter: float = 0.25


class PatchDataset(Dataset):
    """Sample number → patch. Sources are drawn with `weights`, cases of a source uniformly.

    Args:
        caches: One cache per source, all with the same label names.
        weights: Relative frequency of each source.
        names: Labels, in the order of the targets' P axis.
        patch_size: Voxels (D, H, W).
        length: Number of samples of the whole run.
        seed: Of the run.
    """

    def __init__(
        self,
        caches: Sequence[CaseCache],
        weights: Sequence[float],
        names: Sequence[str],
        patch_size: Sequence[int],
        length: int,
        seed: int,
        sampling: SamplingConfig = SamplingConfig(),  # noqa: B008 - frozen
        augmentation: Augmentation | None = None,
    ) -> None:
        if not caches or sum(weights) <= 0:
            raise InputError("there is nothing to train on: no source has a positive weight")
        self.caches, self.names, self.patch = list(caches), list(names), tuple(patch_size)
        self.share = np.cumsum(np.asarray(weights, dtype=np.float64) / sum(weights))
        self.length, self.seed, self.sampling, self.augmentation = length, seed, sampling, augmentation
        # Structures of a source, and the cases that have each: what is annotated rarely is drawn as often.
        self.by_structure = [
            {
                name: cases
                for name in self.names
                if (cases := [i for i, entry in enumerate(cache.index) if name in entry["annotated"]])
            }
            for cache in self.caches
        ]

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        """`volume` (1, D, H, W) float32, `targets` (P, D, H, W) uint8, `supervised` (P,) bool."""
        rng = np.random.default_rng([self.seed, number])
        source = int(np.searchsorted(self.share, rng.random(), side="right"))
        source = min(source, len(self.caches) - 1)
        case, centre = self._place(rng, source)
        volume, labels = crop(case.volume, centre, self.patch), crop(case.labels, centre, self.patch)
        targets = np.stack([labels == number for number in range(1, len(self.names) + 1)])
        supervised = np.array([name in case.annotated for name in self.names])
        patch = volume.astype(np.float32) / 255
        if self.augmentation is not None:
            patch, targets, supervised = self.augmentation(rng, patch, targets, supervised)
        return {
            "volume": torch.from_numpy(np.ascontiguousarray(patch))[None],
            "targets": torch.from_numpy(np.ascontiguousarray(targets)).to(torch.uint8),
            "supervised": torch.from_numpy(supervised),
        }

    def _place(self, rng: np.random.Generator, source: int) -> tuple[CachedCase, list[int]]:
        cache, structures = self.caches[source], self.by_structure[source]
        if structures and rng.random() < self.sampling.foreground:
            name = list(structures)[rng.integers(len(structures))]
            case = cache[structures[name][rng.integers(len(structures[name]))]]
            voxels = case.voxels[name]
            if len(voxels):
                at = np.unravel_index(int(voxels[rng.integers(len(voxels))]), case.volume.shape)
                reach = [self.sampling.jitter * side for side in self.patch]
                return case, [int(a + rng.uniform(-r, r)) for a, r in zip(at, reach, strict=True)]
        case = cache[int(rng.integers(len(cache)))]
        return case, [int(rng.integers(side)) for side in case.volume.shape]


def crop(array: np.ndarray, centre: Sequence[int], patch: Sequence[int]) -> np.ndarray:
    """The patch around `centre`, moved inside the array where it fits, padded with 0 (air) where it does not."""
    out = np.zeros(tuple(patch), dtype=array.dtype)
    read, write = [], []
    for c, side, size in zip(centre, patch, array.shape, strict=True):
        start = min(max(c - side // 2, 0), size - side) if size >= side else (size - side) // 2
        lo, hi = max(start, 0), min(start + side, size)
        read.append(slice(lo, hi))
        write.append(slice(lo - start, hi - start))
    out[tuple(write)] = array[tuple(read)]
    return out
