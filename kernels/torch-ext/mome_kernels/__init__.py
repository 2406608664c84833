"""Expert layers and the text-guided fusion head as torch ops.

Depends on torch alone, and on triton for its GPU kernels. Shapes: T tokens, D width, E experts, K experts per
token, N = T·K assignments, F hidden width; B batch, P prompts, S scales, C channels, V voxels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import ops, reference

__all__ = ["fusion_head", "moe_linear", "moe_mlp", "reference", "route"]


def _same_dtype(x: Tensor, *others: Tensor | None) -> tuple[Tensor, list[Tensor | None]]:
    """Under autocast the weights follow its dtype, as in torch's own linear layers."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        x = x.to(dtype)
    return x, [None if t is None else t.to(x.dtype) for t in others]


def route(expert_ids_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sorts assignments by expert, stably.

    Args:
        expert_ids_TK: Integers in [0, num_experts).
        num_experts: E.

    Returns:
        counts (E,) int32; offsets (E + 1,) int32; permutation (N,) int64, sorted position → t·K + k; and its
        inverse (N,) int64.
    """
    return ops._route(expert_ids_TK, num_experts)


def moe_mlp(
    x_TD: Tensor,
    expert_ids_TK: Tensor,
    weights_TK: Tensor,
    up_EFD: Tensor,
    up_bias_EF: Tensor | None,
    down_EDF: Tensor,
    down_bias_ED: Tensor | None,
    activation: str = "gelu",
    gated: bool = False,
) -> Tensor:
    """A feed-forward network per expert, combined by the gates: (T, D) → (T, D).

    Differentiable in everything but the ids; the backward pass recomputes the hidden activations.

    Args:
        x_TD: Tokens.
        expert_ids_TK, weights_TK: The assignments and their gates (float32).
        up_EFD: First layer; (E, 2F, D) where gated, the gate's half first (Hugging Face's `gate_up_proj`).
        down_EDF: Second layer.
        up_bias_EF, down_bias_ED: Or None.
        activation: `none`, `relu`, `silu`, `gelu` or `gelu_tanh`.
        gated: a(g) · u instead of a(z).

    Raises:
        ValueError: An unknown activation.
    """
    ops.check_activation(activation)
    x, (up, up_bias, down, down_bias) = _same_dtype(x_TD, up_EFD, up_bias_EF, down_EDF, down_bias_ED)
    return ops._moe_mlp(x, expert_ids_TK, weights_TK, up, up_bias, down, down_bias, activation, gated)


def moe_linear(
    x_TD: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor, weight_EFD: Tensor, bias_EF: Tensor | None = None
) -> Tensor:
    """One linear layer per expert, combined by the gates: (T, D) → (T, F)."""
    x, (weight, bias) = _same_dtype(x_TD, weight_EFD, bias_EF)
    return ops._moe_linear(x, expert_ids_TK, weights_TK, weight, bias)


def fusion_head(
    features_BSCV: Tensor,
    query_PC: Tensor,
    scale_bias_PS: Tensor,
    w1_BPCC: Tensor,
    b1_BPC: Tensor,
    w2_BPCC: Tensor,
    b2_BPC: Tensor,
    w3_BPC: Tensor,
    b3_BP: Tensor,
    top_k: int = 0,
) -> Tensor:
    """Text-guided fusion of S scales and the text-made head in one pass: logits (B, P, V).

    weight(p, v, s) = softmax over s of ⟨query_p, f_s(v)⟩ + bias_ps (over the best `top_k` scales where > 0);
    m_p(v) = Σ_s weight · f_s(v); logits = w₃ · relu(W₂ relu(W₁ m + b₁) + b₂) + b₃. With S = 1 this is the head of
    the CLIP-Driven Universal Model. Differentiable in all tensors. Computed in float32 (float64 stays).
    """
    tensors = (features_BSCV, query_PC, scale_bias_PS, w1_BPCC, b1_BPC, w2_BPCC, b2_BPC, w3_BPC, b3_BP)
    dtype = features_BSCV.dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    logits = ops._fusion_head(*(t.to(wide).contiguous() for t in tensors), top_k)
    return logits if torch.is_autocast_enabled(features_BSCV.device.type) else logits.to(dtype)
