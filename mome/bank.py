"""The bank of text rows (L labels, width T): what a new one holds, and how rows follow their labels' names."""

from __future__ import annotations

import torch
from torch import Tensor

from mome.configuration import MoMEConfig


def first_bank(config: MoMEConfig, like_LT: Tensor) -> Tensor:
    """One-hot rows where the text encoder only numbers its labels; else zeros, which stand for "not set yet"."""
    if config.has_one_hot_text:
        return torch.eye(*like_LT.shape, dtype=like_LT.dtype, device=like_LT.device)
    return torch.zeros_like(like_LT)


def rows_by_name(bank_LT: Tensor, before: list[str], after: list[str], *, one_hot: bool) -> Tensor:
    """The bank for another list of labels.

    Args:
        bank_LT: Rows of the labels `before`.
        after: The new labels.
        one_hot: Labels without a row get a column that no other label uses, instead of zeros. There are at least as
            many columns as labels (`MoMEConfig.check_labels`).
    """
    index = {name: i for i, name in enumerate(before)}
    rows = bank_LT.new_zeros(len(after), bank_LT.shape[1])
    for i, name in enumerate(after):
        if name in index:
            rows[i] = bank_LT[index[name]]
    if one_hot:
        free = [column for column in range(rows.shape[1]) if not rows[:, column].any()]
        for i, column in zip([i for i, name in enumerate(after) if name not in index], free, strict=False):
            rows[i, column] = 1
    return rows
