"""Training patches. The seed and the sample's number alone decide a patch, so a resumed run sees the same ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from mome.data.augmentation import BatchAugmentation
from mome.data.cache import CaseCache
from mome.data.label_codes import prompt_masks
from mome.data.mapped_pages import release_pages
from mome.data.patch_box import cut_middle, patch_start, read_box
from mome.data.prompt_choice import PatchContents, choose_prompts
from mome.data.sampling_config import SamplingConfig
from mome.data.structure_places import structures_in
from mome.errors import InputError, did_you_mean
from mome.labels.sides import has_no_other_side, other_side

# Patches of a step whose contents decide its prompts; every process looks at all of them.
_MOST_LOOKED_AT = 64
_LARGEST_BEYOND = 0.25  # below a half, so that every patch shows a part of its case


@dataclass(frozen=True)
class PatchPlace:
    """Where a patch is cut out.

    Attributes:
        source: Index of the cache.
        case: Index of the case in it.
        centre: Voxel in the middle of the patch; it may lie outside of the case.
        focus: The structure that the patch was drawn for, or None; with `sampling.cut`, the centre may lie far from it.
        beyond: Share of the patch's side by which it may lie outside of the case.
    """

    source: int
    case: int
    centre: tuple[int, ...]
    focus: str | None
    beyond: float = 0.0


class PatchDataset(Dataset):
    """Numbered training patches.

    Args:
        caches: One cache per source, all with the same labels.
        weights: How often each source is drawn, relative to the others.
        names: Labels; without `sampling.prompts`, the targets' P axis has their order.
        patch_size: Voxels (D, H, W).
        length: Number of samples of the whole run.
        seed: Seed of the run.
        sampling: See `SamplingConfig`.
        augmentation: Changes every patch; None changes none.
        samples_per_step: Patches of one optimiser step over all processes, which share their prompts.
        height_axis: Axis of (D, H, W) that runs along the body, as 2 on a RAS grid.

    Raises:
        InputError: No source has a positive weight, a structure with a weight of its own is not trained, or all have
            the weight 0.
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
        augmentation: BatchAugmentation | None = None,
        samples_per_step: int = 1,
        height_axis: int = 2,
    ) -> None:
        if not caches or sum(weights) <= 0:
            raise InputError("there is nothing to train on: no source has a positive weight")
        self.caches, self.names, self.patch = list(caches), list(names), tuple(patch_size)
        balanced = [weight * len(cache) ** sampling.balance for weight, cache in zip(weights, self.caches, strict=True)]
        self.cumulative_weights = np.cumsum(np.asarray(balanced, dtype=np.float64) / sum(balanced))
        self.length, self.seed, self.sampling, self.augmentation = length, seed, sampling, augmentation
        self.samples_per_step, self.height_axis = samples_per_step, height_axis
        unknown = [name for name in sampling.structures if name not in self.names]
        if unknown:
            raise InputError(
                f"sampling.structures names {unknown[0]!r:.60}, which is not trained"
                + did_you_mean(unknown[0][:60], self.names)
            )
        if sampling.foreground and not any(sampling.structures.get(name, 1) for name in self.names):
            raise InputError(
                "sampling.structures gives every trained structure the weight 0, and sampling.foreground="
                f"{sampling.foreground:g} draws patches near one",
                hint="sampling.foreground=0, or a weight above 0",
            )
        # For every source: structure → indices of the cases that annotate it with at least one voxel.
        self.cases_by_structure = [
            {
                name: cases
                for name in self.names
                if sampling.structures.get(name, 1) > 0
                and (cases := [i for i in range(len(cache)) if cache.voxel_counts(i).get(name)])
            }
            for cache in self.caches
        ]
        self._prompts: tuple[int, list[int]] | None = None  # of the last step that was asked for

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        """Makes one finished sample.

        Returns:
            `volume` (1, D, H, W) float32 in [0, 1], `targets` (P, D, H, W) uint8 (0 or 1), `supervised` (P,) bool,
            which says what is annotated in this case, and `origin` (3,) int64, the voxel of the case at which the patch
            begins, before augmentation. P are the prompts of the sample's step.
        """
        return {name: value[0] for name, value in self.finished([self.read(number)]).items()}

    def place(self, number: int) -> PatchPlace:
        """Returns where a patch is cut out."""
        rng = np.random.default_rng([self.seed, number])
        place = self._draw(rng)
        if self.sampling.beyond and rng.random() < self.sampling.beyond:
            place = replace(place, beyond=rng.uniform(0, _LARGEST_BEYOND))
        if self.sampling.cut and place.focus and rng.random() < self.sampling.cut:
            place = replace(place, centre=self._cut_centre(place, place.focus, rng))
        return place

    def read(self, number: int) -> dict[str, Tensor]:
        """Reads one sample as it is stored; `finish` makes a batch of them ready.

        Returns:
            `volume` uint8 and `codes` (D, H, W) with the margin of the augmentation, `members` (codes, P) bool, which
            says to which prompts a code belongs, `supervised` (P,), `origin` (3,) and `number` ().
        """
        place = self.place(number)
        case = self.caches[place.source][place.case]
        margin = (0, 0, 0) if self.augmentation is None else self.augmentation.margin(self.patch)
        start = patch_start(case.volume.shape, place.centre, self.patch, place.beyond)
        low = [first - more for first, more in zip(start, margin, strict=True)]
        size = [side + 2 * more for side, more in zip(self.patch, margin, strict=True)]
        codes = read_box(case.labels, low, size)
        if int(codes.max()) >= len(case.members):  # found here, not as an index out of range on a GPU
            raise InputError(
                f"case {case.name!r:.60} of a training cache has a code that its index does not name",
                where=str(self.caches[place.source].folder),
                hint="remove this folder; the next run builds it again",
            )
        volume = read_box(case.volume, low, size)
        for array in (case.volume, case.labels):
            release_pages(array)
        swaps = self.augmentation is not None and self.augmentation.swaps_sides(number)
        asked = [self.names[i] for i in self.prompts_at(number // self.samples_per_step)]
        stored = [other_side(name) for name in asked] if swaps else asked
        columns = [self.caches[place.source].label_names.index(name) for name in stored]
        return {
            "volume": torch.from_numpy(volume),
            "codes": torch.from_numpy(codes if codes.dtype == np.uint8 else codes.astype(np.int32)),
            "members": torch.from_numpy(case.members[:, columns]),
            # A structure of one side is on the wrong one in a mirrored patch, which teaches nothing of it.
            "supervised": torch.tensor(
                [name in case.annotated and not (swaps and has_no_other_side(name)) for name in stored]
            ),
            "origin": torch.tensor(start),
            "number": torch.tensor(number),
        }

    def collate(self, samples: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Stacks what `read` returned; cases with fewer codes get codes that no voxel has."""
        most = max(len(sample["members"]) for sample in samples)
        wide = any(sample["codes"].dtype != torch.uint8 for sample in samples)

        def fitted(name: str, value: Tensor) -> Tensor:
            if name == "members":
                return torch.cat([value, value.new_zeros(most - len(value), value.shape[1])])
            return value.int() if name == "codes" and wide else value

        return {name: torch.stack([fitted(name, sample[name]) for sample in samples]) for name in samples[0]}

    def finish(self, batch: dict[str, Tensor], device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """Moves a batch to a device, augments it there and makes its targets.

        Args:
            batch: What `collate` returned, or what `finish` returned before, which is only moved.
            device: The device.

        Returns:
            What `__getitem__` returns, stacked along a batch axis.
        """
        numbers = batch["number"].tolist() if "number" in batch else []
        batch = {name: value.to(device, non_blocking=True) for name, value in batch.items() if name != "number"}
        if "codes" not in batch:
            return batch
        volume_BDHW, codes_BDHW = batch["volume"].to(torch.float32) / 255, batch["codes"]
        if self.augmentation is not None:
            volume_BDHW, codes_BDHW = self.augmentation(volume_BDHW, codes_BDHW, numbers, self.patch)
        return {
            "volume": volume_BDHW[:, None],
            "targets": prompt_masks(codes_BDHW, batch["members"]),
            "supervised": batch["supervised"],
            "origin": batch["origin"],
        }

    def finished(self, samples: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Stacks what `read` returned and finishes it on the CPU."""
        return self.finish(self.collate(samples))

    def prompts_at(self, step: int) -> list[int]:
        """Returns the prompts of an optimiser step, as ascending indices into `names`; see `choose_prompts`."""
        if self._prompts is None or self._prompts[0] != step:
            chosen = list(range(len(self.names)))
            if 0 < self.sampling.prompts < len(self.names):
                first = step * self.samples_per_step
                looked_at = min(self.samples_per_step, _MOST_LOOKED_AT)
                patches = [self._contents(number) for number in range(first, first + looked_at)]
                chosen = choose_prompts(
                    patches, self.names, self.sampling.prompts, self.sampling.positive, self.sampling.hard_negative,
                    self.seed, step,
                )  # fmt: skip
            self._prompts = (step, chosen)
        return self._prompts[1]

    def cases_at(self, step: int) -> list[str]:
        """Returns the names of the cases that a step sees, over all processes, for messages."""
        first = step * self.samples_per_step
        places = [self.place(number) for number in range(first, first + self.samples_per_step)]
        return list(dict.fromkeys(self.caches[place.source].index[place.case]["name"] for place in places))

    def _contents(self, number: int) -> PatchContents:
        """Returns what a patch shows, without reading its voxels."""
        place = self.place(number)
        cache = self.caches[place.source]
        entry = cache.index[place.case]
        start = patch_start(entry["shape"], place.centre, self.patch, place.beyond)
        blocks = cache.places(place.case).blocks
        present = structures_in(blocks, entry["shape"], entry["annotated"], start, self.patch)
        contents = PatchContents(present, frozenset(entry["annotated"]) - present, place.focus)
        swaps = self.augmentation is not None and self.augmentation.swaps_sides(number)
        return contents.mirrored() if swaps else contents

    def _draw(self, rng: np.random.Generator) -> PatchPlace:
        source = int(np.searchsorted(self.cumulative_weights, rng.random(), side="right"))
        source = min(source, len(self.caches) - 1)  # rounding can leave the last cumulative weight below 1
        cache, structures = self.caches[source], self.cases_by_structure[source]
        if structures and rng.random() < self.sampling.foreground:
            name = self._draw_structure(rng, list(structures))
            number = structures[name][rng.integers(len(structures[name]))]
            voxels, shape = cache.places(number).voxels[name], cache.index[number]["shape"]
            voxel = np.unravel_index(int(voxels[rng.integers(len(voxels))]), shape)
            jitter = [self.sampling.jitter * side for side in self.patch]
            centre = tuple(int(v + rng.uniform(-j, j)) for v, j in zip(voxel, jitter, strict=True))
            return PatchPlace(source, int(number), centre, name)
        number = int(rng.integers(len(cache)))
        return PatchPlace(source, number, tuple(int(rng.integers(side)) for side in cache.index[number]["shape"]), None)

    def _cut_centre(self, place: PatchPlace, name: str, rng: np.random.Generator) -> tuple[int, ...]:
        """Moves a patch in height so that it ends inside a structure, where its case has room for that.

        Along the other axes it stays, so that a small patch may miss the end of a structure that bends.
        """
        axis, cache = self.height_axis, self.caches[place.source]
        shape = cache.index[place.case]["shape"]
        heights = np.unravel_index(cache.places(place.case).voxels[name], shape)[axis]
        middle = cut_middle(int(heights.min()), int(heights.max()), shape[axis], self.patch[axis], rng)
        return tuple(middle if i == axis and middle is not None else v for i, v in enumerate(place.centre))

    def _draw_structure(self, rng: np.random.Generator, names: list[str]) -> str:
        if not self.sampling.structures:
            return names[rng.integers(len(names))]
        weights = np.array([self.sampling.structures.get(name, 1.0) for name in names], dtype=np.float64)
        return names[int(rng.choice(len(names), p=weights / weights.sum()))]
