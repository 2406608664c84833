"""Checks of arguments. Messages name the argument, what it has and what was expected.

No check waits for a device: the values of ids and offsets are checked on the host for CPU tensors, and by device-side
assertions elsewhere.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

ACTIVATIONS = ("none", "relu", "silu", "gelu", "gelu_tanh")
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_INTEGER_NAMES = "uint8, int8, int16, int32 or int64"
# The kernels number rows by 32 bits. The last block of rows of a program may reach past the last row, by less than
# `LARGEST_BLOCK`.
LARGEST_BLOCK = 4096
MAX_ROWS = 2**31 - LARGEST_BLOCK


def tensors(**values: object) -> None:
    """Raises TypeError for a value that is not a dense tensor."""
    for name, value in values.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} is of type {type(value).__name__}, expected a torch.Tensor")
        if value.layout != torch.strided:
            raise TypeError(f"{name} has layout {value.layout}, expected a dense tensor")


def whole(name: str, value: object) -> None:
    """Raises TypeError for a value that is not an integer."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} is {value!r}, expected an integer")


def activation(name: str) -> None:
    """Raises ValueError for an activation that is not in `ACTIVATIONS`."""
    if name not in ACTIVATIONS:
        raise ValueError(f"activation is one of {', '.join(ACTIVATIONS)}, got {name!r}")


def shape(name: str, tensor: Tensor | None, expected: tuple[int | None, ...], legend: str) -> None:
    """Raises ValueError unless the sizes agree; None in `expected` stands for any size."""
    if tensor is None:
        return
    same = tensor.dim() == len(expected)
    if not same or any(want is not None and have != want for have, want in zip(tensor.shape, expected, strict=True)):
        wanted = ", ".join("any" if size is None else str(size) for size in expected)
        comma = "," if len(expected) == 1 else ""
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {legend} = ({wanted}{comma})")


def floating(**tensors: Tensor | None) -> None:
    """Raises TypeError for a tensor without a floating dtype of 16 bits or more; torch cannot add 8-bit floats."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in _FLOATS:
            raise TypeError(f"{name} has dtype {tensor.dtype}, expected a floating dtype of 16, 32 or 64 bits")


def same_dtype(first_name: str, first: Tensor, **tensors: Tensor | None) -> None:
    """Raises TypeError for a tensor of another dtype, since casting it would round without notice."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype != first.dtype:
            raise TypeError(
                f"{name} has dtype {tensor.dtype}, expected {first.dtype}, that of {first_name}, or autocast"
            )


def no_tangent(op: str, *tensors: Tensor | None) -> None:
    """Raises NotImplementedError for a tensor with a forward-mode tangent: an op would drop it without notice."""
    if forward_ad._current_level < 0:
        return
    for tensor in tensors:
        if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:
            raise NotImplementedError(f"{op} has no forward-mode derivative (torch.func.jvp); use torch.autograd.grad")


def integer(**tensors: Tensor | None) -> None:
    """Raises TypeError for a tensor without an integer dtype."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in _INTEGERS:
            raise TypeError(f"{name} has dtype {tensor.dtype}, expected {_INTEGER_NAMES}")


def same_device(first_name: str, first: Tensor, **tensors: Tensor | None) -> None:
    """Raises ValueError for a tensor on another device."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != first.device:
            raise ValueError(f"{name} is on {tensor.device}, expected {first.device}, where {first_name} is")


def ids(ids_TK: Tensor, tokens: int | None = None) -> None:
    """Raises TypeError or ValueError for ids that are not an integer (T, K) tensor with at most `MAX_ROWS` entries."""
    if ids_TK.dtype not in _INTEGERS:
        raise TypeError(f"ids_TK has dtype {ids_TK.dtype}, expected {_INTEGER_NAMES}")
    shape("ids_TK", ids_TK, (tokens, None), "(T, K)")
    rows("ids_TK", ids_TK, ids_TK.numel(), "assignments")


def rows(name: str, tensor: Tensor, count: int, legend: str) -> None:
    """Raises ValueError where a tensor has more rows or assignments than kernels can number."""
    # during an export the size may be symbolic: a comparison would become a bound of the exported program
    if type(count) is int and count > MAX_ROWS:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}: more than {MAX_ROWS} {legend}; split the tokens")


def ids_in_range(ids: Tensor, num_experts: int) -> None:
    """Raises ValueError for ids outside [0, E); for CPU tensors."""
    if num_experts < 1:
        raise ValueError(f"ids_TK needs at least one expert, got {num_experts}")
    if ids.numel():
        low, high = (int(value) for value in ids.aminmax())
        if low < 0 or high >= num_experts:
            raise ValueError(
                f"ids_TK has ids from {low} to {high}, expected 0 to {num_experts - 1} for {num_experts} experts"
            )


def offsets_in_order(offsets: Tensor, rows: int) -> None:
    """Raises ValueError unless offsets rise from 0 to `rows`; on a GPU this is a device-side assertion."""
    offsets = offsets.long()  # the differences of unsigned integers wrap around
    valid = (offsets[0] == 0) & (offsets[-1] == rows) & (offsets.diff() >= 0).all()
    message = f"offsets (E + 1,) must rise from 0 to the number of rows, {rows}"
    if offsets.device.type != "cpu":
        torch._assert_async(valid, message)
    elif not bool(valid):
        raise ValueError(f"{message}; got {offsets[:4].tolist()} … {offsets[-1].item()}")


def index_in_range(name: str, index: Tensor, rows: int) -> None:
    """Raises ValueError for an index outside [0, rows); on a GPU this is a device-side assertion."""
    message = f"{name} must hold integers from 0 to {rows - 1}"
    if index.device.type != "cpu":
        torch._assert_async(((index >= 0) & (index < rows)).all(), message)
    elif index.numel():
        low, high = (int(value) for value in index.aminmax())
        if low < 0 or high >= rows:
            raise ValueError(f"{message}; got {low} to {high}")


def permutation(name: str, index: Tensor) -> None:
    """Raises ValueError unless the index holds each of 0 … N − 1 once; on a GPU this is a device-side assertion."""
    index_in_range(name, index, index.numel())
    seen = torch.zeros(index.numel(), dtype=torch.bool, device=index.device)
    valid = seen.scatter_(0, index.reshape(-1).long(), True).all()
    message = f"{name} must hold each of 0 … {index.numel() - 1} once"
    if index.device.type != "cpu":
        torch._assert_async(valid, message)
    elif not bool(valid):
        raise ValueError(message)
