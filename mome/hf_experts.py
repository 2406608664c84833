"""Our expert kernels under any Hugging Face mixture of experts: `experts_implementation="mome"`.

`import mome.auto` registers it. It knows transformers' contract for expert modules (stacked `gate_up_proj` or
`up_proj` and `down_proj`, either orientation, with or without biases and gates), not any one model.
"""

from __future__ import annotations

from typing import Any

import torch
from mome_kernels import moe_linear, moe_mlp
from torch import Tensor
from transformers.integrations import moe

NAME = "mome"
# Activation modules of transformers and torch by their class names.
_ACTIVATIONS = {
    "SiLUActivation": "silu",
    "SiLU": "silu",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
    "ReLU": "relu",
}


def register_experts_implementation() -> None:
    """Adds "mome" to transformers' experts implementations; calling it again changes nothing."""
    moe.ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)


def experts_forward(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Tokens (T, D), experts (T, K) and gates (T, K) → tokens (T, D), by `mome::moe_mlp` where the gate is a plain one.

    A module with a gate of its own (gpt-oss: interleaved and clamped) is run as two grouped linear layers around it.

    Raises:
        NotImplementedError: Expert parallelism, or a norm after each expert.
    """
    if getattr(module, "_is_expert_parallel", False) or getattr(module, "has_post_expert_norm", False):
        raise NotImplementedError(
            "experts_implementation='mome' has neither expert parallelism nor norms after experts; use 'grouped_mm'"
        )
    up, up_bias, down, down_bias = _weights(module)
    activation = _ACTIVATIONS.get(type(getattr(module, "act_fn", None)).__name__)
    plain_gate = type(module)._apply_gate is moe._default_apply_gate and module.is_concatenated
    if activation is not None and (plain_gate or not module.has_gate):
        out = moe_mlp(
            hidden_states, top_k_index, top_k_weights, up, up_bias, down, down_bias, activation, gated=module.has_gate
        )
        return out.to(hidden_states.dtype)
    return _around_the_modules_gate(module, hidden_states, top_k_index, top_k_weights, up, up_bias, down, down_bias)


def _weights(module: Any) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    name = "gate_up_proj" if module.has_gate else "up_proj"
    up, down = getattr(module, name), module.down_proj
    if module.is_transposed:
        up, down = up.transpose(1, 2), down.transpose(1, 2)
    if not module.has_bias:
        return up, None, down, None
    return up, getattr(module, f"{name}_bias"), down, module.down_proj_bias


def _around_the_modules_gate(
    module: Any,
    x_TD: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    up: Tensor,
    up_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
) -> Tensor:
    tokens, k = ids_TK.shape
    ids_N1 = ids_TK.reshape(-1, 1)
    once_N1 = torch.ones_like(ids_N1, dtype=torch.float32)
    rows_ND = x_TD.repeat_interleave(k, dim=0)
    hidden = moe_linear(rows_ND, ids_N1, once_N1, up, up_bias)
    hidden = module._apply_gate(hidden) if module.has_gate else module.act_fn(hidden)
    out_ND = moe_linear(hidden, ids_N1, weights_TK.reshape(-1, 1), down, down_bias)
    return out_ND.view(tokens, k, -1).sum(dim=1).to(x_TD.dtype)
