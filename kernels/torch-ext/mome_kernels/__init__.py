"""Expert layers and the text-guided fusion head as torch ops.

Depends on torch alone, and on triton for its GPU kernels. Shapes: T tokens, D width, E experts, K experts per
token, N = T·K assignments, F hidden width; B batch, P prompts, S scales, C channels, V voxels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks, dispatch, flops, ops, ops_grouped, reference

__all__ = ["combine", "fusion_head", "grouped_linear", "moe_linear", "moe_mlp", "reference", "route"]

flops.register()

# Token widths above these, by bytes per element, run as grouped GEMMs on every GPU, where making the hidden layer again
# would cost a third of the forward pass, as it would on a CPU; below, the fused kernels make it again on the chip.
_FUSED_WIDTHS = {2: 256, 4: 64}


def _autocasts(x: Tensor) -> bool:
    kind = x.device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def _same_dtype(x_name: str, x: Tensor, **others: Tensor | None) -> tuple[Tensor, list[Tensor | None]]:
    """As torch's own linear layers: autocast casts all to its dtype, but for float64; else all have one dtype."""
    if not _autocasts(x):
        checks.same_dtype(x_name, x, **others)
    elif x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    return x, [None if t is None else t.to(x.dtype) for t in others.values()]


def _keeps_hidden(x: Tensor, out: int) -> bool:
    """Whether the backward pass is to find the hidden layer in memory: where the forward pass puts it there."""
    fused = out == x.shape[1] <= _FUSED_WIDTHS.get(x.dtype.itemsize, 0)
    return not (fused and dispatch.wants_kernels(x))


def _check_assignments(x_TD: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor) -> None:
    checks.tensors(x_TD=x_TD, expert_ids_TK=expert_ids_TK, weights_TK=weights_TK)
    checks.shape("x_TD", x_TD, (None, None), "(T, D)")
    checks.ids(expert_ids_TK, x_TD.shape[0])
    checks.shape("weights_TK", weights_TK, tuple(expert_ids_TK.shape), "the shape (T, K) of expert_ids_TK")
    checks.floating(x_TD=x_TD, weights_TK=weights_TK)
    checks.same_device("x_TD", x_TD, expert_ids_TK=expert_ids_TK, weights_TK=weights_TK)


