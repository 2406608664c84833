"""Voxels attend to several tokens that are made from the prompt's text row; the tokens say which scales to read."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor, nn

from mome.errors import InputError
from mome.registry import at_least
from mome.routers.fusion.base import ABSENT, Fusion
from mome.routers.fusion.text_guided import KeyProjection


class CrossAttentionFusion(Fusion):
    """weight(p, v, s) = softmax over s of Σ_m a(p, v, m) · u_s(p, m) + b_s. Our choice.

    Token m of prompt p is t_pm = W_m text_p, with key W_k t_pm and scores u(p, m) = W_u t_pm of the S scales. A voxel
    asks with q(v) = W_q [f_1(v); …; f_S(v)], and a(p, v, ·) = softmax over m of ⟨q(v), W_k t_pm⟩ / √d. This is scaled
    dot-product attention (Vaswani et al. 2017, equation 1) from voxels to tokens, whose values are scores of scales.
    With one token a softmax is constant, so at least two are needed. The query is folded into the keys,
    ⟨W_q f, k⟩ = ⟨f, W_qᵀ k⟩, so that no query is stored per voxel.
    """

    takes_present = True

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Settings of `cross_attention`.

        Args:
            tokens: The number M of tokens per prompt, at least 2.
            dim: Width d of tokens, queries and keys.
        """

        tokens: int = 4
        dim: int = 32

    def __init__(self, config: Config, *, channels: int, text_dim: int, scales: int) -> None:
        super().__init__()
        if config.tokens < 2:
            raise InputError(
                f"fusion cross_attention has tokens={config.tokens}: attention to one token is the same at every voxel",
                hint="tokens=4, or fusion=learned for weights that do not depend on the voxel",
            )
        at_least(1, "fusion cross_attention", dim=config.dim)
        self.num_tokens = config.tokens
        self.tokens = nn.Linear(text_dim, config.tokens * config.dim)
        self.key = nn.Linear(config.dim, config.dim, bias=False)
        self.query = KeyProjection(config.dim, scales * channels)
        self.score = nn.Linear(config.dim, scales)

    def forward(self, features_BSCV: Tensor, text_PT: Tensor, present_PS: Tensor | None = None) -> Tensor:
        weights_BPSV = self.weights(features_BSCV, text_PT, present_PS)
        return torch.einsum("bpsv,bscv->bpcv", weights_BPSV, features_BSCV)

    def weights(self, features_BSCV: Tensor, text_PT: Tensor, present_PS: Tensor | None = None) -> Tensor:
        tokens_PMD = self.tokens(text_PT).unflatten(-1, (self.num_tokens, -1))
        attention_BPMV = self._attention(features_BSCV, tokens_PMD, present_PS)
        scores_PMS = self.score(tokens_PMD).to(features_BSCV.dtype)
        # The attention sums to one, so the bias of the last linear layer is added once, as in the formula.
        scores_BPSV = torch.einsum("bpmv,pms->bpsv", attention_BPMV, scores_PMS)
        if present_PS is not None:
            scores_BPSV = scores_BPSV.masked_fill(~present_PS[..., None], ABSENT)
        return scores_BPSV.softmax(dim=2)

    def attention(self, features_BSCV: Tensor, text_PT: Tensor, present_PS: Tensor | None = None) -> Tensor:
        """The attention (B, P, M, V) of every voxel to the tokens of every prompt."""
        return self._attention(features_BSCV, self.tokens(text_PT).unflatten(-1, (self.num_tokens, -1)), present_PS)

    def _attention(self, features_BSCV: Tensor, tokens_PMD: Tensor, present_PS: Tensor | None) -> Tensor:
        folded_PMSC = self.query(self.key(tokens_PMD)).to(features_BSCV.dtype).unflatten(-1, features_BSCV.shape[1:3])
        if present_PS is not None:  # the map of an absent scale is no part of the query
            folded_PMSC = folded_PMSC * present_PS[:, None, :, None]
        return torch.einsum("pmsc,bscv->bpmv", folded_PMSC, features_BSCV).softmax(dim=2)

    @torch.no_grad()
    def init_weights_(self, init: ModuleType, std: float) -> None:
        """Keeps the variance through every projection, so that the tokens of a prompt differ from the start."""
        for layer in (self.tokens, self.key, self.score):
            init.trunc_normal_(layer.weight, std=layer.weight.shape[1] ** -0.5)
        init.trunc_normal_(self.query.weight_DC, std=self.query.weight_DC.shape[1] ** -0.5)
