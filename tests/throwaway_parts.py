"""Throw-away parts that a newcomer wrote from CONTRIBUTING.md; test_seams.py runs them in whole models.

Each class stands for one file, and each line of `PARTS` for its registration. None of them is part of the package.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from mome.encoders.base import Encoder, Pyramid
from mome.experts.base import MapExperts, PromptExperts, TokenExperts
from mome.map_context import DEFAULT_CONTEXT
from mome.registry import ENCODERS, EXPERTS, FUSIONS, LAYERS, ROUTERS, part
from mome.routers.base import Router
from mome.routers.fusion.base import Fusion
from mome.routers.groups import Groups
from mome.routers.routing import Assignments, Slots, TokenChoice, count_assignments


class ExpertChoiceRouter(Router):
    """Every expert takes its best tokens of each sample (Zhou et al. 2022); the groups are the samples of the batch."""

    returns = Assignments

    @dataclass(frozen=True, kw_only=True)
    class Config:
        capacity: float = 2.0

    def __init__(self, config, *, dim, num_experts):
        super().__init__()
        self.num_experts, self.capacity = num_experts, config.capacity
        self.gate = nn.Linear(dim, num_experts, bias=False)

    def forward(self, x_BDHWC, context):
        batch, tokens = x_BDHWC.shape[0], x_BDHWC[0, ..., 0].numel()
        with torch.autocast(x_BDHWC.device.type, enabled=False):
            scores_BTE = self.gate(x_BDHWC.float().flatten(1, 3)).softmax(dim=-1)
        taken = min(tokens, math.ceil(tokens * self.capacity / self.num_experts))
        weights_BEN, index_BEN = scores_BTE.transpose(1, 2).topk(taken, dim=-1)
        first_B = torch.arange(batch, device=x_BDHWC.device) * tokens
        return Assignments(
            torch.full((self.num_experts,), batch * taken, device=x_BDHWC.device),
            scores_BTE.flatten(0, 1),
            tokens_N=(index_BEN + first_B[:, None, None]).transpose(0, 1).flatten(),
            weights_N=weights_BEN.transpose(0, 1).flatten(),
            experts_N=torch.arange(self.num_experts, device=x_BDHWC.device).repeat_interleave(batch * taken),
            tokens=batch * tokens,
        )


class ConvExperts(MapExperts):
    """y_e = pointwise_e(depthwise_e(x)), with kernels of 3 × 3 × 3."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        n: int = 2

    def __init__(self, config, *, dim):
        super().__init__()
        self.num_experts = config.n
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Conv3d(dim, dim, 3, padding=1, groups=dim), nn.Conv3d(dim, dim, 1))
            for _ in range(config.n)
        )

    def forward(self, x_BDHWC, gates_BDHWE, context):
        x_BCDHW = x_BDHWC.movedim(-1, 1)
        results = [layer(x_BCDHW).movedim(1, -1) for layer in self.layers]
        return (torch.stack(results, dim=-1) * gates_BDHWE[..., None, :]).sum(dim=-1).to(x_BDHWC.dtype)


class FiLMExperts(PromptExperts):
    """y_e = γ_e(text) ⊙ x + β_e(text) (Perez et al. 2018)."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        n: int = 2

    def __init__(self, config, *, dim, text_dim):
        super().__init__()
        self.num_experts = config.n
        self.numbers = nn.Linear(text_dim, config.n * 2 * dim)

    def forward(self, x_BDHWC, gates_BDHWE, context):
        gamma_BEC, beta_BEC = self.numbers(context.text_BT).unflatten(-1, (self.num_experts, -1)).chunk(2, dim=-1)
        results = gamma_BEC[:, None, None, None] * x_BDHWC[..., None, :] + beta_BEC[:, None, None, None]
        return (results * gates_BDHWE[..., None]).sum(dim=-2).to(x_BDHWC.dtype)


class GateFusion(Fusion):
    """Σ_s sigmoid(MLP(f_s(v), text_p)) · f_s(v): gates of each scale alone, so no softmax of dot products."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        hidden: int = 8

    def __init__(self, config, *, channels, text_dim, scales):
        super().__init__()
        self.voxel = nn.Linear(channels, config.hidden)
        self.text = nn.Linear(text_dim, config.hidden, bias=False)
        self.gate = nn.Linear(config.hidden, 1)

    def forward(self, features_BSCV, text_PT):
        features_B1SVC = features_BSCV.transpose(2, 3)[:, None]
        hidden_BPSVF = self.voxel(features_B1SVC) + self.text(text_PT)[:, None, None]
        gates_BPSV1 = self.gate(hidden_BPSVF.relu()).sigmoid()
        return (gates_BPSV1 * features_B1SVC).sum(dim=2).transpose(2, 3)


