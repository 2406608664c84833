"""Activations inside kernels, in float32, and their derivatives.

In a fused layer of small width the activation costs more instructions than everything else together. Both GELUs are
x Φ(x) with Φ(x) + Φ(-x) = 1, so that x Φ(x) = max(x, 0) - |x| Φ(-|x|), and the logarithm of Φ(-a) is nearly a parabola:
one polynomial and one exponential, ten instructions (our choice; with `tl.erf` there are 36). The polynomials minimise
the largest error of a Φ(-a); beyond the largest a of the fit, a Φ(-a) is below 1e-8. In float32 both functions are
within 5e-7 of the exact value, and their slopes within 1e-6.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _below(a, ACT: tl.constexpr):
    """Φ(-a) for a ≥ 0, of the normal distribution, or for `gelu_tanh` of the function that approximates it."""
    if ACT == "gelu":
        p = -0.0006991720292717218 + a * 2.503482755855657e-05
        p = -0.05307037010788918 + a * (0.00785383302718401 + a * p)
        p = -0.9999995231628418 + a * (-1.151128888130188 + a * (-0.45901402831077576 + a * p))
    else:
        p = 0.0004133010224904865 + a * -2.4760847736615688e-05
        p = 0.0032980821561068296 + a * (-0.0022764697205275297 + a * p)
        p = -0.04990221560001373 + a * (0.00451537873595953 + a * p)
        p = -1.0000004768371582 + a * (-1.1510714292526245 + a * (-0.4595972001552582 + a * p))
    return tl.exp2(p)


@triton.jit
def _bounded(z, ACT: tl.constexpr):
    """|z|, limited to the range that `_below` was fitted to; NaN stays NaN."""
    return tl.minimum(tl.abs(z), 6.0 if ACT == "gelu" else 5.5, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _logistic(z):
    """1 / (1 + exp(-z)), by exp2, which is one instruction; exp and `tl.sigmoid` add code for denormal numbers."""
    return 1.0 / (1.0 + tl.exp2(z * -1.4426950408889634))


@triton.jit
def activate(z, ACT: tl.constexpr):
    """a(z) for ACT in none, relu, silu, gelu (erf), gelu_tanh."""
    if ACT == "gelu" or ACT == "gelu_tanh":
        a = _bounded(z, ACT)
        return tl.maximum(z, 0.0) - a * _below(a, ACT)
    elif ACT == "silu":
        return z * _logistic(z)
    elif ACT == "relu":
        return tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)
    else:
        return z


@triton.jit
def activate_slope(z, ACT: tl.constexpr):
    """a'(z)."""
    if ACT == "gelu" or ACT == "gelu_tanh":
        a = _bounded(z, ACT)
        below = _below(a, ACT)
        if ACT == "gelu":
            density = 0.3989422804014327 * tl.exp2(-0.7213475204444817 * z * z)
        else:
            density = below * (1.0 - below) * (1.5957691216057308 + 0.21406542767208 * a * a)
        # a'(z) + a'(-z) = 1
        slope = below - a * density
        return tl.where(z > 0, 1.0 - slope, slope)
    elif ACT == "silu":
        s = _logistic(z)
        return s + z * s * (1.0 - s)
    elif ACT == "relu":
        return (z > 0).to(tl.float32)
    else:
        return z * 0.0 + 1.0
