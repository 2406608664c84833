"""One training step with every registered router, by one process or by several that have one scan each.

As a program, `router_parity_run.py RANK PROCESSES FOLDER`, it is one process of several. The main process writes into
`FOLDER/PROCESSES.pt` the losses and gradients, averaged over the processes as data-parallel training does.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from small_models import small
from torch import Tensor

from mome.registry import ROUTERS

SIDE = 8


def spec_of(name: str) -> dict[str, Any]:
    """A router with all the losses that it has, and without noise that belongs to no scan."""
    router_class, _ = ROUTERS.resolve(name)
    weights = {field.name: 0.5 for field in fields(router_class.Config) if field.name.endswith("_weight")}
    without_noise = {"jitter": 0.0} if name == "switch" else {}
    return {"name": name, **weights, **without_noise}


def step(name: str, scans: list[int]) -> dict[str, Tensor]:
    """The losses and gradients of one step in float64; routers and the loss of the segmentation are in float32."""
    model = small(
        encoder="unet(channels=[8, 8])", patch_size=[SIDE] * 3, experts="mlp(n=4, hidden=4)", router=spec_of(name)
    )
    rows = torch.randn(3, 12, generator=torch.Generator().manual_seed(50))
    model.text_bank.set(rows)
    model.double().train()
    generators = [torch.Generator().manual_seed(scan) for scan in scans]
    given = torch.stack([torch.rand(1, SIDE, SIDE, SIDE, generator=g, dtype=torch.float64) for g in generators])
    targets = torch.stack([(torch.rand(2, SIDE, SIDE, SIDE, generator=g) > 0.6).double() for g in generators])
    # prompts that are annotated in one scan alone have their share of the loss in any way of dealing out the scans
    supervised = torch.tensor([[True, scan % 2 == 0] for scan in scans])
    with mock.patch("torch.randn", noise_by_scan(scans)):
        result = model(given, rows[:2].double(), targets, supervised)
    result.loss.backward()
    values = {"loss": result.loss.detach(), "aux_loss": result.aux_loss.detach()}
    values |= {f"loss.{key}": value.detach() for key, value in result.aux_losses.items()}
    for key, parameter in model.named_parameters():
        values[f"grad.{key}"] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    model.after_step()
    states = {f"state.{key}": b for key, b in model.named_buffers() if ".router." in key}
    return {key: mean(value.clone()) for key, value in values.items()} | states


def mean(value: Tensor) -> Tensor:
    """The mean over the processes."""
    if dist.is_initialized():
        dist.all_reduce(value)
        value /= dist.get_world_size()
    return value


def noise_by_scan(scans: list[int]) -> Callable[..., Tensor]:
    """Noise that a scan keeps, whichever process has it; it stands for `torch.randn` of (tokens of the scans, E)."""
    randn = torch.randn

    def noise(shape: torch.Size, device: torch.device) -> Tensor:
        tokens = shape[0] // len(scans)
        return torch.cat([randn(tokens, shape[1], generator=torch.Generator().manual_seed(scan)) for scan in scans])

    return noise


def steps(scans: list[int]) -> dict[str, Tensor]:
    """The steps of all routers."""
    return {f"{name}.{key}": value for name in ROUTERS.names() for key, value in step(name, scans).items()}


def main(rank: int, processes: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=processes)
    values = steps([rank])
    if rank == 0:
        torch.save(values, folder / f"{processes}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
