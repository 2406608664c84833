"""Experts that share one base and differ from it by matrices of low rank."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from mome_kernels import moe_mlp
from torch import Tensor, nn

from mome.errors import InputError
from mome.experts.base import TokenExperts
from mome.experts.nested import build_token_experts, run_on_every_token
from mome.registry import at_least, part


class LoRAExperts(TokenExperts):
    """y = Σ_k w_k · (base(x) + α/r · B_k A_k x).

    The low-rank difference is that of LoRA (Hu et al. 2021, arXiv 2106.09685), here as an expert beside a base that is
    trained, too; our choice. The base runs once for every token, weighed by the sum of the token's weights. Routers
    whose experts choose their tokens hand each assignment over as a token of its own, and soft routers each slot: then
    it runs once for each of these. Unlike in LoRA, B does not start at zero, at which all experts would be the base
    and A would have no gradient.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Settings of `lora`.

        Args:
            n: Number of experts, which are low-rank differences.
            rank: Rank r of the differences, from 1 to the width of the tokens.
            alpha: The differences are scaled by alpha / rank; above 0.
            base: The expert that all share: one expert that reads tokens.
        """

        n: int = 8
        rank: int = 4
        alpha: float = 4.0
        base: Any = part("experts", "linear")

    def __init__(self, config: Config, *, dim: int) -> None:
        super().__init__()
        at_least(1, "lora experts", n=config.n)
        if not 1 <= config.rank <= dim:
            raise InputError(
                f"rank of lora experts is a number from 1 to the width {dim} of the tokens, got {config.rank}",
                hint=f"lora(rank={min(4, dim)})",
            )
        if not config.alpha > 0:
            raise InputError(f"alpha of lora experts is above 0, got {config.alpha:g}", hint="lora(alpha=4.0)")
        self.num_experts, self.scale = config.n, config.alpha / config.rank
        self.base = build_token_experts(config.base, dim=dim, owner="lora", argument="base", count=1)
        self._dense = self.base.dense_when_single
        # The names say nothing of LoRA: PEFT takes every parameter with "lora_" in its name for one of an adapter.
        self.reduce_ERD = nn.Parameter(torch.empty(config.n, config.rank, dim))
        self.expand_EDR = nn.Parameter(torch.empty(config.n, dim, config.rank))

    def forward(self, x_TD: Tensor, ids_TK: Tensor | None, weights_TK: Tensor | None) -> Tensor:
        assert ids_TK is not None and weights_TK is not None
        base_TD = run_on_every_token(self.base, x_TD, weights_TK.sum(-1, keepdim=True), dense=self._dense)
        weights_TK = weights_TK * self.scale
        return base_TD + moe_mlp(x_TD, ids_TK, weights_TK, self.reduce_ERD, None, self.expand_EDR, None, "none")

    @torch.no_grad()
    def init_weights_(self, init: ModuleType, std: float) -> None:
        """Gives each difference, before its scale, about a quarter of the tokens' variance."""
        init.trunc_normal_(self.reduce_ERD, std=self.reduce_ERD.shape[-1] ** -0.5)
        init.trunc_normal_(self.expand_EDR, std=0.5 * self.expand_EDR.shape[-1] ** -0.5)
