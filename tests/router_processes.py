"""One process of a distributed run of routers: `router_processes.py RANK PROCESSES RENDEZVOUS RESULT`.

The processes share the tokens of every step. The main process writes what they end with: biases, weights of penalties,
losses, and gradients averaged over the processes as data-parallel training does.
"""

from __future__ import annotations

import contextlib
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mome.map_context import DEFAULT_CONTEXT
from mome.registry import ROUTERS
from mome.routers.losses import load_loss

SPECS = {
    "sigmoid": "sigmoid(k=2, bias_rate=0.1, balance_weight=0.5)",
    "group_limited": "group_limited(k=2, groups=3, groups_kept=2, bias_rate=0.1)",
    "relu": "relu(k=2, initial_l1_weight=0.5)",
    "topk": "topk(k=2, balance_weight=0.5, z_weight=0.1, importance_weight=0.3)",
}


def main(rank: int, processes: int, rendezvous: str, result: str) -> None:
    torch.set_num_threads(1)
    if processes > 1:
        dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=processes)
    values: dict[str, torch.Tensor] = {}
    for name, spec in SPECS.items():
        torch.manual_seed(0)
        router = ROUTERS.build(spec, dim=5, num_experts=6).train()
        torch.nn.init.normal_(router.weight_EC)
        for step in range(3):
            x = torch.randn(2, 2, 3, 4, 5, generator=torch.Generator().manual_seed(step))
            routing = router(x[rank : rank + 1] if processes > 1 else x, DEFAULT_CONTEXT)
            router.observe(routing)
            for loss, value in routing.losses.items():
                values[f"{name}.{step}.{loss}"] = mean(value.detach(), processes)
            total = sum(routing.losses.values())
            if isinstance(total, torch.Tensor):
                (grad,) = torch.autograd.grad(total, router.weight_EC)
                values[f"{name}.{step}.grad"] = mean(grad, processes)
            router.after_step()
        values |= {f"{name}.{key}": buffer for key, buffer in router.named_buffers()}
    weight = torch.linspace(-1, 1, 20).view(4, 5).requires_grad_()
    x = torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(9))
    mine = x[rank] if processes > 1 else x.flatten(0, 1)
    loss = load_loss((mine @ weight.T).sigmoid().sum(0))
    (grad,) = torch.autograd.grad(loss, weight)
    values |= {"load": mean(loss.detach(), processes), "load.grad": mean(grad, processes)}
    values["accumulated.bias_E"] = bias_after_accumulation(rank, processes)
    if rank == 0:
        torch.save(values, result)
    if processes > 1:
        dist.destroy_process_group()


class Observed(nn.Module):
    """A router that observes in its own forward, as the model's forward does."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.router = ROUTERS.build("sigmoid(k=2, bias_rate=0.1)", dim=5, num_experts=6)
        nn.init.normal_(self.router.weight_EC)

    def forward(self, x_BDHWC: torch.Tensor) -> torch.Tensor:
        routing = self.router(x_BDHWC, DEFAULT_CONTEXT)
        self.router.observe(routing)
        return routing.weights_TK.square().sum()


def bias_after_accumulation(rank: int, processes: int) -> torch.Tensor:
    """The bias after two optimiser steps of two batches each, in DistributedDataParallel, which copies buffers."""
    observed = Observed()
    model = DistributedDataParallel(observed) if processes > 1 else observed
    for step in range(2):
        for batch in range(2):
            x = torch.randn(2, 2, 3, 4, 5, generator=torch.Generator().manual_seed(10 * step + batch))
            without = model.no_sync() if processes > 1 and batch == 0 else contextlib.nullcontext()
            with without:
                model(x[rank : rank + 1] if processes > 1 else x).backward()
        observed.router.after_step()
    return observed.router.bias.bias_E


def mean(value: torch.Tensor, processes: int) -> torch.Tensor:
    """The mean over the processes."""
    if processes > 1:
        dist.all_reduce(value)
    return value / processes


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
