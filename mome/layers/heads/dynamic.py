"""The text-generated head: a controller writes the weights of three 1×1×1 layers for every prompt.

The idea is DoDNet's (Zhang et al. 2021) and the CLIP-Driven Universal Model's (Liu et al. 2023), whose widths
(C = 8, 256 + 256 controller inputs) are the defaults. The initialisation is our choice.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mome.errors import InputError
from mome.layers.heads.base import Head, HeadLayers, prior_logit
from mome.registry import at_least


class DynamicHead(Head):
    """Logits (B, P, V) = w₃ · φ(W₂ φ(W₁ m_p(v) + b₁) + b₂) + b₃, the weights made for (image, prompt).

    Sources: DoDNet (arXiv 2011.10217) and the CLIP-Driven Universal Model (arXiv 2301.00785).
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Settings of `dynamic`.

        Args:
            hidden: Width of the text half and of the image half of the controller's input.
            prior: Probability of a voxel before training.
            negative_slope: The slope of φ below zero. With 0, the ReLU of the published heads, a prompt whose hidden
                units are all negative gets no gradient and stays empty; a small slope lets it recover.
        """

        hidden: int = 256
        prior: float = 0.02
        negative_slope: float = 0.0

    def __init__(self, config: Config, *, channels: int, text_dim: int, bottleneck_channels: int) -> None:
        super().__init__()
        at_least(1, "the head", hidden=config.hidden)
        if not 0 <= config.negative_slope < 1:
            raise InputError(f"negative_slope of the head is at least 0 and below 1, got {config.negative_slope}")
        self.channels, self.negative_slope = channels, config.negative_slope
        self.bias_start = prior_logit(config.prior)
        groups = 16 if bottleneck_channels % 16 == 0 else 1
        self.image_norm = nn.GroupNorm(groups, bottleneck_channels)
        self.image = nn.Linear(bottleneck_channels, config.hidden)
        self.text = nn.Linear(text_dim, config.hidden)
        # (W1, b1, W2, b2, w3, b3) in this order; 153 numbers at C = 8
        self.sizes = (channels**2, channels, channels**2, channels, channels, 1)
        self.controller = nn.Linear(2 * config.hidden, sum(self.sizes))

    def forward(self, mixture_BPCV: Tensor, text_PT: Tensor, bottleneck: Tensor) -> Tensor:
        w1, b1, w2, b2, w3, b3, slope = self.layers(text_PT, bottleneck)
        x_BPCV = F.leaky_relu(w1 @ mixture_BPCV + b1[..., None], slope)
        x_BPCV = F.leaky_relu(w2 @ x_BPCV + b2[..., None], slope)
        return (w3[..., None, :] @ x_BPCV).squeeze(-2) + b3[..., None]

    def layers(self, text_PT: Tensor, bottleneck: Tensor) -> HeadLayers:
        pooled_BC = self.image_norm(bottleneck).relu().mean(dim=(2, 3, 4))
        image_BH, text_PH = self.image(pooled_BC), self.text(text_PT).relu()
        batch, prompts, c = image_BH.shape[0], text_PH.shape[0], self.channels
        both_BPH = torch.cat([image_BH[:, None].expand(-1, prompts, -1), text_PH[None].expand(batch, -1, -1)], dim=-1)
        w1, b1, w2, b2, w3, b3 = self.controller(both_BPH).split(self.sizes, dim=-1)
        square = (batch, prompts, c, c)
        return HeadLayers(w1.reshape(square), b1, w2.reshape(square), b2, w3, b3.squeeze(-1), self.negative_slope)

    @torch.no_grad()
    def init_weights_(self, init: ModuleType, std: float) -> None:
        """The controller's bias alone makes a well-scaled head; text and image start as small changes to it."""
        init.trunc_normal_(self.text.weight, std=self.text.weight.shape[1] ** -0.5)
        init.trunc_normal_(self.image.weight, std=self.image.weight.shape[1] ** -0.5)
        init.trunc_normal_(self.controller.weight, std=0.5 * (self.controller.weight.shape[1] * self.channels) ** -0.5)
        base = torch.empty_like(self.controller.bias)
        init.trunc_normal_(base, std=(2.0 / self.channels) ** 0.5)
        start = 0
        for index, size in enumerate(self.sizes):
            if index % 2:  # biases are zero, except the last, which is the logit of the prior
                base[start : start + size] = self.bias_start if index == 5 else 0.0
            start += size
        init.copy_(self.controller.bias, base)
