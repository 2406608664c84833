"""The order of assignments by expert, which a forward pass on a GPU keeps for its backward pass."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class AssignmentOrder(NamedTuple):
    """Tensors of int32, which are empty where the torch code runs.

    The order of the fields is that of the results of the op `moe_mlp` and of the last arguments of `moe_mlp_backward`.

    Attributes:
        permutation: (N,) the assignment at each place.
        inverse: (N,) the place of each assignment.
        offsets: (E + 1,) where the assignments of each expert begin.
    """

    permutation: Tensor
    inverse: Tensor
    offsets: Tensor
