"""Visual-language experts: voxels attend to tokens that are made from the prompt."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor, nn

from mome.errors import InputError
from mome.experts.base import PromptExperts
from mome.experts.gates import experts_to_run
from mome.map_context import MapContext
from mome.registry import at_least


class CrossAttentionExperts(PromptExperts):
    """y_e = W_o softmax(⟨W_q x + b_q, W_k c_m⟩ / √d over m) W_v c_m + b_o, per head, with M tokens c_m of the prompt.

    The attention is that of Vaswani et al. 2017 (arXiv 1706.03762). The tokens are our choice: c = LayerNorm of M
    linear functions of the text row. With one token the attention would be one everywhere, so M is at least 2. All
    experts share the tokens; W_q, W_k, W_v and W_o are each expert's own.

    What depends on the prompt alone is folded once per prompt: query and key into one score vector per head and token,
    value and output into one result vector. A voxel then costs 2 · D · heads · M multiplications per expert, instead
    of 2 · D². Every expert computes the whole map, whatever its gates; see `mome.experts.gates` for eval.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Settings of `cross_attention`.

        Args:
            n: Number of experts.
            tokens: Number M of tokens that are made from the prompt's text row, at least 2.
            heads: Number of attention heads; it divides the width of the voxels.
        """

        n: int = 2
        tokens: int = 8
        heads: int = 4

    def __init__(self, config: Config, *, dim: int, text_dim: int) -> None:
        super().__init__()
        at_least(1, "cross_attention experts", n=config.n, heads=config.heads)
        if config.tokens < 2:
            raise InputError(
                f"tokens of cross_attention experts is at least 2, got {config.tokens}: with one token every voxel "
                "has the same result",
                hint="cross_attention(tokens=8)",
            )
        if dim % config.heads:
            raise InputError(
                f"heads={config.heads} of cross_attention experts do not divide the width {dim} of the voxels",
                hint=f"cross_attention(heads={next(h for h in (4, 3, 2, 1) if dim % h == 0)}), or another dim",
            )
        self.num_experts, self.heads, self.head_width = config.n, config.heads, dim // config.heads
        self.tokens = nn.Linear(text_dim, config.tokens * dim)
        self.norm = nn.LayerNorm(dim)
        self.query_EDD = nn.Parameter(torch.empty(config.n, dim, dim))
        self.query_bias_ED = nn.Parameter(torch.empty(config.n, dim))
        self.key_EDD = nn.Parameter(torch.empty(config.n, dim, dim))
        self.value_EDD = nn.Parameter(torch.empty(config.n, dim, dim))
        self.out_EDD = nn.Parameter(torch.empty(config.n, dim, dim))
        self.out_bias_ED = nn.Parameter(torch.empty(config.n, dim))

    def forward(self, x_BDHWC: Tensor, gates_BDHWE: Tensor, context: MapContext) -> Tensor:
        assert context.text_BT is not None
        score_BEND, offset_BEN, result_BEND = (folded.to(x_BDHWC.dtype) for folded in self._folded(context.text_BT))
        x_BVD, gates_BVE = x_BDHWC.flatten(1, 3), gates_BDHWE.flatten(1, 3)
        y_BVD = x_BVD.new_zeros(x_BVD.shape, dtype=gates_BVE.dtype)
        wide = torch.promote_types(x_BDHWC.dtype, torch.float32)
        for e in experts_to_run(gates_BDHWE, self.training):
            scores_BVN = torch.baddbmm(offset_BEN[:, e, None], x_BVD, score_BEND[:, e].mT)
            shares_BVN = scores_BVN.to(wide).unflatten(-1, (self.heads, -1)).softmax(-1).flatten(-2)
            result_BVD = torch.bmm(shares_BVN.to(x_BDHWC.dtype), result_BEND[:, e]) + self.out_bias_ED[e]
            y_BVD = y_BVD + gates_BVE[..., e, None] * result_BVD
        return y_BVD.to(x_BDHWC.dtype).view(x_BDHWC.shape)

    def _folded(self, text_BT: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What a voxel is multiplied by for these prompts, in float32 at least; N = heads · M.

        Returns:
            Vectors (B, E, N, D) and offsets (B, E, N) that give the scores, and the vectors (B, E, N, D) of the result.
        """
        tokens_BMC = self.norm(self.tokens(text_BT).unflatten(-1, (-1, self.query_EDD.shape[-1])))
        wide = torch.promote_types(tokens_BMC.dtype, torch.float32)
        by_head = (self.heads, self.head_width)
        with torch.autocast(text_BT.device.type, enabled=False):
            tokens_BMC = tokens_BMC.to(wide)
            query, query_bias, key, value = (
                parameter.to(wide).unflatten(1, by_head)
                for parameter in (self.query_EDD, self.query_bias_ED, self.key_EDD, self.value_EDD)
            )
            out = self.out_EDD.to(wide).unflatten(2, by_head)
            # b batch, m token, e expert, h head, d width of a head, c width of a voxel
            keys = torch.einsum("bmc,ehdc->behmd", tokens_BMC, key) * self.head_width**-0.5
            values = torch.einsum("bmc,ehdc->behmd", tokens_BMC, value)
            scores = torch.einsum("behmd,ehdc->behmc", keys, query)
            offsets = torch.einsum("behmd,ehd->behm", keys, query_bias)
            results = torch.einsum("behmd,echd->behmc", values, out)
        return scores.flatten(2, 3), offsets.flatten(2, 3), results.flatten(2, 3)

    @torch.no_grad()
    def init_weights_(self, init: ModuleType, std: float) -> None:
        """Keeps the variance in the projections and halves the scale of the last, so that residuals stay small."""
        init.trunc_normal_(self.tokens.weight, std=self.tokens.weight.shape[1] ** -0.5)
        for weight in (self.query_EDD, self.key_EDD, self.value_EDD):
            init.trunc_normal_(weight, std=weight.shape[-1] ** -0.5)
        init.trunc_normal_(self.out_EDD, std=0.5 * self.out_EDD.shape[-1] ** -0.5)
        for bias in (self.query_bias_ED, self.out_bias_ED):
            init.zeros_(bias)
