"""A bias that balances the load of experts without a loss. It changes the choice of experts, and not their weights."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor, nn

from mome.routers.all_processes import sum_over_processes


class BalancingBias(nn.Module):
    """b_e rises while expert e has less than the mean load and falls while it has more.

    After each optimiser step, with the counts c of the step's tokens on all processes: Δ = rate · sign(mean(c) − c),
    then b += Δ − mean(Δ). Wang et al. 2024, *Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts*
    (arXiv 2408.15664), add Δ itself; subtracting its mean is torchtitan's, and keeps the biases from drifting together.

    The bias is a buffer, part of every checkpoint; a moving average of the weights copies it. The counts are not saved.
    DistributedDataParallel copies the first process's buffers to the others before each forward that follows a
    synchronised one. Accumulate gradients under `no_sync`, as Accelerate does: the counts of a step then stay.

    Args:
        num_experts: E.
        rate: The step of the bias per optimiser step; 0 leaves the bias as it is.
    """

    bias_E: Tensor
    counts_E: Tensor

    def __init__(self, num_experts: int, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.register_buffer("bias_E", torch.zeros(num_experts, dtype=torch.float32))
        self.register_buffer("counts_E", torch.zeros(num_experts, dtype=torch.int64), persistent=False)

    def forward(self, scores_TE: Tensor) -> Tensor:
        """The scores that the choice of experts looks at."""
        return scores_TE + self.bias_E

    @torch.no_grad()
    def observe(self, counts_E: Tensor) -> None:
        """Adds the number of assignments of each expert to the counts of this optimiser step."""
        self.counts_E += counts_E

    @torch.no_grad()
    def after_step(self) -> None:
        """Moves the bias by one step and starts counting again. Every process must call it."""
        if self.rate:
            counts_E = sum_over_processes(self.counts_E)
            # mean(c) − c has the sign of these whole numbers, which round nothing
            step_E = self.rate * (counts_E.sum() - self.counts_E.shape[0] * counts_E).sign().to(torch.float32)
            self.bias_E += step_E - step_E.mean()
        self.counts_E.zero_()

    @torch.no_grad()
    def init_weights_(self, init: ModuleType, std: float) -> None:
        """Starts without preference."""
        init.zeros_(self.bias_E)
        init.zeros_(self.counts_E)