def route(expert_ids_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sorts assignments by expert, stably.

    Args:
        expert_ids_TK: Integers in [0, num_experts).
        num_experts: E.

    Returns:
        counts (E,) int32; offsets (E + 1,) int32; permutation (N,) int64, sorted position → t·K + k; and its
        inverse (N,) int64.

    Raises:
        ValueError: An id out of range (on a GPU a device-side assertion, so that nothing waits), or 2³¹ assignments.
    """
    checks.tensors(expert_ids_TK=expert_ids_TK)
    checks.whole("num_experts", num_experts)
    checks.ids(expert_ids_TK)
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
    """A feed-forward network per expert, combined by the gates: (T, D) → (T, D), or the width that `down_EDF` gives.

    Differentiable in everything but the ids, backwards and once. The backward pass keeps at most the hidden layer
    before its activation, and on a GPU, at small token widths (see the README), nothing.

    Args:
        x_TD: Tokens.
        expert_ids_TK, weights_TK: The assignments, integers in [0, E), and their gates, of any floating dtype.
        up_EFD: First layer; (E, 2F, D) where gated, the gate's half first (Hugging Face's `gate_up_proj`).
        down_EDF: Second layer.
        up_bias_EF, down_bias_ED: Or None.
        activation: `none`, `relu`, `silu`, `gelu` or `gelu_tanh`.
        gated: a(g) · u instead of a(z).

    Raises:
        ValueError: An unknown activation, shapes that do not fit, or an id out of range.
        TypeError: A dtype that does not fit; without autocast parameters have the dtype of `x_TD`.
    """
    checks.activation(activation)
    _check_assignments(x_TD, expert_ids_TK, weights_TK)
    checks.tensors(up_EFD=up_EFD, down_EDF=down_EDF)
    checks.shape("down_EDF", down_EDF, (None, None, None), "(E, D, F)")
    experts, out, hidden = down_EDF.shape
    width = 2 * hidden if gated else hidden
    legend = "(E, 2F, D)" if gated else "(E, F, D)"
    checks.shape("up_EFD", up_EFD, (experts, width, x_TD.shape[1]), legend)
    checks.shape("up_bias_EF", up_bias_EF, (experts, width), "(E, 2F)" if gated else "(E, F)")
    checks.shape("down_bias_ED", down_bias_ED, (experts, out), "(E, D)")
    parameters = {"up_EFD": up_EFD, "up_bias_EF": up_bias_EF, "down_EDF": down_EDF, "down_bias_ED": down_bias_ED}
    checks.floating(**parameters)
    checks.same_device("x_TD", x_TD, **parameters)
    x, (up, up_bias, down, down_bias) = _same_dtype("x_TD", x_TD, **parameters)
    needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in (x, weights_TK, up, down))
    keep = needs_grad and _keeps_hidden(x, out)
    result, _ = ops._moe_mlp(x, expert_ids_TK, weights_TK, up, up_bias, down, down_bias, activation, gated, keep)
    return result


def moe_linear(
    x_TD: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor, weight_EFD: Tensor, bias_EF: Tensor | None = None
) -> Tensor:
    """One linear layer per expert, combined by the gates: (T, D) → (T, F).

    Args:
        x_TD, expert_ids_TK, weights_TK: As of `moe_mlp`.
        weight_EFD: One matrix per expert.
        bias_EF: Or None.

    Raises:
        ValueError, TypeError: As `moe_mlp`.
    """
    _check_assignments(x_TD, expert_ids_TK, weights_TK)
    checks.tensors(weight_EFD=weight_EFD)
    checks.shape("weight_EFD", weight_EFD, (None, None, x_TD.shape[1]), "(E, F, D)")
    checks.shape("bias_EF", bias_EF, tuple(weight_EFD.shape[:2]), "(E, F)")
    checks.floating(weight_EFD=weight_EFD, bias_EF=bias_EF)
    checks.same_device("x_TD", x_TD, weight_EFD=weight_EFD, bias_EF=bias_EF)
    x, (weight, bias) = _same_dtype("x_TD", x_TD, weight_EFD=weight_EFD, bias_EF=bias_EF)
    return ops._moe_linear(x, expert_ids_TK, weights_TK, weight, bias)


def grouped_linear(
    x_MD: Tensor,
    weight_EFD: Tensor,
    offsets: Tensor,
    bias_EF: Tensor | None = None,
    gather_index: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """Rows in groups, each group times its expert's matrix: a(W_e x + b_e), (N, F).

    Differentiable in x, weight and bias. Group e is the rows offsets[e] … offsets[e + 1]; groups may be empty.

    Args:
        x_MD: Rows in the order of the groups; with `gather_index` row i is x[gather_index[i]].
        weight_EFD: One matrix per expert, any F and D.
        offsets: (E + 1,) integers that rise from 0 to N.
        bias_EF: Or None.
        gather_index: (N,) integers in [0, M), or None for N = M.
        activation: `none`, `relu`, `silu`, `gelu` or `gelu_tanh`.

    Raises:
        ValueError, TypeError: Shapes, dtypes, offsets or indices that do not fit (what tensors hold: on a GPU a
            device-side assertion).
    """
    checks.activation(activation)
    checks.tensors(x_MD=x_MD, weight_EFD=weight_EFD, offsets=offsets)
    checks.shape("x_MD", x_MD, (None, None), "(M, D)")
    checks.shape("weight_EFD", weight_EFD, (None, None, x_MD.shape[1]), "(E, F, D)")
    checks.shape("offsets", offsets, (weight_EFD.shape[0] + 1,), "(E + 1,)")
    checks.shape("bias_EF", bias_EF, tuple(weight_EFD.shape[:2]), "(E, F)")
    checks.shape("gather_index", gather_index, (None,), "(N,)")
    checks.integer(offsets=offsets, gather_index=gather_index)
    checks.floating(x_MD=x_MD, weight_EFD=weight_EFD, bias_EF=bias_EF)
    checks.same_device("x_MD", x_MD, weight_EFD=weight_EFD, offsets=offsets, bias_EF=bias_EF, gather_index=gather_index)
    x, (weight, bias) = _same_dtype("x_MD", x_MD, weight_EFD=weight_EFD, bias_EF=bias_EF)
    return ops_grouped._grouped_linear(x, weight, offsets, bias, gather_index, activation)


def combine(y_ND: Tensor, weights_TK: Tensor, inverse_N: Tensor) -> Tensor:
    """out_t = Σ_k weights[t, k] · y[inverse[t·K + k]]: (N, D) in expert order → (T, D); see `route`.

    Differentiable in y and the weights; summed in float32.

    Raises:
        ValueError, TypeError: Shapes or dtypes that do not fit, or an inverse that is no permutation of 0 … N − 1 (on a
            GPU a device-side assertion).
    """
    checks.tensors(y_ND=y_ND, weights_TK=weights_TK, inverse_N=inverse_N)
    checks.shape("weights_TK", weights_TK, (None, None), "(T, K)")
    checks.shape("y_ND", y_ND, (weights_TK.numel(), None), "(T·K, D)")
    checks.shape("inverse_N", inverse_N, (weights_TK.numel(),), "(T·K,)")
    checks.integer(inverse_N=inverse_N)
    checks.floating(y_ND=y_ND, weights_TK=weights_TK)
    checks.same_device("y_ND", y_ND, weights_TK=weights_TK, inverse_N=inverse_N)
    return ops_grouped._combine(y_ND, weights_TK, inverse_N)


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
    negative_slope: float = 0.0,
) -> Tensor:
    """Text-guided fusion of S scales and the text-made head in one pass: logits (B, P, V).

    weight(p, v, s) = softmax over s of ⟨query_p, f_s(v)⟩ + bias_ps (over the best `top_k` scales where > 0);
    m_p(v) = Σ_s weight · f_s(v); logits = w₃ · φ(W₂ φ(W₁ m + b₁) + b₂) + b₃, φ being ReLU, leaky where
    `negative_slope` > 0. With S = 1 and slope 0 this is the head of the CLIP-Driven Universal Model. Differentiable in
    all tensors. Computed in float32, or in float64 where the features are, to which all else is cast; the logits have
    the dtype of the features, under autocast float32.

    Args:
        features_BSCV: The maps of all scales, resampled to one grid of V voxels.
        query_PC, scale_bias_PS: What makes a prompt's weights over the scales.
        w1_BPCC, b1_BPC, w2_BPCC, b2_BPC, w3_BPC, b3_BP: The three layers of every prompt, (out, in).
        top_k: Scales that a voxel keeps, of equal ones the earlier; 0, or S and more: all.
        negative_slope: Of the two activations, in [0, 1).

    Raises:
        ValueError, TypeError: Shapes, dtypes or a slope that do not fit.
    """
    checks.tensors(
        features_BSCV=features_BSCV, query_PC=query_PC, scale_bias_PS=scale_bias_PS, w1_BPCC=w1_BPCC, b1_BPC=b1_BPC,
        w2_BPCC=w2_BPCC, b2_BPC=b2_BPC, w3_BPC=w3_BPC, b3_BP=b3_BP,
    )  # fmt: skip
    checks.whole("top_k", top_k)
    checks.shape("features_BSCV", features_BSCV, (None, None, None, None), "(B, S, C, V)")
    checks.shape("query_PC", query_PC, (None, features_BSCV.shape[2]), "(P, C)")
    batch, scales, c, _ = features_BSCV.shape
    if scales == 0:
        raise ValueError("features_BSCV has no scales, got shape " + str(tuple(features_BSCV.shape)))
    p = query_PC.shape[0]
    checks.shape("scale_bias_PS", scale_bias_PS, (p, scales), "(P, S)")
    for name, tensor in {"w1_BPCC": w1_BPCC, "w2_BPCC": w2_BPCC}.items():
        checks.shape(name, tensor, (batch, p, c, c), "(B, P, C, C)")
    for name, tensor in {"b1_BPC": b1_BPC, "b2_BPC": b2_BPC, "w3_BPC": w3_BPC}.items():
        checks.shape(name, tensor, (batch, p, c), "(B, P, C)")
    checks.shape("b3_BP", b3_BP, (batch, p), "(B, P)")
    named = {
        "features_BSCV": features_BSCV, "query_PC": query_PC, "scale_bias_PS": scale_bias_PS, "w1_BPCC": w1_BPCC,
        "b1_BPC": b1_BPC, "w2_BPCC": w2_BPCC, "b2_BPC": b2_BPC, "w3_BPC": w3_BPC, "b3_BP": b3_BP,
    }  # fmt: skip
    checks.floating(**named)
    checks.same_device("features_BSCV", features_BSCV, **named)
    if not isinstance(negative_slope, (int, float)) or not 0 <= negative_slope < 1:
        raise ValueError(f"negative_slope is a number of at least 0 and below 1, got {negative_slope!r}")
    if top_k < 0:
        raise ValueError(f"top_k is 0 (every scale) or more, got {top_k}")
    dtype = features_BSCV.dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    logits = ops._fusion_head(*(t.to(wide).contiguous() for t in named.values()), top_k, negative_slope)
    return logits if _autocasts(features_BSCV) else logits.to(dtype)
