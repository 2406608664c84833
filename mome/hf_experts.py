"""Runs the experts of any Hugging Face mixture of experts with `mome_kernels`: `experts_implementation="mome"`.

`import mome.auto` registers the implementation. It relies on the attributes that transformers defines for expert
modules (stacked `gate_up_proj` or `up_proj`, and `down_proj`, in either orientation, with or without biases and gates),
not on a particular model.
"""

from __future__ import annotations

from typing import Any

import torch
from mome_kernels import combine, moe_linear, moe_mlp
from torch import Tensor, nn
from transformers.integrations import moe

from mome.errors import InputError

NAME = "mome"
# The kernels' names for the activation modules of transformers and torch, by class name.
_ACTIVATIONS = {
    "SiLUActivation": "silu",
    "SiLU": "silu",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
    "ReLU": "relu",
}


def register_experts_implementation() -> None:
    """Adds "mome" to the experts implementations of transformers; a second call changes nothing."""
    moe.ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)


def check_experts(model: nn.Module) -> list[str]:
    """Checks that the experts of a Hugging Face model run on `mome_kernels`.

    transformers ignores `experts_implementation` without a message in models whose experts are not written for it.
    In transformers 5.24 these are dbrx, doge, jetmoe, llama4, longcat_flash, nllb_moe and switch_transformers.

    Args:
        model: The model, or any part of it.

    Returns:
        Names of the expert modules that run on `mome_kernels`.

    Raises:
        InputError: The model has no experts that can, or some of them run on another implementation.
    """
    found = {
        name: module.config._experts_implementation
        for name, module in model.named_modules()
        if hasattr(module, "_apply_gate") and hasattr(module, "_is_expert_parallel")
    }
    if not found:
        raise InputError(
            f"experts_implementation='{NAME}' has no effect on {type(model).__name__}: transformers ignores the "
            "setting, because the model has no experts that are written for it",
            hint="run its own experts ('eager')",
        )
    others = {name: used for name, used in found.items() if used != NAME}
    if others:
        name, used = next(iter(others.items()))
        raise InputError(
            f"{len(others)} of {len(found)} expert modules run on '{used}', not on '{NAME}'",
            where=name,
            hint=f"model.set_experts_implementation('{NAME}')",
        )
    return list(found)


def experts_forward(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Runs an expert module of transformers.

    A module with its own form of gate (gpt-oss: interleaved and clamped) runs as two linear expert layers, with the
    module's gate between them. All other modules run as one `mome::moe_mlp`.

    Args:
        module: The expert module, which holds the weights.
        hidden_states: Tokens (T, D).
        top_k_index: Experts of every token (T, K).
        top_k_weights: Routing weights (T, K).

    Returns:
        Tokens (T, D).

    Raises:
        NotImplementedError: The module uses expert parallelism, or has a norm after each expert.
    """
    if getattr(module, "_is_expert_parallel", False) or getattr(module, "has_post_expert_norm", False):
        raise NotImplementedError(
            "experts_implementation='mome' has neither expert parallelism nor norms after experts; use 'grouped_mm'"
        )
    activation = _ACTIVATIONS.get(type(getattr(module, "act_fn", None)).__name__)
    standard_gate = type(module)._apply_gate is moe._default_apply_gate and module.is_concatenated
    if activation is None or (module.has_gate and not standard_gate):
        return _forward_with_own_gate(module, hidden_states, top_k_index, top_k_weights)
    parameters = _parameters(module)
    out = moe_mlp(hidden_states, top_k_index, top_k_weights, *parameters, activation, gated=module.has_gate)
    return out.to(hidden_states.dtype)


def _parameters(module: Any) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """First layer, its bias, second layer and its bias, in the layout of `moe_mlp`."""
    name = "gate_up_proj" if module.has_gate else "up_proj"
    up, down = getattr(module, name), module.down_proj
    if module.is_transposed:
        up, down = up.transpose(1, 2), down.transpose(1, 2)
    if not module.has_bias:
        return up, None, down, None
    return up, getattr(module, f"{name}_bias"), down, module.down_proj_bias


def _forward_with_own_gate(module: Any, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """Runs each assignment as a row of its own, since the module's gate needs the hidden layer of every assignment."""
    up, up_bias, down, down_bias = _parameters(module)
    tokens, k = ids_TK.shape
    ids_N1 = ids_TK.reshape(-1, 1)
    ones_N1 = torch.ones_like(ids_N1, dtype=torch.float32)
    rows_ND = x_TD.repeat_interleave(k, dim=0)
    hidden_NF = moe_linear(rows_ND, ids_N1, ones_N1, up, up_bias)
    hidden_NF = module._apply_gate(hidden_NF) if module.has_gate else module.act_fn(hidden_NF)
    out_ND = moe_linear(hidden_NF, ids_N1, ones_N1, down, down_bias)
    # `combine` applies the routing weights and sums over K in float32
    return combine(out_ND, weights_TK, torch.arange(tokens * k, device=ids_TK.device)).to(x_TD.dtype)
