"""The public functions: each checks its arguments and then calls one torch op.

Shapes: T tokens, D width, E experts, K experts per token, N = T · K assignments, M rows, F hidden width; B batch,
P prompts, S scales, C channels, V voxels. `ids_TK` are the experts that a token goes to, `weights_TK` the routing
weights of those assignments. "Gated" means only the activation a(g) · u. Gradients exist in the reverse mode of
`torch.autograd`; forward mode (`torch.func.jvp`) raises NotImplementedError. As for torch's own `custom_op`, the other
transforms of `torch.func` that differentiate (`grad`, `vjp`, `jacrev`) raise RuntimeError (torch 2.14).
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks, dispatch
from .custom_ops import experts as expert_ops
from .custom_ops import grouped as grouped_ops
from .custom_ops import head as head_ops
from .weights import ExpertWeights, HeadWeights

# The largest token width, by bytes per element, whose hidden layer z is computed again in the backward pass on a GPU.
# Fused kernels compute it on the chip; where only the forward pass runs fused, z would be most of the memory. Above
# these widths, and on a CPU, computing it again would cost a third of the forward pass, so that z is kept in memory.
_FUSED_WIDTHS = {2: 256, 4: 64}


@torch.compiler.assume_constant_result  # PyTorch 2.11 cannot trace it
def _has_autocast(kind: str) -> bool:
    return torch.amp.is_autocast_available(kind)


def _autocasts(x: Tensor) -> bool:
    kind = x.device.type
    return _has_autocast(kind) and torch.is_autocast_enabled(kind)


def _in_common_dtype(x_name: str, x: Tensor, **parameters: Tensor | None) -> Tensor:
    """x in the dtype of the computation, which parameters are to be cast to.

    As in torch's own linear layers, autocast casts everything but float64; without it all dtypes must be equal.
    """
    if not _autocasts(x):
        checks.same_dtype(x_name, x, **parameters)
    elif x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    return x


def _cast(tensor: Tensor | None, like: Tensor) -> Tensor | None:
    return None if tensor is None else tensor.to(like.dtype)


def _keeps_hidden(x: Tensor, out_width: int) -> bool:
    """Whether the forward pass keeps z for the backward pass: always, unless the fused kernels run."""
    fused = out_width == x.shape[1] <= _FUSED_WIDTHS.get(x.dtype.itemsize, 0)
    return not (fused and dispatch.wants_kernels(x))


def _check_assignments(x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> None:
    checks.tensors(x_TD=x_TD, ids_TK=ids_TK, weights_TK=weights_TK)
    checks.shape("x_TD", x_TD, (None, None), "(T, D)")
    checks.ids(ids_TK, x_TD.shape[0])
    checks.shape("weights_TK", weights_TK, tuple(ids_TK.shape), "the shape (T, K) of ids_TK")
    checks.floating(x_TD=x_TD, weights_TK=weights_TK)
    checks.same_device("x_TD", x_TD, ids_TK=ids_TK, weights_TK=weights_TK)


def route(ids_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sorts assignments by expert; the sort is stable.

    Args:
        ids_TK: Integers in [0, num_experts).
        num_experts: E.

    Returns:
        counts (E,) int32; offsets (E + 1,) int32; permutation (N,) int64, from a sorted position to t · K + k; and its
        inverse (N,) int64.

    Raises:
        ValueError: There are more than 2³¹ − 4096 assignments, or an id is out of range. On a GPU an id out of range is
            a device-side assertion, so that the host does not wait for the device.
        TypeError: `ids_TK` is not a dense integer tensor, or `num_experts` is not an integer.
    """
    checks.tensors(ids_TK=ids_TK)
    checks.whole("num_experts", num_experts)
    checks.ids(ids_TK)
    return expert_ops.route(ids_TK, num_experts)