class FlatEncoder(Encoder):
    """Strides (1, 2, 2), then two along every axis, with a sparse layer at the bottom. No stage has stride one."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        channels: list[int] = field(default_factory=lambda: [8, 16])
        layers: Any = part("layers", "moe(experts=mlp(n=2, hidden=8), router=topk(k=1))")

    def __init__(self, config, *, in_channels):
        super().__init__()
        fine, deep = config.channels
        self.channels, self.strides = (deep, fine), ((2, 4, 4), (1, 2, 2))
        self.bottleneck_channels, self.size_divisor = deep, (2, 4, 4)
        self.stem = nn.Conv3d(in_channels, fine, 3, stride=(1, 2, 2), padding=1)
        self.down = nn.Conv3d(fine, deep, 3, stride=2, padding=1)
        self.norm = nn.GroupNorm(4, deep)
        self.mixture = LAYERS.build(config.layers, dim=deep)
        self.up = nn.ConvTranspose3d(deep, fine, 2, stride=2)

    def forward(self, x_BCDHW, context=DEFAULT_CONTEXT):
        fine = self.stem(x_BCDHW)
        deep = self.norm(self.down(fine.relu())).relu()
        mixed_BDHWC, routing = self.mixture(deep.movedim(1, -1), context.with_stride(self.strides[0]))
        deep = deep + mixed_BDHWC.movedim(-1, 1)
        return Pyramid((deep, fine + self.up(deep)), deep, (routing,) if routing is not None else ())


class PlaceRouter(Router):
    """Top one of scores of content and place; a bias that follows the load chooses but does not weigh."""

    returns = TokenChoice

    @dataclass(frozen=True, kw_only=True)
    class Config:
        period: float = 64.0
        rate: float = 0.01

    def __init__(self, config, *, dim, num_experts):
        super().__init__()
        self.num_experts, self.period, self.rate = num_experts, config.period, config.rate
        self.gate = nn.Linear(dim, num_experts, bias=False)
        self.place = nn.Linear(6, num_experts, bias=False)
        self.register_buffer("bias_E", torch.empty(num_experts))
        self.register_buffer("load_E", torch.empty(num_experts), persistent=False)

    def forward(self, x_BDHWC, context):
        batch, *sides, _ = x_BDHWC.shape
        device = x_BDHWC.device
        axes = [torch.arange(n, device=device) * step for n, step in zip(sides, context.stride, strict=True)]
        where = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).expand(batch, -1, -1, -1, -1)
        if context.origin_B3 is not None:
            where = where + context.origin_B3[:, None, None, None]
        angle = where.float() * (2 * math.pi / self.period)
        with torch.autocast(device.type, enabled=False):
            scores = self.gate(x_BDHWC.float()) + self.place(torch.cat([angle.sin(), angle.cos()], dim=-1))
        probabilities_TE = scores.flatten(0, 3).softmax(dim=-1)
        ids_TK = (probabilities_TE + self.bias_E).argmax(dim=-1, keepdim=True)
        counts_E = count_assignments(ids_TK, self.num_experts)
        return TokenChoice(counts_E, probabilities_TE, ids_TK=ids_TK, weights_TK=probabilities_TE.gather(1, ids_TK))

    @torch.no_grad()
    def observe(self, routing):
        self.load_E += routing.counts_E

    @torch.no_grad()
    def after_step(self):
        self.bias_E += self.rate * (self.load_E.mean() - self.load_E).sign()
        self.load_E.zero_()

    @torch.no_grad()
    def init_weights_(self, init, std):
        init.normal_(self.place.weight, std=1.0)
        init.zeros_(self.bias_E)
        init.zeros_(self.load_E)


class SlotRouter(Router):
    """Soft MoE (Puigcerver et al. 2024) with one slot per expert; here so that every form of routing has a router."""

    returns = Slots

    @dataclass(frozen=True, kw_only=True)
    class Config:
        pass

    def __init__(self, config, *, dim, num_experts):
        super().__init__()
        self.num_experts = num_experts
        self.slots_SC = nn.Parameter(torch.empty(num_experts, dim))

    def forward(self, x_BDHWC, context):
        batch, *sides, _ = x_BDHWC.shape
        counts_E = torch.full((self.num_experts,), batch, device=x_BDHWC.device)
        keys_GMC, queries_SC = x_BDHWC.float().flatten(1, 3), self.slots_SC.float()
        return Slots(counts_E, keys_GMC=keys_GMC, queries_SC=queries_SC, groups=Groups(batch, tuple(sides)))

    @torch.no_grad()
    def init_weights_(self, init, std):
        init.normal_(self.slots_SC, std=std)


class OwnExperts(TokenExperts):
    """A module object: no Config, no registration, weights of its own. y_e = x + s_e."""

    num_experts = 2

    def __init__(self, dim):
        super().__init__()
        self.shift_EC = nn.Parameter(torch.randn(2, dim))

    def forward(self, x_TC, ids_TK, weights_TK):
        return (weights_TK[..., None] * (x_TC[:, None] + self.shift_EC[ids_TK])).sum(dim=1).to(x_TC.dtype)


PARTS = [
    (ROUTERS, "own_choice", ExpertChoiceRouter),
    (EXPERTS, "own_conv", ConvExperts),
    (FUSIONS, "gate", GateFusion),
    (ENCODERS, "flat", FlatEncoder),
    (EXPERTS, "own_film", FiLMExperts),
    (ROUTERS, "place", PlaceRouter),
    (ROUTERS, "slot", SlotRouter),
]


def register(monkeypatch):
    """Registers all of them until the end of the test."""
    for registry in {registry for registry, _, _ in PARTS}:
        registry.names()  # the built-in parts and plug-ins come first
        monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    for registry, name, cls in PARTS:
        registry.register(name, cls, summary="throw-away")
