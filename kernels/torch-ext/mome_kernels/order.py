"""The order of assignments by expert in one tensor, which a forward pass keeps for its backward pass."""

from __future__ import annotations

_ALIGNED = 4  # numbers of int32 in 16 bytes: Triton compiles a kernel twice if an address is not always a multiple


def inverse_start(assignments: int) -> int:
    """Where the inverse begins, behind the permutation; the offsets begin as far behind it."""
    return -(-assignments // _ALIGNED) * _ALIGNED


def kept_length(experts: int, assignments: int) -> int:
    """The length of permutation (N,), inverse (N,) and offsets (E + 1,), each at a multiple of 16 bytes."""
    return 2 * inverse_start(assignments) + experts + 1
