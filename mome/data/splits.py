"""Splits cases into training and validation cases by patient, without a list that has to be kept."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from mome.data.case import Case
from mome.errors import InputError

PARTS = ("all", "train", "val")


def part_of(cases: Sequence[Case], part: str, held_out: float) -> list[Case]:
    """Returns the cases of one part.

    Cases that name their split themselves keep it. Of the others a patient is held out where the hash of the name is
    among the smallest: it stays there when cases are added, and all cases of a patient are in one part.

    Args:
        cases: All cases.
        part: `all`, `train` or `val`.
        held_out: Share of the patients that are held out for validation.

    Raises:
        InputError: There is no such part, or a patient's cases are not all in one.
    """
    if part not in PARTS:
        raise InputError(f"a part is all, train or val, got {part!r:.60}")
    if part == "all":
        return list(cases)
    parts = [case.split or _split(case.patient, held_out) for case in cases]
    first: dict[str, str] = {}
    for case, own in zip(cases, parts, strict=True):
        if (other := first.setdefault(case.patient, own)) != own:  # a validation would score what was trained on
            raise InputError(
                f"patient {case.patient!r:.60} is in {other} and, with case {case.name!r:.60}, in {own}",
                where=str(case.image),
                hint="move the patient's cases together; mome data check lists all of them",
            )
    return [case for case, own in zip(cases, parts, strict=True) if own == part]


def _split(patient: str, held_out: float) -> str:
    digest = hashlib.blake2b(patient.encode(), digest_size=8).digest()
    return "val" if int.from_bytes(digest, "big") < held_out * 2**64 else "train"
