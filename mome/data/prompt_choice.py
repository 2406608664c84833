"""Chooses the prompts of a training step: structures that its patches show, and structures that they do not.

The choice depends on the seed, the step and the patches of all processes, so that every process asks the same prompts.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from mome.labels import load_table
from mome.labels.label import GROUPS
from mome.labels.sides import other_side

# Keeps these draws apart from the sampler's and from those of the wordings. NumPy takes [seed, 5417, 0] for the seed
# [seed, 5417] of sample 5417; no other step has the seed of a sample.
_STREAM = 5417


@dataclass(frozen=True)
class PatchContents:
    """What a patch shows.

    Attributes:
        present: Annotated structures with a voxel in the patch, or a few voxels outside of it.
        absent: Annotated structures without one.
        focus: The structure around which the patch was cut, or None.
    """

    present: frozenset[str]
    absent: frozenset[str]
    focus: str | None = None

    def mirrored(self) -> PatchContents:
        """Returns the contents with left and right exchanged."""
        return PatchContents(
            frozenset(map(other_side, self.present)),
            frozenset(map(other_side, self.absent)),
            None if self.focus is None else other_side(self.focus),
        )


def confusable(present: Collection[str], absent: Collection[str]) -> list[str]:
    """Returns the absent structures that are easily taken for a present one, in the order of the class table.

    These are the other side of a present structure, and structures of the same anatomical group or of a group beside it
    (`mome.labels.label.GROUPS`); where one of the first two kinds exists, the third is left out. Our choice.
    Structures that the class table does not have come last, by their names, and are of the group `other`.
    """
    table, place = load_table(), {group: number for number, group in enumerate(GROUPS)}
    ordered = [label.name for label in table if label.name in absent]
    ordered += sorted(name for name in absent if name not in table)
    group = {name: place[table[name].group if name in table else "other"] for name in (*present, *ordered)}
    sides = {other_side(name) for name in present}
    groups = {group[name] for name in present}
    beside = {number + step for number in groups for step in (-1, 1)}
    near = [name for name in ordered if name in sides or group[name] in groups]
    return near or [name for name in ordered if group[name] in beside]


def choose_prompts(
    patches: Sequence[PatchContents],
    names: Sequence[str],
    count: int,
    positive: float,
    hard_negative: float,
    seed: int,
    step: int,
) -> list[int]:
    """Returns the prompts of a step.

    A share `positive` of them is present in a patch, beginning with the structures around which patches were cut; a
    share `hard_negative` is absent but annotated and `confusable`; the rest is absent but annotated. The patches take
    turns. Where a kind has too few, the others fill up, and at last structures that no patch annotates, from which
    nothing is learned.

    Args:
        patches: The contents of all patches of the step.
        names: The trained labels.
        count: Number of prompts; 0, or more than there are labels, takes all labels.
        positive, hard_negative: Shares of the prompts.
        seed: Seed of the run.
        step: Number of the step.

    Returns:
        Indices into `names`, ascending.
    """
    if not 0 < count < len(names):
        return list(range(len(names)))
    rng = np.random.default_rng([seed, _STREAM, step])
    order = rng.permutation(len(patches)).tolist()
    present = [_shuffled(rng, patches[i].present, names) for i in order]
    hard = [_shuffled(rng, confusable(patches[i].present, patches[i].absent), names) for i in order]
    absent = [_shuffled(rng, patches[i].absent, names) for i in order]
    focuses = [[name] for i in order if (name := patches[i].focus) in patches[i].present and name is not None]
    wanted_positive = round(count * positive)
    wanted_hard = min(round(count * hard_negative), count - wanted_positive)
    chosen: list[str] = []
    _take(chosen, [*focuses], wanted_positive)
    _take(chosen, present, wanted_positive)
    _take(chosen, hard, wanted_positive + wanted_hard)
    for kind in (absent, hard, present, [_shuffled(rng, names, names)]):
        _take(chosen, kind, count)
    return sorted(names.index(name) for name in chosen)


def _shuffled(rng: np.random.Generator, some: Collection[str], names: Sequence[str]) -> list[str]:
    """Returns the trained ones of some structures in random order."""
    known = [name for name in names if name in some]
    return [known[i] for i in rng.permutation(len(known))]


def _take(chosen: list[str], lists: Sequence[Sequence[str]], size: int) -> None:
    """Adds structures from the lists in turn until there are `size`, or the lists are used up."""
    for rank in range(max(map(len, lists), default=0)):
        for one in lists:
            if len(chosen) >= size:
                return
            if rank < len(one) and one[rank] not in chosen:
                chosen.append(one[rank])
