"""The order of assignments by expert in one tensor, which a forward pass keeps for its backward pass."""

from __future__ import annotations


def kept_length(experts: int, assignments: int) -> int:
    """The length of permutation (N,), inverse (N,) and offsets (E + 1,), one behind the other."""
    return 2 * assignments + experts + 1
