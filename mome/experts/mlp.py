"""Feed-forward experts with stacked weights, run by the grouped kernels."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import ClassVar

import torch
from mome_kernels import moe_mlp
from mome_kernels.checks import ACTIVATIONS
from torch import Tensor, nn

from mome.errors import InputError, did_you_mean
from mome.experts.base import TokenExperts
from mome.registry import at_least


class FeedForwardExperts(TokenExperts):
    """Two linear layers per expert; gated where the class says so.

    Weights are stacked in Hugging Face's layout: `gate_up_proj` (E, 2F, D) or `up_proj` (E, F, D), and
    `down_proj` (E, D, F).
    """

    stacked = True
    gated: ClassVar[bool]
    gate_up_proj: nn.Parameter
    up_proj: nn.Parameter

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Settings of the feed-forward experts.

        Args:
            n: Number of experts.
            ratio: Hidden width as a multiple of the input width.
            hidden: Hidden width; 0 takes it from `ratio`.
            activation: One of none, relu, silu, gelu, gelu_tanh.
            bias: Whether both layers have biases.
        """

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
            raise InputError(
                f"no activation '{config.activation}'{did_you_mean(config.activation, ACTIVATIONS)}",
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
    def up_weight(self) -> nn.Parameter:
        """The first layer's weights: (E, 2F, D) where gated, else (E, F, D)."""
        return self.gate_up_proj if self.gated else self.up_proj

    def forward(self, x_TD: Tensor, ids_TK: Tensor | None, weights_TK: Tensor | None) -> Tensor:
        assert ids_TK is not None and weights_TK is not None
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
        """Keeps the variance in the first layer and halves the scale of the second, so that residuals stay small."""
        init.trunc_normal_(self.up_weight, std=self.up_weight.shape[-1] ** -0.5)
        init.trunc_normal_(self.down_proj, std=0.5 * self.down_proj.shape[-1] ** -0.5)
        for bias in (self.up_bias, self.down_bias):
            if bias is not None:
                init.zeros_(bias)


class MLPExperts(FeedForwardExperts):
    """W₂ act(W₁ x + b₁) + b₂ (Vaswani et al. 2017, arXiv 1706.03762), with GELU unless the config says otherwise."""

    gated = False

    @dataclass(frozen=True, kw_only=True)
    class Config(FeedForwardExperts.Config):
        """The settings of the feed-forward experts; four times the width, GELU and biases by default."""


class SwiGLUExperts(FeedForwardExperts):
    """W₂ (SiLU(W_g x) · W_u x) (Shazeer 2020, arXiv 2002.05202)."""

    gated = True

    @dataclass(frozen=True, kw_only=True)
    class Config(FeedForwardExperts.Config):
        """The settings of the feed-forward experts; a ratio of 8/3 gives as many parameters as an MLP of ratio 4."""

        ratio: float = 8 / 3
        activation: str = "silu"
        bias: bool = False


class GeGLUExperts(FeedForwardExperts):
    """W₂ (GELU(W_g x) · W_u x) (Shazeer 2020, arXiv 2002.05202)."""

    gated = True

    @dataclass(frozen=True, kw_only=True)
    class Config(FeedForwardExperts.Config):
        """The settings of `swiglu`, with GELU."""

        ratio: float = 8 / 3
        activation: str = "gelu"
        bias: bool = False