def moe_mlp(
    x_TD: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    up_EFD: Tensor,
    up_bias_EF: Tensor | None,
    down_EDF: Tensor,
    down_bias_ED: Tensor | None,
    activation: str = "gelu",
    gated: bool = False,
) -> Tensor:
    """Runs one feed-forward network per expert and sums each token's outputs by its routing weights.

    The output is (T, D), or (T, the width that `down_EDF` gives). Gradients exist for everything but the ids, in
    reverse mode and once. Besides its arguments, the backward pass keeps the hidden layer before its activation, except
    at small token widths on a GPU (see the README), and on a GPU the order of the assignments (8 bytes each).

    Args:
        x_TD: Tokens.
        ids_TK: Experts of every token, integers in [0, E).
        weights_TK: Routing weights, of any floating dtype.
        up_EFD: First layer; (E, 2F, D) where gated, the rows of g before those of u (Hugging Face's `gate_up_proj`).
        up_bias_EF: Bias of the first layer, or None.
        down_EDF: Second layer.
        down_bias_ED: Bias of the second layer, or None.
        activation: `none`, `relu`, `silu`, `gelu` or `gelu_tanh`.
        gated: Use a(g) · u instead of a(z), with (g, u) the halves of z.

    Raises:
        ValueError: The activation is unknown, shapes or devices do not fit, or an id is out of range.
        TypeError: A dtype does not fit; without autocast all parameters must have the dtype of `x_TD`.
    """
    checks.activation(activation)
    _check_assignments(x_TD, ids_TK, weights_TK)
    checks.tensors(up_EFD=up_EFD, down_EDF=down_EDF)
    checks.shape("down_EDF", down_EDF, (None, None, None), "(E, D, F)")
    experts, out_width, hidden = down_EDF.shape
    up_width = 2 * hidden if gated else hidden
    legend = "(E, 2F, D)" if gated else "(E, F, D)"
    checks.shape("up_EFD", up_EFD, (experts, up_width, x_TD.shape[1]), legend)
    checks.shape("up_bias_EF", up_bias_EF, (experts, up_width), "(E, 2F)" if gated else "(E, F)")
    checks.shape("down_bias_ED", down_bias_ED, (experts, out_width), "(E, D)")
    parameters = {"up_EFD": up_EFD, "up_bias_EF": up_bias_EF, "down_EDF": down_EDF, "down_bias_ED": down_bias_ED}
    checks.floating(**parameters)
    checks.no_tangent("moe_mlp", x_TD, weights_TK, *parameters.values())
    checks.same_device("x_TD", x_TD, **parameters)
    x = _in_common_dtype("x_TD", x_TD, **parameters)
    up, down = up_EFD.to(x.dtype), down_EDF.to(x.dtype)
    layer = ExpertWeights(up, _cast(up_bias_EF, x), down, _cast(down_bias_ED, x), activation, gated)
    needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in (x, weights_TK, up, down))
    keep_hidden = needs_grad and _keeps_hidden(x, out_width)
    out_TD, *_ = expert_ops.moe_mlp(x, ids_TK, weights_TK, *layer, keep_hidden)
    return out_TD


def moe_linear(
    x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, weight_EFD: Tensor, bias_EF: Tensor | None = None
) -> Tensor:
    """Runs one linear layer per expert and sums each token's outputs by its routing weights: (T, D) to (T, F).

    Args:
        x_TD: Tokens.
        ids_TK: Experts of every token, integers in [0, E).
        weights_TK: Routing weights, of any floating dtype.
        weight_EFD: One matrix per expert.
        bias_EF: One bias per expert, or None.

    Raises:
        ValueError: Shapes or devices do not fit, or an id is out of range.
        TypeError: A dtype does not fit; without autocast all parameters must have the dtype of `x_TD`.
    """
    _check_assignments(x_TD, ids_TK, weights_TK)
    checks.tensors(weight_EFD=weight_EFD)
    checks.shape("weight_EFD", weight_EFD, (None, None, x_TD.shape[1]), "(E, F, D)")
    checks.shape("bias_EF", bias_EF, tuple(weight_EFD.shape[:2]), "(E, F)")
    checks.floating(weight_EFD=weight_EFD, bias_EF=bias_EF)
    checks.no_tangent("moe_linear", x_TD, weights_TK, weight_EFD, bias_EF)
    checks.same_device("x_TD", x_TD, weight_EFD=weight_EFD, bias_EF=bias_EF)
    x = _in_common_dtype("x_TD", x_TD, weight_EFD=weight_EFD, bias_EF=bias_EF)
    return expert_ops.moe_linear(x, ids_TK, weights_TK, weight_EFD.to(x.dtype), _cast(bias_EF, x))


