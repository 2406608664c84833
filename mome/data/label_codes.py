"""Overlapping structures in one label map: a voxel holds the code of the set of structures that it belongs to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from mome.errors import InputError
from mome.volumes import Grid, resample

# A table is looked up where a prompt has more codes than this; a few comparisons are faster on a CPU (our measurement).
_MOST_COMPARED = 8


def encoded(
    masks: Mapping[str, np.ndarray], names: Sequence[str], grid: Grid, target: Grid
) -> tuple[np.ndarray, list[list[int]]]:
    """Returns the codes of all masks on another grid, and the sets of structures that they stand for.

    Masks are resampled as soft masks. A voxel belongs to the structures that cover more than half of it; where none
    does, to the last one that covers exactly half.

    Args:
        masks: Structure → bool (i, j, k) on `grid`; they may overlap.
        names: The labels; masks of other structures are left out.
        grid: The grid of the masks.
        target: The grid of the result.

    Returns:
        uint8 (D, H, W), uint16 where there are more than 256 sets, and for each code the sorted indices of its
        structures in `names`; code 0 is the empty set.

    Raises:
        InputError: There are more than 65,536 sets.
    """
    sets: dict[tuple[int, ...], int] = {(): 0}
    codes = torch.zeros(tuple(target.shape), dtype=torch.int32)
    half = torch.zeros(tuple(target.shape), dtype=torch.int32)
    for number, name in enumerate(names):
        if name not in masks:
            continue
        soft = resample(torch.as_tensor(masks[name], dtype=torch.float32), grid, target, fill=0.0)
        half[soft == 0.5] = number + 1
        _add(codes, soft > 0.5, number, sets)
    for number in torch.unique(half[codes == 0]).tolist():
        if number:
            _add(codes, (codes == 0) & (half == number), number - 1, sets)
    if len(sets) > 65536:
        raise InputError(f"the structures of a case overlap in {len(sets)} ways", hint="train on fewer structures")
    dtype = np.uint8 if len(sets) <= 256 else np.uint16
    return codes.numpy().astype(dtype), [list(members) for members in sets]


def _add(codes: torch.Tensor, inside: torch.Tensor, number: int, sets: dict[tuple[int, ...], int]) -> None:
    """Adds a structure to the sets of the voxels inside."""
    present = codes[inside]
    members = list(sets)
    for code in torch.unique(present).tolist():
        larger = (*members[code], number)
        present = torch.where(codes[inside] == code, sets.setdefault(larger, len(sets)), present)
    codes[inside] = present.to(codes.dtype)


def mask_of(labels: np.ndarray, codes: Sequence[Sequence[str]], name: str) -> np.ndarray:
    """Returns the mask of one structure.

    Args:
        labels: Codes (D, H, W), or a patch of them.
        codes: Code → names of the structures.
        name: The structure.
    """
    chosen = [code for code, members in enumerate(codes) if name in members]
    if len(chosen) == 1:
        return np.asarray(labels == chosen[0])
    table = np.zeros(len(codes), dtype=bool)
    table[chosen] = True
    return table[labels]


def prompt_masks(codes_BDHW: torch.Tensor, members_BCP: torch.Tensor) -> torch.Tensor:
    """Returns the masks of all prompts, uint8 (B, P, D, H, W).

    Args:
        codes_BDHW: Codes, uint8 or int32.
        members_BCP: Bool, whether the set of a code holds a prompt.
    """
    tables_BPC = members_BCP.to(torch.uint8).transpose(1, 2)
    if codes_BDHW.is_cuda:
        cases_PDHW = [
            torch.stack([table_C.take(codes_DHW) for table_C in tables_PC])
            for tables_PC, codes_DHW in zip(tables_BPC, codes_BDHW.long(), strict=True)
        ]
        return torch.stack(cases_PDHW)
    cases, prompts, _ = tables_BPC.shape
    masks = torch.zeros(cases, prompts, *codes_BDHW.shape[1:], dtype=torch.uint8)
    for case, prompt in np.ndindex(cases, prompts):
        chosen = tables_BPC[case, prompt].nonzero().flatten().tolist()
        mask_DHW = masks[case, prompt]
        if len(chosen) > _MOST_COMPARED:
            torch.take(tables_BPC[case, prompt].contiguous(), codes_BDHW[case].long(), out=mask_DHW)
            continue
        for code in chosen:
            mask_DHW |= codes_BDHW[case] == code
    return masks


def check_codes(codes: Any, names: int) -> bool:
    """Says whether the codes in an index have the form that `encoded` returns."""
    return (
        isinstance(codes, list)
        and bool(codes)
        and codes[0] == []
        and all(isinstance(code, list) and all(isinstance(n, int) and 0 <= n < names for n in code) for code in codes)
    )
