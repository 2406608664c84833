"""Assignments sorted by expert, and cut into blocks whose rows stay in cache."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .. import checks

BLOCK_BYTES = 4 << 20  # size of z within one block


def route(ids_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Counts (E,), offsets (E + 1,), permutation (N,) and its inverse; see `mome_kernels.route`."""
    flat = ids_TK.reshape(-1)
    counts, permutation = _sorted(flat, num_experts)
    inverse = torch.empty_like(permutation)
    inverse[permutation] = torch.arange(permutation.numel(), device=flat.device)
    offsets = torch.zeros(num_experts + 1, dtype=torch.int64, device=flat.device)
    torch.cumsum(counts, 0, out=offsets[1:])
    return counts.int(), offsets.int(), permutation, inverse


def _sorted(ids_N: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Counts (E,), and the stable order of the assignments by expert (N,)."""
    if ids_N.device.type == "cpu":
        checks.ids_in_range(ids_N, num_experts)
        counts = torch.bincount(ids_N, minlength=num_experts)
    else:  # bincount would wait for the device; adding integers atomically gives the same counts in any order
        counts = torch.zeros(num_experts, dtype=torch.int64, device=ids_N.device)
        counts.scatter_add_(0, ids_N.long(), torch.ones_like(ids_N, dtype=torch.int64))
    # int16 keys sort several times faster than int64 keys
    keys = ids_N.to(torch.int16) if num_experts < 32768 else ids_N
    return counts, torch.sort(keys, stable=True).indices


class ExpertBlocks:
    """The assignments in expert order, cut into blocks of one expert each.

    Args:
        ids_TK: Experts of every token.
        num_experts: E.
        row_bytes: The size of one row of z; a block holds `BLOCK_BYTES` of them, and at least 512 rows.

    Attributes:
        slots: (N,) from a sorted row to its assignment t · K + k.
        tokens: (N,) from a sorted row to its token t.
        largest: Rows of the largest block.
    """

    def __init__(self, ids_TK: Tensor, num_experts: int, row_bytes: int) -> None:
        counts, self.slots = _sorted(ids_TK.reshape(-1), num_experts)
        self.counts = counts.tolist()
        self.per_token = ids_TK.shape[1]
        one = self.per_token == 1
        self.tokens = self.slots if one else torch.div(self.slots, self.per_token, rounding_mode="floor")
        size = max(512, BLOCK_BYTES // max(1, row_bytes))
        # the blocks of an expert have about one size: a small last block would be slow
        self.blocks = [-(-count // size) for count in self.counts]
        pairs = zip(self.counts, self.blocks, strict=True)
        self.largest = max((-(-count // blocks) for count, blocks in pairs if blocks), default=0)

    def __iter__(self) -> Iterator[tuple[int, slice, Tensor, bool]]:
        """Yields (expert, rows, their tokens, whether this is the expert's first block), expert after expert."""
        start = 0
        for expert, (count, blocks) in enumerate(zip(self.counts, self.blocks, strict=True)):
            for block in range(blocks):
                rows = slice(start + count * block // blocks, start + count * (block + 1) // blocks)
                yield expert, rows, self.tokens[rows], block == 0
            start += count

    def new_output(self, like: Tensor, width: int) -> Tensor:
        """An output (T, width) for `add_rows`; not initialised where K = 1, since every row is then written."""
        tokens = self.tokens.numel() // max(1, self.per_token)
        return like.new_empty(tokens, width) if self.per_token == 1 else like.new_zeros(tokens, width)

    def add_rows(self, out_TD: Tensor, tokens_n: Tensor, y_nD: Tensor) -> None:
        """Adds rows to their tokens, one expert after the other: the order of the sums is fixed."""
        if self.per_token == 1:
            out_TD.index_copy_(0, tokens_n, y_nD)
        elif out_TD.device.type == "cpu":
            out_TD.index_add_(0, tokens_n, y_nD)
        else:  # index_put sorts the index first; index_add would add atomically, in no fixed order
            out_TD.index_put_((tokens_n,), y_nD, accumulate=True)