def grouped_linear(
    x_MD: Tensor,
    weight_EFD: Tensor,
    offsets: Tensor,
    bias_EF: Tensor | None = None,
    gather_index: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """Multiplies rows that are in groups by the matrix of their group's expert: a(W_e x + b_e), (N, F).

    Group e holds the rows from offsets[e] up to offsets[e + 1]; a group may be empty. Gradients exist for x, weight
    and bias.

    Args:
        x_MD: Rows in the order of the groups; with `gather_index`, row i is x[gather_index[i]].
        weight_EFD: One matrix per expert, any F and D.
        offsets: (E + 1,) integers that rise from 0 to N.
        bias_EF: One bias per expert, or None.
        gather_index: (N,) integers in [0, M), or None for N = M.
        activation: `none`, `relu`, `silu`, `gelu` or `gelu_tanh`.

    Raises:
        ValueError: Shapes, devices, offsets or indices do not fit. On a GPU a wrong offset or index is a device-side
            assertion.
        TypeError: A dtype does not fit.
    """
    checks.activation(activation)
    checks.tensors(x_MD=x_MD, weight_EFD=weight_EFD, offsets=offsets)
    checks.shape("x_MD", x_MD, (None, None), "(M, D)")
    checks.shape("weight_EFD", weight_EFD, (None, None, x_MD.shape[1]), "(E, F, D)")
    checks.shape("offsets", offsets, (weight_EFD.shape[0] + 1,), "(E + 1,)")
    checks.shape("bias_EF", bias_EF, tuple(weight_EFD.shape[:2]), "(E, F)")
    checks.shape("gather_index", gather_index, (None,), "(N,)")
    checks.rows("x_MD", x_MD, x_MD.shape[0], "rows")
    if gather_index is not None:
        checks.rows("gather_index", gather_index, gather_index.shape[0], "rows")
    checks.integer(offsets=offsets, gather_index=gather_index)
    checks.floating(x_MD=x_MD, weight_EFD=weight_EFD, bias_EF=bias_EF)
    checks.no_tangent("grouped_linear", x_MD, weight_EFD, bias_EF)
    checks.same_device("x_MD", x_MD, weight_EFD=weight_EFD, offsets=offsets, bias_EF=bias_EF, gather_index=gather_index)
    x = _in_common_dtype("x_MD", x_MD, weight_EFD=weight_EFD, bias_EF=bias_EF)
    return grouped_ops.grouped_linear(x, weight_EFD.to(x.dtype), offsets, _cast(bias_EF, x), gather_index, activation)


def combine(y_ND: Tensor, weights_TK: Tensor, inverse_N: Tensor) -> Tensor:
    """Sums each token's rows by its routing weights: out_t = Σ_k weights[t, k] · y[inverse[t · K + k]], (T, D).

    The sum is in float32. Gradients exist for y and the weights.

    Args:
        y_ND: Rows in expert order.
        weights_TK: Routing weights, of any floating dtype.
        inverse_N: The inverse permutation that `route` returns.

    Raises:
        ValueError: Shapes or devices do not fit, or `inverse_N` is not a permutation of 0 … N − 1. On a GPU a wrong
            permutation is a device-side assertion.
        TypeError: A dtype does not fit.
    """
    checks.tensors(y_ND=y_ND, weights_TK=weights_TK, inverse_N=inverse_N)
    checks.shape("weights_TK", weights_TK, (None, None), "(T, K)")
    checks.shape("y_ND", y_ND, (weights_TK.numel(), None), "(T·K, D)")
    checks.shape("inverse_N", inverse_N, (weights_TK.numel(),), "(T·K,)")
    checks.rows("weights_TK", weights_TK, weights_TK.numel(), "assignments")
    checks.integer(inverse_N=inverse_N)
    checks.floating(y_ND=y_ND, weights_TK=weights_TK)
    checks.no_tangent("combine", y_ND, weights_TK)
    checks.same_device("y_ND", y_ND, weights_TK=weights_TK, inverse_N=inverse_N)
    return grouped_ops.combine(y_ND, weights_TK, inverse_N)


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
    """Fuses S scales under the guidance of text and applies each prompt's own head: logits (B, P, V).

    weight(p, v, s) = softmax over s of ⟨query_p, f_s(v)⟩ + bias_ps (over the best `top_k` scales where > 0);
    m_p(v) = Σ_s weight · f_s(v); logits = w₃ · φ(W₂ φ(W₁ m + b₁) + b₂) + b₃, where φ is ReLU, or leaky ReLU where
    `negative_slope` > 0. With S = 1 and slope 0 this is the head of the CLIP-Driven Universal Model. Gradients exist
    for all tensors. Everything is cast to float32 and computed there, or to float64 where the features are float64.
    The logits have the dtype of the features; under autocast they are float32.

    Args:
        features_BSCV: The maps of all scales, resampled to one grid of V voxels.
        query_PC: The query of every prompt.
        scale_bias_PS: Added to a prompt's scores of the scales.
        w1_BPCC, b1_BPC: First layer of every prompt, as (out, in).
        w2_BPCC, b2_BPC: Second layer of every prompt, as (out, in).
        w3_BPC, b3_BP: Last layer of every prompt.
        top_k: Scales that a voxel keeps; of equal ones the earlier are kept. 0, or S and more, keeps all.
        negative_slope: Slope of the two activations below zero, in [0, 1).

    Raises:
        ValueError: Shapes or devices do not fit, or `top_k` or the slope is out of range.
        TypeError: A dtype does not fit, or `top_k` is not an integer.
    """
    named = {
        "features_BSCV": features_BSCV, "query_PC": query_PC, "scale_bias_PS": scale_bias_PS, "w1_BPCC": w1_BPCC,
        "b1_BPC": b1_BPC, "w2_BPCC": w2_BPCC, "b2_BPC": b2_BPC, "w3_BPC": w3_BPC, "b3_BP": b3_BP,
    }  # fmt: skip
    checks.tensors(**named)
    checks.whole("top_k", top_k)
    checks.shape("features_BSCV", features_BSCV, (None, None, None, None), "(B, S, C, V)")
    checks.shape("query_PC", query_PC, (None, features_BSCV.shape[2]), "(P, C)")
    batch, scales, channels, _ = features_BSCV.shape
    if scales == 0:
        raise ValueError("features_BSCV has no scales, got shape " + str(tuple(features_BSCV.shape)))
    prompts = query_PC.shape[0]
    checks.shape("scale_bias_PS", scale_bias_PS, (prompts, scales), "(P, S)")
    for name in ("w1_BPCC", "w2_BPCC"):
        checks.shape(name, named[name], (batch, prompts, channels, channels), "(B, P, C, C)")
    for name in ("b1_BPC", "b2_BPC", "w3_BPC"):
        checks.shape(name, named[name], (batch, prompts, channels), "(B, P, C)")
    checks.shape("b3_BP", b3_BP, (batch, prompts), "(B, P)")
    checks.floating(**named)
    checks.no_tangent("fusion_head", *named.values())
    checks.same_device("features_BSCV", features_BSCV, **named)
    if not isinstance(negative_slope, (int, float)) or not 0 <= negative_slope < 1:
        raise ValueError(f"negative_slope is a number of at least 0 and below 1, got {negative_slope!r}")
    if top_k < 0:
        raise ValueError(f"top_k is 0 (every scale) or more, got {top_k}")
    dtype = features_BSCV.dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    cast = {name: tensor.to(wide).contiguous() for name, tensor in named.items()}
    head = HeadWeights(
        cast["query_PC"], cast["scale_bias_PS"], cast["w1_BPCC"], cast["b1_BPC"], cast["w2_BPCC"], cast["b2_BPC"],
        cast["w3_BPC"], cast["b3_BP"], top_k, negative_slope,
    )  # fmt: skip
    logits = head_ops.fusion_head(cast["features_BSCV"], *head)
    return logits if _autocasts(features_BSCV) else logits.to(dtype)
