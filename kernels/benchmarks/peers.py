"""Other implementations of an expert layer, which the kernels are compared with on the same stacked weights.

Every peer is a function (x, ids, weights_TK, up, down, activation, gated) that returns the output.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
    "none": lambda z: z,
}


def _hidden(z: Tensor, activation: str, gated: bool) -> Tensor:
    if not gated:
        return ACTIVATIONS[activation](z)
    gate, value = z.chunk(2, dim=-1)
    return ACTIVATIONS[activation](gate) * value


def eager_loop(
    x: Tensor, ids: Tensor, weights_TK: Tensor, up: Tensor, down: Tensor, activation: str, gated: bool
) -> Tensor:
    """A carefully written loop over experts: one sort, one synchronisation, parameters unbound once."""
    flat = ids.flatten()
    order = flat.argsort(stable=True)
    sizes = flat.bincount(minlength=up.shape[0]).tolist()
    tokens = order // ids.shape[1]
    parts = []
    for rows, w1, w2 in zip(x.index_select(0, tokens).split(sizes), up.unbind(0), down.unbind(0), strict=True):
        parts.append(F.linear(_hidden(F.linear(rows, w1), activation, gated), w2))
    y = torch.cat(parts) * weights_TK.flatten()[order, None].to(x.dtype)
    return torch.zeros_like(x).index_add(0, tokens, y)


def torch_grouped_mm(
    x: Tensor, ids: Tensor, weights_TK: Tensor, up: Tensor, down: Tensor, activation: str, gated: bool
) -> Tensor:
    """`F.grouped_mm` on gathered rows."""
    flat = ids.flatten()
    order = flat.argsort(stable=True)
    tokens = order // ids.shape[1]
    offsets = torch.zeros(up.shape[0], dtype=torch.int64, device=x.device)
    offsets = offsets.scatter_add(0, flat, torch.ones_like(flat)).cumsum(0).int()
    z = F.grouped_mm(x.index_select(0, tokens), up.transpose(1, 2), offs=offsets)
    y = F.grouped_mm(_hidden(z, activation, gated), down.transpose(1, 2), offs=offsets)
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=x.device))
    y = y.index_select(0, inverse).view(*ids.shape, -1) * weights_TK[..., None].to(x.dtype)
    return y.sum(1)


def transformers_module(up: Tensor, down: Tensor, activation: str, gated: bool) -> Any:
    """An object with the attributes of an expert module that transformers' functions read."""
    moe = importlib.import_module("transformers.integrations.moe")
    act = ACTIVATIONS[activation]
    module = SimpleNamespace(
        num_experts=up.shape[0], has_gate=gated, has_bias=False, is_transposed=False, is_concatenated=True,
        has_post_expert_norm=False, _is_expert_parallel=False, act_fn=act, down_proj=down, gate_up_proj=up,
        up_proj=up, training=True, config=SimpleNamespace(),
    )  # fmt: skip
    module._apply_gate = lambda z: moe._default_apply_gate(module, z)
    return module


def transformers_function(name: str) -> Callable[..., Tensor]:
    """`batched_mm` or `grouped_mm` of transformers, as a peer."""

    def run(
        x: Tensor, ids: Tensor, weights_TK: Tensor, up: Tensor, down: Tensor, activation: str, gated: bool
    ) -> Tensor:
        function = importlib.import_module("transformers.integrations.moe").ALL_EXPERTS_FUNCTIONS[name]
        return function(transformers_module(up, down, activation, gated), x, ids, weights_TK.to(x.dtype))

    return run


def transformers_eager(
    x: Tensor, ids: Tensor, weights_TK: Tensor, up: Tensor, down: Tensor, activation: str, gated: bool
) -> Tensor:
    """The loop over experts of transformers' own models: that of Mixtral if gated, else that of Nemotron-H."""
    name, kind = ("mixtral", "MixtralExperts") if gated else ("nemotron_h", "NemotronHExperts")
    experts = getattr(importlib.import_module(f"transformers.models.{name}.modeling_{name}"), kind)
    module = transformers_module(up, down, activation, gated)
    module.config._experts_implementation = "eager"
    return experts.forward(module, x, ids, weights_TK.to(x.dtype))


def dense(x: Tensor, ids: Tensor, weights_TK: Tensor, up: Tensor, down: Tensor, activation: str, gated: bool) -> Tensor:
    """One expert's layer on T · K rows: the same arithmetic without routing, as a bound. Its outputs differ."""
    rows = x if ids.shape[1] == 1 else x.repeat_interleave(ids.shape[1], dim=0)
    return F.linear(_hidden(F.linear(rows, up[0]), activation, gated), down[0])


def scattermoe(
    x: Tensor, ids: Tensor, weights_TK: Tensor, up: Tensor, down: Tensor, activation: str, gated: bool
) -> Tensor:
    """The parallel linear layers of ScatterMoE; needs its package."""
    ops = importlib.import_module("scattermoe.parallel_experts")
    k, experts = ids.shape[1], up.shape[0]
    order, scattered, offsets = ops.flatten_sort_count(ids, num_experts=experts)
    h = ops.parallel_linear(x, up.transpose(1, 2), k, order, scattered, offsets, grouped_out=True)
    return ops.parallel_linear(
        _hidden(h, activation, gated),
        down.transpose(1, 2),
        1,
        order,
        scattered,
        offsets,
        grouped_in=True,
        gates=weights_TK.to(x.dtype),
    )


def liger(x: Tensor, ids: Tensor, weights_TK: Tensor, up: Tensor, down: Tensor, activation: str, gated: bool) -> Tensor:
    """The fused mixture of experts of Liger (gated SiLU only); needs its package."""
    if not gated or activation != "silu":
        raise NotImplementedError("liger: gated SiLU only")
    ops = importlib.import_module("liger_kernel.ops.fused_moe")
    return ops.LigerFusedMoEFunction.apply(x, up, down, ids.int(), weights_TK)


def grouped_convolutions(inputs: list[Tensor], side: int) -> Tensor:
    """The head of the CLIP-Driven Universal Model: the map repeated per prompt, and three grouped convolutions."""
    f, _, _, w1, b1, w2, b2, w3, b3 = inputs
    prompts, c = w1.shape[1], w1.shape[2]
    x = f.reshape(1, c, side, side, side).repeat(1, prompts, 1, 1, 1)
    x = F.conv3d(x, w1.reshape(prompts * c, c, 1, 1, 1), b1.flatten(), groups=prompts).relu()
    x = F.conv3d(x, w2.reshape(prompts * c, c, 1, 1, 1), b2.flatten(), groups=prompts).relu()
    return F.conv3d(x, w3.reshape(prompts, c, 1, 1, 1), b3.flatten(), groups=prompts).reshape(1, prompts, side**3)


PEERS: dict[str, Callable[..., Tensor]] = {
    "eager_loop": eager_loop,
    "grouped_mm": torch_grouped_mm,
    "transformers_grouped_mm": transformers_function("grouped_mm"),
    "dense": dense,
    # kernels of other libraries come last: if one makes the device unusable, the other figures are already there
    "scattermoe": scattermoe,
    "liger": liger,
}
CAPTURED = ("grouped_mm", "dense")  # these do not synchronise, and so can be replayed from a CUDA graph
_NEEDS = {"transformers_grouped_mm": "transformers", "scattermoe": "scattermoe", "liger": "liger_kernel"}


def found(name: str) -> bool:
    """Whether the package of a peer is installed."""
    if name == "grouped_mm":
        return hasattr(F, "grouped_mm")
    return name not in _NEEDS or importlib.util.find_spec(_NEEDS[name]) is not None
