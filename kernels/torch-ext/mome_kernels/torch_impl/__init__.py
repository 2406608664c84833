"""The ops in plain torch: for CPU tensors, float64 on every device, and GPUs that the Triton kernels do not support."""

from . import experts, grouped, head, head_compiled, routing

__all__ = ["experts", "grouped", "head", "head_compiled", "routing"]
