"""The numbers from which the head computes the fusion weights of every voxel."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class FusionWeights(NamedTuple):
    """weight(p, v, s) = softmax over s of ⟨query_p, f_s(v)⟩ + bias_ps, over the `top_k` best where top_k > 0.

    Attributes:
        query_PC: One query per prompt in the width C of the head; zeros where the voxel does not matter.
        bias_PS: The part that does not depend on the voxel.
        top_k: 0 keeps every scale.
    """

    query_PC: Tensor
    bias_PS: Tensor
    top_k: int
