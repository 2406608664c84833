"""Activations inside kernels, in float32, and their derivatives."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def activate(z, ACT: tl.constexpr):
    """a(z) for ACT in none, relu, silu, gelu (erf), gelu_tanh."""
    if ACT == "gelu":
        return 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    elif ACT == "gelu_tanh":
        # ½(1 + tanh u) = σ(2u): one exponential instead of a tanh
        return z * tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
    elif ACT == "silu":
        return z * tl.sigmoid(z)
    elif ACT == "relu":
        return tl.maximum(z, 0.0)
    else:
        return z


@triton.jit
def activate_slope(z, ACT: tl.constexpr):
    """a'(z)."""
    if ACT == "gelu":
        density = 0.3989422804014327 * tl.exp(-0.5 * z * z)
        return 0.5 * (1.0 + tl.erf(z * 0.7071067811865476)) + z * density
    elif ACT == "gelu_tanh":
        s = tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
        return s + z * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * z * z)
    elif ACT == "silu":
        s = tl.sigmoid(z)
        return s + z * s * (1.0 - s)
    elif ACT == "relu":
        return (z > 0).to(tl.float32)
    else:
        return z * 0.0 + 1.0
