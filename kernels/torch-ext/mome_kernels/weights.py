"""The weights of a layer as one value, so that functions do not repeat a list of eight arguments."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class ExpertWeights(NamedTuple):
    """E feed-forward experts with stacked weights: W₂ a(W₁ x + b₁) + b₂, or W₂ (a(g) · u) + b₂ where gated.

    The order of the fields is the order of the arguments of the ops `moe_mlp` and `moe_mlp_backward`.

    Args:
        up: W₁ (E, F, D); where gated (E, 2F, D), the rows of g before those of u.
        up_bias: b₁ (E, F) or (E, 2F), or None.
        down: W₂ (E, D, F).
        down_bias: b₂ (E, D), or None.
        activation: One of `checks.ACTIVATIONS`.
        gated: Whether the hidden layer is a(g) · u with (g, u) the halves of W₁ x + b₁.
    """

    up: Tensor
    up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None
    activation: str
    gated: bool

    @property
    def num_experts(self) -> int:
        """E."""
        return self.up.shape[0]

    @property
    def up_width(self) -> int:
        """The length of z, the hidden layer before its activation: F, or 2F where gated."""
        return self.up.shape[1]

    @property
    def hidden_width(self) -> int:
        """F."""
        return self.down.shape[2]

    @property
    def out_width(self) -> int:
        """The width of the output rows."""
        return self.down.shape[1]


class HeadWeights(NamedTuple):
    """The prompts' part of the fusion head: the scores of the scales, and the three layers of each prompt.

    The order of the fields is the order of the arguments of the ops `fusion_head` and `fusion_head_backward`.

    Args:
        query: (P, C). Its dot product with a scale's feature is that scale's score.
        scale_bias: (P, S), added to the scores.
        w1, b1, w2, b2: (B, P, C, C) as (out, in), and (B, P, C): the two hidden layers.
        w3, b3: (B, P, C) and (B, P): the layer that gives the logit.
        top_k: Scales that keep a weight, those with the largest scores; 0 keeps all of them.
        negative_slope: The slope of the leaky ReLU below zero; 0 is ReLU.
    """

    query: Tensor
    scale_bias: Tensor
    w1: Tensor
    b1: Tensor
    w2: Tensor
    b2: Tensor
    w3: Tensor
    b3: Tensor
    top_k: int
    negative_slope: float

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The eight tensors, in their order."""
        return self[:8]

    @property
    def prompts(self) -> int:
        """P."""
        return self.query.shape[0]
