"""Takes rows of tokens and sums rows by token, in a fixed order on every device, so that results are reproducible.

On CPUs scatter_add has a fixed order and index_put has not (its threads add atomically); on GPUs it is the reverse.
"""

from __future__ import annotations

import torch
from torch import Tensor


def take_rows(x_TD: Tensor, tokens_N: Tensor) -> Tensor:
    """x[tokens]: (T, D) → (N, D). Its gradient sums in a fixed order, too."""
    if x_TD.device.type == "cpu":
        return x_TD.gather(0, tokens_N[:, None].expand(-1, x_TD.shape[1]))
    return x_TD[tokens_N]


def sum_rows(y_ND: Tensor, tokens_N: Tensor, tokens: int) -> Tensor:
    """The sum of the rows of each of T tokens: (N, D) → (T, D), computed and returned in float32 at least."""
    y_ND = y_ND.to(torch.promote_types(y_ND.dtype, torch.float32))
    y_TD = y_ND.new_zeros(tokens, y_ND.shape[1])
    if y_ND.device.type == "cpu":
        return y_TD.scatter_add(0, tokens_N[:, None].expand(-1, y_ND.shape[1]), y_ND)
    return y_TD.index_put((tokens_N,), y_ND, accumulate=True)
