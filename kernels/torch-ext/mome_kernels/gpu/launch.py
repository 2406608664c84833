"""A kernel launch as a value, which can be run on a device or compiled for a GPU that is not present."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .interpreter import interpreting

_TYPES = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
}


# How Triton compiles a parameter: into the code, by its divisibility, or not at all.
_CONSTANT, _SPECIALISED, _PLAIN = "constant", "specialised", "plain"
_COMPILED: dict[tuple[Any, ...], Any] = {}  # kernels by `Launch._key`


_PARAMETERS: dict[int, tuple[Any, tuple[tuple[str, str], ...]]] = {}  # by the identity of a kernel, which it holds


def _parameters(kernel: Any) -> tuple[tuple[str, str], ...]:
    """The names of a kernel's parameters in their order, each with its kind."""
    known = _PARAMETERS.get(id(kernel))  # the hash of a kernel is that of its source, which takes longer
    if known is None:
        kinds = (
            (p.name, _CONSTANT if p.is_constexpr else _PLAIN if p.do_not_specialize else _SPECIALISED)
            for p in kernel.params
        )
        known = _PARAMETERS[id(kernel)] = kernel, tuple(kinds)
    return known[1]


@dataclass(frozen=True)
class Machine:
    """The device that launches are planned for: its name in `configs/` and its number of multiprocessors."""

    arch: str
    processors: int


@functools.lru_cache
def _machine(device: torch.device) -> Machine:
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return Machine(properties.gcnArchName.split(":")[0], properties.multi_processor_count)
    return Machine(f"sm_{properties.major}{properties.minor}", properties.multi_processor_count)


def machine_of(tensor: Tensor) -> Machine:
    """The tensor's device; an H100 for a tensor that is not on a GPU, where kernels are interpreted or only planned."""
    return _machine(tensor.device) if tensor.device.type == "cuda" else Machine("sm_90", 132)


@dataclass(slots=True)  # not frozen, which would make it slower to create than a kernel is to launch
class Launch:
    """A kernel, its grid and all its arguments by name."""

    kernel: Any
    grid: tuple[int, ...]
    args: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 2
    options: dict[str, Any] = field(default_factory=dict)

    def run(self) -> None:
        """Launches the kernel on the current stream; an empty grid does nothing."""
        if 0 in self.grid:
            return
        key = None if interpreting() else self._key()
        compiled = None if key is None else _COMPILED.get(key)
        if compiled is not None:
            # Triton's own lookup takes longer than most of our kernels run
            compiled[(*self.grid, 1, 1)[:3]](*[self.args[name] for name, _ in _parameters(self.kernel)])
            return
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages, **self.options}
        compiled = self.kernel[self.grid](**self.args, **options)
        if key is not None:
            _COMPILED[key] = compiled

    def _key(self) -> tuple[Any, ...] | None:
        """All that the compiled code depends on, as Triton specialises it; None where it depends on more.

        That is so for tensor descriptors, and on ROCm, where code depends on the size of a tensor.
        """
        if torch.version.hip:
            return None
        key: list[Any] = [
            id(self.kernel), torch.cuda.current_device(), self.num_warps, self.num_stages, *self.options.items()
        ]  # fmt: skip
        for name, kind in _parameters(self.kernel):  # keeps the kernel, so that no other one gets its identity
            value = self.args[name]
            if kind is _CONSTANT or value is None:
                key.append(value)
            elif isinstance(value, Tensor):
                key += (value.dtype, value.data_ptr() % 16 == 0)
            elif type(value) is int:
                long = abs(value) > 0x7FFFFFFF
                key.append(long if kind is _PLAIN else (value == 1, value % 16 == 0, long))
            elif type(value) is float:
                key.append(float)
            else:
                return None
        return tuple(key)

    def compile(self, target: Any) -> Any:
        """Compiles this launch, as `run` would, for a `triton.backends.compiler.GPUTarget` that need not be present."""
        from triton.compiler import ASTSource

        signature, constants, attributes = {}, {}, {}
        for i, parameter in enumerate(self.kernel.params):
            value = self.args[parameter.name]
            one = type(value) is int and value == 1 and not parameter.do_not_specialize
            if parameter.is_constexpr or value is None or one:
                signature[parameter.name], constants[(i,)] = "constexpr", value
                continue
            if isinstance(value, TensorDescriptor):
                element = _TYPES[value.base.dtype].removeprefix("*")
                signature[parameter.name] = f"tensordesc<{element}{value.block_shape}>"
                continue
            aligned = True
            if isinstance(value, Tensor):
                signature[parameter.name] = _TYPES[value.dtype]
            elif isinstance(value, float):
                signature[parameter.name], aligned = "fp32", False
            else:
                signature[parameter.name] = "i64" if abs(value) > 0x7FFFFFFF else "i32"
                aligned = value % 16 == 0 and not parameter.do_not_specialize
            if aligned:
                attributes[(i,)] = [["tt.divisibility", 16]]
        source = ASTSource(self.kernel, signature, constants, attributes)
        return triton.compile(
            source, target=target, options={"num_warps": self.num_warps, "num_stages": self.num_stages, **self.options}
        )


def ceil_div(a: int, b: int) -> int:
    """⌈a / b⌉ for host integers."""
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()


def empty(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised tensor on the same device, in the same dtype unless another is given."""
    return torch.empty(*shape, dtype=dtype or like.dtype, device=like.device)


def contiguous(*tensors: Tensor | None) -> list[Any]:
    """The tensors, with copies of those that are not contiguous; None stays None."""
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]
