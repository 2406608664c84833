"""Training patches. The seed and the sample's number alone decide a patch, so a resumed run sees the same ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from mome.data.augmentation import Augmentation
from mome.data.cache import CachedCase, CaseCache
from mome.data.label_codes import mask_of
from mome.errors import InputError
from mome.typed import check_range


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How patches are drawn.

    Args:
        foreground: Share of the patches that are centred near a voxel of an annotated structure. Every structure is
            chosen equally often, so that small and rarely annotated ones are seen. Our choice.
        jitter: Largest distance of such a centre from the voxel, as a share of the patch's side.

    Raises:
        InputError: A value is outside its range.
    """

    foreground: float = 0.8
    jitter: float = 0.25

    def __post_init__(self) -> None:
        check_range("sampling", 0, 1, foreground=self.foreground)
        check_range("sampling", 0, 10, jitter=self.jitter)


class PatchDataset(Dataset):
    """Numbered training patches.

    Args:
        caches: One cache per source, all with the same labels.
        weights: How often each source is drawn, relative to the others.
        names: Labels, in the order of the targets' P axis.
        patch_size: Voxels (D, H, W).
        length: Number of samples of the whole run.
        seed: Seed of the run.
        sampling: See `SamplingConfig`.
        augmentation: Changes every patch; None changes none.

    Raises:
        InputError: No source has a positive weight.
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
        self.cumulative_weights = np.cumsum(np.asarray(weights, dtype=np.float64) / sum(weights))
        self.length, self.seed, self.sampling, self.augmentation = length, seed, sampling, augmentation
        # For every source: structure → indices of the cases that annotate it.
        self.cases_by_structure = [
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
        """Makes one sample.

        Returns:
            `volume` (1, D, H, W) float32 in [0, 1], `targets` (P, D, H, W) uint8 (0 or 1), `supervised` (P,) bool,
            which says what is annotated in this case, and `origin` (3,) int64, the voxel of the case at which the patch
            begins, before augmentation.
        """
        rng = np.random.default_rng([self.seed, number])
        source = int(np.searchsorted(self.cumulative_weights, rng.random(), side="right"))
        source = min(source, len(self.caches) - 1)  # rounding can leave the last cumulative weight below 1
        case, centre = self._choose_centre(rng, source)
        volume, labels = crop(case.volume, centre, self.patch), crop(case.labels, centre, self.patch)
        targets = np.stack([mask_of(labels, case.codes, name) for name in self.names])
        supervised = np.array([name in case.annotated for name in self.names])
        patch = volume.astype(np.float32) / 255
        if self.augmentation is not None:
            patch, targets, supervised = self.augmentation(rng, patch, targets, supervised)
        return {
            "volume": torch.from_numpy(np.ascontiguousarray(patch))[None],
            "targets": torch.from_numpy(np.ascontiguousarray(targets)).to(torch.uint8),
            "supervised": torch.from_numpy(supervised),
            "origin": torch.tensor(patch_start(case.volume.shape, centre, self.patch)),
        }

    def _choose_centre(self, rng: np.random.Generator, source: int) -> tuple[CachedCase, list[int]]:
        """Returns a case of the source, and the voxel on which the patch is centred."""
        cache, structures = self.caches[source], self.cases_by_structure[source]
        if structures and rng.random() < self.sampling.foreground:
            name = list(structures)[rng.integers(len(structures))]
            case = cache[structures[name][rng.integers(len(structures[name]))]]
            voxels = case.voxels[name]
            if len(voxels):
                voxel = np.unravel_index(int(voxels[rng.integers(len(voxels))]), case.volume.shape)
                jitter = [self.sampling.jitter * side for side in self.patch]
                return case, [int(v + rng.uniform(-j, j)) for v, j in zip(voxel, jitter, strict=True)]
        case = cache[int(rng.integers(len(cache)))]
        return case, [int(rng.integers(side)) for side in case.volume.shape]


def patch_start(shape: Sequence[int], centre: Sequence[int], patch: Sequence[int]) -> list[int]:
    """The first voxel of the patch around `centre`, shifted to lie inside; negative on axes shorter than the patch."""
    return [
        min(max(middle - side // 2, 0), size - side) if size >= side else (size - side) // 2
        for middle, side, size in zip(centre, patch, shape, strict=True)
    ]


def crop(array: np.ndarray, centre: Sequence[int], patch: Sequence[int]) -> np.ndarray:
    """Returns the patch around `centre`, shifted to lie inside the array.

    Axes shorter than the patch are padded with 0 (air).

    Args:
        array: (D, H, W).
        centre: Voxel in the middle of the patch; it may lie outside the array.
        patch: Voxels (D, H, W) of the patch.
    """
    out = np.zeros(tuple(patch), dtype=array.dtype)
    read, write = [], []
    starts = patch_start(array.shape, centre, patch)
    for start, side, size in zip(starts, patch, array.shape, strict=True):
        low, high = max(start, 0), min(start + side, size)
        read.append(slice(low, high))
        write.append(slice(low - start, high - start))
    out[tuple(write)] = array[tuple(read)]
    return out
