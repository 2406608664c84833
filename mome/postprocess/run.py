"""Runs the rules of all structures on the masks of a scan, one mask at a time inside of its box."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from mome.errors import InputError
from mome.labels.own import own_label
from mome.postprocess.base import Box, MaskPlace, PostProcessor
from mome.postprocess.rules import ALL, build_rules
from mome.volumes import Grid


class BoxedMasks(Protocol):
    """Masks that can be read and replaced inside of their boxes.

    Attributes:
        names: The structures.
        shape: Voxels of the scan (i, j, k).
    """

    names: list[str]
    shape: tuple[int, int, int]

    def box(self, name: str) -> Box:
        """Returns the smallest box around a mask; (0, 0) along every axis where it is empty."""
        ...

    def crop(self, name: str) -> np.ndarray:
        """Returns a mask inside of its box, uint8 of 0 and 1."""
        ...

    def replace(self, name: str, first: tuple[int, int, int], block: np.ndarray) -> None:
        """Replaces a mask by a block, bool, whose first voxel is `first`."""
        ...


class PostProcessing:
    """The rules of the structures of one request.

    Args:
        table: Structure → rules; `*` stands for every structure, and its rules run first.
        names: The structures that are segmented.
        leave_out: Leave out rules that read a structure which is not among `names`, and say so: rules that nobody
            asked for by name must not make a request fail.

    Attributes:
        notes: A sentence for every rule that is left out.

    Raises:
        InputError: A rule reads a structure that is not among `names`, or two structures read each other.
    """

    def __init__(self, table: Mapping[str, Sequence[str]], names: Sequence[str], *, leave_out: bool = False) -> None:
        self.notes: list[str] = []
        self._built: dict[str, list[tuple[str, PostProcessor]]] = {}
        for name in names:
            # Rules of the class table's structures have their names; those of a model's own labels are read here.
            named = [rule for key in table if key == name or _means(key, name, names) for rule in table[key]]
            built = build_rules([*table.get(ALL, ()), *named])
            for _, processor in built:
                processor.reads = tuple(own_label(read, names) or read for read in processor.reads)
            self._built[name] = [pair for pair in built if self._is_possible(name, *pair, names, leave_out)]
        self._order = _ordered(self._built)

    def _is_possible(
        self, name: str, rule: str, processor: PostProcessor, names: Sequence[str], leave_out: bool
    ) -> bool:
        """Says whether the structures that a rule reads are there.

        Raises:
            InputError: One is not, and the rule is not left out; or the rule reads the mask that it changes.
        """
        if name in processor.reads:
            raise InputError(f"{rule} of {name} reads its own mask", hint="leave out this rule")
        missing = [other for other in processor.reads if other not in names]
        if missing and not leave_out:
            raise InputError(
                f"{rule} of {name} reads the mask of {missing[0]}, which is not among the prompts",
                hint=f"-p {missing[0]}",
            )
        if missing:
            self.notes.append(f"{rule} is not applied to {name}, because {missing[0]} is not among the prompts")
        return not missing

    def run(self, masks: BoxedMasks, grid: Grid) -> list[str]:
        """Replaces the masks by processed ones and returns a sentence for every change.

        Args:
            masks: The masks of the structures.
            grid: The scan's grid.
        """
        voxel_ml = abs(float(np.linalg.det(grid.affine[:3, :3]))) / 1000
        notes = []
        for name in self._order:
            for rule, processor in self._built[name]:
                box = masks.box(name)
                mask = masks.crop(name).astype(bool)
                if not mask.any():
                    break
                place = MaskPlace(grid.spacing, voxel_ml, box, masks.shape, lambda n, b: mask_inside(masks, n, b))
                done = processor.apply(mask, place)
                if done.change is None:
                    continue
                notes.append(f"{done.change} {name} ({rule})")
                if not done.mask.any():
                    notes[-1] += ", whose mask is now empty"
                masks.replace(name, (box[0][0], box[1][0], box[2][0]), done.mask)
        return notes


def _means(key: str, name: str, names: Sequence[str]) -> bool:
    """Says whether a key of a table of rules is another way to write a structure of `names`."""
    return key not in (ALL, *names) and own_label(key, names) == name


def mask_inside(masks: BoxedMasks, name: str, box: Box) -> np.ndarray:
    """Returns a mask inside of any box, bool."""
    out = np.zeros([high - low for low, high in box], dtype=bool)
    own = masks.box(name)
    into, outof = [], []
    for (low, high), (first, last) in zip(box, own, strict=True):
        start, stop = max(low, first), min(high, last)
        if start >= stop:
            return out
        into.append(slice(start - low, stop - low))
        outof.append(slice(start - first, stop - first))
    out[tuple(into)] = masks.crop(name)[tuple(outof)]
    return out


def _ordered(built: Mapping[str, Sequence[tuple[str, PostProcessor]]]) -> list[str]:
    """Returns the structures so that each comes after those whose masks its rules read.

    Raises:
        InputError: Two structures read each other.
    """
    done: list[str] = []
    waiting = list(built)
    while waiting:
        ready = [
            name
            for name in waiting
            if not any(other in waiting for _, processor in built[name] for other in processor.reads)
        ]
        if not ready:
            raise InputError(
                f"rules of post-processing read each other's masks: {', '.join(waiting[:3])}",
                hint="leave out one of these rules",
            )
        done += ready
        waiting = [name for name in waiting if name not in ready]
    return done
