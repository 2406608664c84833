"""The public functions in the plainest torch code. Tests compare every other implementation with it, in float64."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

ACTIVATIONS = {
    "none": lambda x: x,
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


def moe_linear(x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, weight_EFD: Tensor, bias_EF: Tensor | None) -> Tensor:
    """out_t = Σ_k weight_tk · (W_e x_t + b_e), e = ids_tk; token by token."""
    rows = []
    for x_D, ids_K, weights_K in zip(x_TD, ids_TK, weights_TK, strict=True):
        row = x_D.new_zeros(weight_EFD.shape[1])
        for e, weight in zip(ids_K.tolist(), weights_K, strict=True):
            row = row + weight * F.linear(x_D, weight_EFD[e], None if bias_EF is None else bias_EF[e])
        rows.append(row)
    return torch.stack(rows) if rows else x_TD.new_zeros(0, weight_EFD.shape[1])


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
    """out_t = Σ_k weight_tk · (W₂ a(W₁ x_t + b₁) + b₂); gated: a(g) · u with (g, u) the halves of W₁ x + b₁."""
    act = ACTIVATIONS[activation]
    rows = []
    for x_D, ids_K, weights_K in zip(x_TD, ids_TK, weights_TK, strict=True):
        row = x_D.new_zeros(down_EDF.shape[1])
        for e, weight in zip(ids_K.tolist(), weights_K, strict=True):
            z_F = F.linear(x_D, up_EFD[e], None if up_bias_EF is None else up_bias_EF[e])
            if gated:
                g_F, u_F = z_F.chunk(2)
                h_F = act(g_F) * u_F
            else:
                h_F = act(z_F)
            row = row + weight * F.linear(h_F, down_EDF[e], None if down_bias_ED is None else down_bias_ED[e])
        rows.append(row)
    return torch.stack(rows) if rows else x_TD.new_zeros(0, down_EDF.shape[1])


def fusion_weights(features_BSCV: Tensor, query_PC: Tensor, scale_bias_PS: Tensor, top_k: int) -> Tensor:
    """weight (B, P, S, V): softmax over the scales of ⟨query_p, f_s(v)⟩ + bias_ps, over the best `top_k` if > 0."""
    score_BPSV = torch.einsum("pc,bscv->bpsv", query_PC, features_BSCV) + scale_bias_PS[None, :, :, None]
    if 0 < top_k < score_BPSV.shape[2]:
        best = score_BPSV.sort(dim=2, descending=True, stable=True).indices[:, :, :top_k]  # the earlier of equal scores
        keep = torch.zeros_like(score_BPSV, dtype=torch.bool).scatter_(2, best, True)
        score_BPSV = score_BPSV.masked_fill(~keep, -torch.inf)
    return score_BPSV.softmax(dim=2)


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
    """logits (B, P, V) = w₃ · φ(W₂ φ(W₁ m + b₁) + b₂) + b₃, m_p(v) = Σ_s weight(p, v, s) · f_s(v), φ leaky ReLU."""
    weight_BPSV = fusion_weights(features_BSCV, query_PC, scale_bias_PS, top_k)
    mixture_BPCV = torch.einsum("bpsv,bscv->bpcv", weight_BPSV, features_BSCV)
    hidden_BPCV = F.leaky_relu(w1_BPCC @ mixture_BPCV + b1_BPC[..., None], negative_slope)
    hidden_BPCV = F.leaky_relu(w2_BPCC @ hidden_BPCV + b2_BPC[..., None], negative_slope)
    return torch.einsum("bpc,bpcv->bpv", w3_BPC, hidden_BPCV) + b3_BP[..., None]


def grouped_linear(
    x_MD: Tensor,
    weight_EFD: Tensor,
    offsets: Tensor,
    bias_EF: Tensor | None = None,
    gather_index: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """a(W_e x_i + b_e) for row i of group e; row by row."""
    x_MD = x_MD if gather_index is None else x_MD[gather_index]
    expert_of = torch.repeat_interleave(torch.arange(weight_EFD.shape[0]), offsets.diff())
    rows = [
        F.linear(x, weight_EFD[e], None if bias_EF is None else bias_EF[e])
        for x, e in zip(x_MD, expert_of, strict=True)
    ]
    return ACTIVATIONS[activation](torch.stack(rows) if rows else x_MD.new_zeros(0, weight_EFD.shape[1]))


def combine(y_ND: Tensor, weights_TK: Tensor, inverse_N: Tensor) -> Tensor:
    """out_t = Σ_k weights[t, k] · y[inverse[t·K + k]]."""
    return (y_ND[inverse_N].view(*weights_TK.shape, -1) * weights_TK[..., None]).sum(1)
