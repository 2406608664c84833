"""Expert layers and the text-guided fusion head as torch ops.

The package depends on torch, and on triton for its GPU kernels. `functional.py` holds the public functions and the
legend of their shapes; `reference.py` computes the same in the plainest torch code.
"""

from __future__ import annotations

from . import flops, reference
from .functional import combine, fusion_head, grouped_linear, moe_linear, moe_mlp, route

__all__ = ["combine", "fusion_head", "grouped_linear", "moe_linear", "moe_mlp", "reference", "route"]

flops.register()
