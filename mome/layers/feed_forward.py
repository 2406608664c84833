"""The dense feed-forward layer of a transformer block, in the same forms as the experts."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mome.errors import InputError, did_you_mean

# Name → whether the hidden layer is gated, its activation, and whether the layers have biases: as in the experts.
_FORMS = {"mlp": (False, "gelu", True), "swiglu": (True, "silu", False), "geglu": (True, "gelu", False)}


class FeedForward(nn.Module):
    """W₂ act(W₁ x + b₁) + b₂, or W₂ (act(W_g x) ⊙ W_u x) (Shazeer 2020, arXiv 2002.05202).

    Args:
        form: `mlp` (GELU, biases), `swiglu` or `geglu` (gated, without biases).
        dim: Width of the tokens.
        hidden: Width of the hidden layer.

    Raises:
        InputError: The form is unknown.
    """

    def __init__(self, form: str, dim: int, hidden: int) -> None:
        super().__init__()
        if form not in _FORMS:
            raise InputError(
                f"no feed-forward layer '{form}'{did_you_mean(form, _FORMS)}", hint="one of " + ", ".join(_FORMS)
            )
        self.gated, self.activation, bias = _FORMS[form]
        # the rows of the gate stand before those of the values, as in `gate_up_proj` of the experts
        self.up = nn.Linear(dim, 2 * hidden if self.gated else hidden, bias=bias)
        self.down = nn.Linear(hidden, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(…, C) → (…, C)."""
        activate = F.silu if self.activation == "silu" else F.gelu
        hidden = self.up(x)
        if self.gated:
            gate, value = hidden.chunk(2, dim=-1)
            return self.down(activate(gate) * value)
        return self.down(activate(hidden))

    @torch.no_grad()
    def init_weights_(self, init: ModuleType, std: float) -> None:
        """Keeps the variance in the first layer and halves the scale of the second, as the experts do."""
        init.trunc_normal_(self.up.weight, std=self.up.in_features**-0.5)
        init.trunc_normal_(self.down.weight, std=0.5 * self.down.in_features**-0.5)
