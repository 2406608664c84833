"""Feed-forward experts with stacked weights, run by the grouped kernels."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from types import ModuleType
from typing import ClassVar

import torch
from mome_kernels import moe_mlp
from mome_kernels.checks import ACTIVATIONS
from torch import Tensor, nn

from mome.errors import InputError
from mome.registry import at_least
from mome.routers.routing import Routing


class FeedForwardExperts(nn.Module):
    """Two linear layers per expert; gated where the class says so.

    Weights are stacked in Hugging Face's layout: `gate_up_proj` (E, 2F, D) or `up_proj` (E, F, D), and
    `down_proj` (E, D, F).
    """

    token_local = True
    residual = True
    gated: ClassVar[bool]

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Number of experts; hidden width as a multiple of the input width (0: use `hidden`); activation."""

        n: int = 1
        ratio: float = 4.0
        hidden: int = 0
        activation: str = "gelu"
        bias: bool = True

    def __init__(self, config: Config, *, dim: int) -> None:
        super().__init__()
        hidden = config.hidden or int(round(dim * config.ratio))
        at_least(1, "feed-forward experts", n=config.n, hidden=hidden)
        if config.activation not in ACTIVATIONS:
            close = difflib.get_close_matches(config.activation, ACTIVATIONS, n=1)
            raise InputError(
                f"no activation '{config.activation}'" + (f", did you mean '{close[0]}'?" if close else ""),
                hint="activations: " + ", ".join(ACTIVATIONS),
            )
        self.num_experts, self.activation = config.n, config.activation
        name = "gate_up_proj" if self.gated else "up_proj"
        width = 2 * hidden if self.gated else hidden
        self.register_parameter(name, nn.Parameter(torch.empty(config.n, width, dim)))
        self.down_proj = nn.Parameter(torch.empty(config.n, dim, hidden))
        self.up_bias = nn.Parameter(torch.empty(config.n, width)) if config.bias else None
        self.down_bias = nn.Parameter(torch.empty(config.n, dim)) if config.bias else None

    @property
    def up_weight(self) -> Tensor:
        """The first layer's weights: (E, 2F, D) where gated, else (E, F, D)."""
        return self.gate_up_proj if self.gated else self.up_proj

    def forward(self, x_TD: Tensor, routing: Routing | None = None) -> Tensor:
        if routing is None:  # one expert: every token, weight one
            ids_TK = torch.zeros(x_TD.shape[0], 1, dtype=torch.int64, device=x_TD.device)
            weights_TK = torch.ones(x_TD.shape[0], 1, dtype=torch.float32, device=x_TD.device)
        else:
            ids_TK, weights_TK = routing.expert_ids_TK, routing.weights_TK
        return moe_mlp(
            x_TD,
            ids_TK,
            weights_TK,
            self.up_weight,
            self.up_bias,
            self.down_proj,
            self.down_bias,
            activation=self.activation,
            gated=self.gated,
        )

    @torch.no_grad()
    def init_weights_(self, init: ModuleType, std: float) -> None:
        init.trunc_normal_(self.up_weight, std=self.up_weight.shape[-1] ** -0.5)
        init.trunc_normal_(self.down_proj, std=0.5 * self.down_proj.shape[-1] ** -0.5)
        for bias in (self.up_bias, self.down_bias):
            if bias is not None:
                init.zeros_(bias)


class MLPExperts(FeedForwardExperts):
    """W₂ act(W₁ x + b₁) + b₂ (GELU unless the config says otherwise)."""

    gated = False

    @dataclass(frozen=True, kw_only=True)
    class Config(FeedForwardExperts.Config):
        """As above: 4× the width, GELU, biases."""


class SwiGLUExperts(FeedForwardExperts):
    """W₂ (SiLU(W_g x) · W_u x) (Shazeer 2020, arXiv 2002.05202)."""

    gated = True

    @dataclass(frozen=True, kw_only=True)
    class Config(FeedForwardExperts.Config):
        """As for `mlp`; the default ratio keeps the parameters of a 4× MLP."""

        ratio: float = 8 / 3
        activation: str = "silu"
        bias: bool = False


class GeGLUExperts(FeedForwardExperts):
    """W₂ (GELU(W_g x) · W_u x) (Shazeer 2020, arXiv 2002.05202)."""

    gated = True

    @dataclass(frozen=True, kw_only=True)
    class Config(FeedForwardExperts.Config):
        """As for `swiglu`, with GELU."""

        ratio: float = 8 / 3
        activation: str = "gelu"
        bias: bool = False
