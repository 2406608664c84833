"""Linear experts whose result the prompt scales and shifts."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor, nn

from mome.experts.base import PromptExperts
from mome.experts.gates import experts_to_run
from mome.map_context import MapContext
from mome.registry import at_least

# The standard deviation of a new model's γ and β, for text rows of numbers of unit size (our choice).
_FIRST_CHANGE = 0.1


class FiLMExperts(PromptExperts):
    """y_e = (1 + γ_e(t)) ⊙ (W_e x + b_e) + β_e(t), with γ and β linear in the prompt's text row t.

    Scale and shift by a condition are FiLM's (Perez et al. 2018, arXiv 1709.07871); a linear layer per expert is our
    choice. Scale and shift are linear in the layer's result, so they are folded into it once per prompt: the weights
    become (1 + γ) ⊙ W, the biases (1 + γ) ⊙ b + β, both in float32 at least. A voxel then costs one linear layer per
    expert. Every expert computes the whole map, whatever its gates; see `mome.experts.gates` for eval.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Settings of `film`.

        Args:
            n: Number of experts.
        """

        n: int = 4

    def __init__(self, config: Config, *, dim: int, text_dim: int) -> None:
        super().__init__()
        at_least(1, "film experts", n=config.n)
        self.num_experts = config.n
        self.weight_EDD = nn.Parameter(torch.empty(config.n, dim, dim))
        self.bias_ED = nn.Parameter(torch.empty(config.n, dim))
        self.modulation = nn.Linear(text_dim, 2 * config.n * dim)

    def forward(self, x_BDHWC: Tensor, gates_BDHWE: Tensor, context: MapContext) -> Tensor:
        assert context.text_BT is not None
        weight_BEDD, bias_BED = self._folded(context.text_BT)
        weight_BEDD, bias_BED = weight_BEDD.to(x_BDHWC.dtype), bias_BED.to(x_BDHWC.dtype)
        x_BVD, gates_BVE = x_BDHWC.flatten(1, 3), gates_BDHWE.flatten(1, 3)
        y_BVD = x_BVD.new_zeros(x_BVD.shape, dtype=gates_BVE.dtype)
        for e in experts_to_run(gates_BDHWE, self.training):
            result_BVD = torch.baddbmm(bias_BED[:, e, None], x_BVD, weight_BEDD[:, e].mT)
            y_BVD = y_BVD + gates_BVE[..., e, None] * result_BVD
        return y_BVD.to(x_BDHWC.dtype).view(x_BDHWC.shape)

    def scale_and_shift(self, text_BT: Tensor) -> tuple[Tensor, Tensor]:
        """1 + γ and β of every expert, both (B, E, D), in float32 at least."""
        numbers_B2ED = self.modulation(text_BT).unflatten(-1, (2, self.num_experts, -1))
        gamma_BED, beta_BED = numbers_B2ED.to(torch.promote_types(numbers_B2ED.dtype, torch.float32)).unbind(1)
        return 1 + gamma_BED, beta_BED

    def _folded(self, text_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Weights (B, E, D, D) and biases (B, E, D) of the linear layers that these experts are for these prompts."""
        scale_BED, shift_BED = self.scale_and_shift(text_BT)
        return scale_BED[..., None] * self.weight_EDD, scale_BED * self.bias_ED + shift_BED

    @torch.no_grad()
    def init_weights_(self, init: ModuleType, std: float) -> None:
        """Keeps the variance of the tokens; scales start near one and shifts near zero, whatever the width of text."""
        init.trunc_normal_(self.weight_EDD, std=self.weight_EDD.shape[-1] ** -0.5)
        init.zeros_(self.bias_ED)
        init.trunc_normal_(self.modulation.weight, std=_FIRST_CHANGE * self.modulation.in_features**-0.5)
