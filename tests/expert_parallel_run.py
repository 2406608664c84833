"""Training steps and saving of small models, in one process or spread over several of them.

As a program, `expert_parallel_run.py RANK PROCESSES FOLDER CASE…`, it is one process of a run with expert parallelism:
every process has one scan, and the main process writes what it finds into `FOLDER/PROCESSES.pt`.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from small_models import small
from torch import Tensor

from mome import MoME
from mome.routers.base import Router

SIDE, PROMPTS = 8, 2


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, and how it is spread.

    Attributes:
        experts, router: Parts.
        ep_size: Processes that share the experts; None for all processes.
        empty_scans: The scans from this one on are zeros.
        checkpointing: Whether activations are computed again in the backward pass.
        encoder: The encoder.
        head: The head. `plain` has no kinks: where a hidden unit lies next to one, rounding decides about its gradient.
        steps: Optimiser steps.
        rate: The learning rate; 0 where the norms of an empty scan would amplify the rounding of a step.
    """

    experts: str
    router: str
    ep_size: int | None = None
    empty_scans: int = 99
    checkpointing: bool = False
    encoder: str = "unet(channels=[4, 8])"
    head: str = "plain"
    steps: int = 1
    rate: float = 0.05


# sigmoid's bias sends every voxel to expert 0; relu sends no voxel of a scan of zeros to any expert
CASES = {
    "topk": Case("swiglu(n=4, hidden=8)", "topk(k=2, balance_weight=0.5, z_weight=0.1)", head="dynamic", steps=2),
    "one-expert-each": Case("linear(n=4)", "sigmoid(k=1, bias_rate=0.1)", steps=2),
    "checkpointing": Case("mlp(n=4, hidden=8)", "topk(k=2)", checkpointing=True),
    "replicas": Case("mlp(n=4, hidden=8)", "topk(k=2, balance_weight=0.5)", ep_size=2),
    "assignments": Case("mlp(n=4, hidden=8)", "expert_choice(capacity=1.5)"),
    "slots": Case("mlp(n=4, hidden=8)", "soft(slots=3)"),
    "empty-receiver": Case("mlp(n=4, hidden=8)", "sigmoid(k=1, bias_rate=0.1)"),
    "empty-sender": Case("mlp(n=4, hidden=8)", "relu(k=1, initial_l1_weight=0.1)", empty_scans=1, rate=0.0),
    "shared": Case("shared(routed=swiglu(n=4, hidden=8), shared=mlp(hidden=8))", "topk(k=2)"),
    "adaptive": Case("adaptive(experts=mlp(n=4, hidden=8))", "topk(k=3, balance_weight=0.5)"),
    "constant": Case("constant(n=4)", "topk(k=2)"),
    "encoder": Case(
        "linear", "topk", encoder="unet(channels=[4, 8], layer=moe(experts=swiglu(n=4, hidden=8), router=topk(k=2)))"
    ),
    "fsdp": Case("mlp(n=4, hidden=8)", "topk(k=2, balance_weight=0.5)", ep_size=1),
}


def write_checkpoint(case: Case, name: str, folder: Path) -> None:
    """Saves a random model of a case."""
    model = small(encoder=case.encoder, patch_size=[SIDE] * 3, experts=case.experts, router=case.router, head=case.head)
    with torch.no_grad():
        for module_name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "body.experts" in module_name:  # biases, which begin at zero
                parameter.normal_(std=0.1)
            if name != "empty-sender" and module_name.endswith("proj_in.bias"):  # no voxel is exactly zero
                parameter.normal_(std=0.1)
        for module_name, buffer in model.named_buffers():
            if name == "empty-receiver" and module_name.endswith("router.bias.bias_E"):
                buffer.copy_(torch.tensor([100.0, 0, 0, 0]))
        if name == "empty-sender":
            for expert in model.scale_experts:
                expert.body.router.bias_E.fill_(-0.5)
                expert.body.router.weight_EC.mul_(100)
    model.save_pretrained(folder)


def batch(case: Case, scans: Iterable[int]) -> dict[str, Tensor]:
    """The scans of these numbers with targets, and the text rows."""
    numbers = list(scans)
    generators = [torch.Generator().manual_seed(number) for number in numbers]
    volumes = [torch.rand(1, SIDE, SIDE, SIDE, generator=generator) for generator in generators]
    targets = [(torch.rand(PROMPTS, SIDE, SIDE, SIDE, generator=g) > 0.6).float() for g in generators]
    empty = torch.tensor([number >= case.empty_scans for number in numbers])
    return {
        "volume": torch.stack(volumes).masked_fill(empty[:, None, None, None, None], 0),
        "targets": torch.stack(targets),
        "text_PT": torch.randn(PROMPTS, 12, generator=torch.Generator().manual_seed(50)),
    }


def whole(tensor: Tensor) -> Tensor:
    """A tensor that may be spread over processes."""
    full: Any = tensor
    return full.full_tensor() if hasattr(full, "full_tensor") else tensor


def gathered(tensor: Tensor) -> Tensor:
    """The tensors of all processes, one behind the other along dimension 0."""
    if not dist.is_initialized():
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


def run(case: Case, model: MoME, given: dict[str, Tensor], saved: Path) -> dict[str, Tensor]:
    """Optimiser steps: losses, gradients and counts of each, then the parameters and logits; saves the model.

    Losses are averaged over the processes, if there are several.
    """
    values: dict[str, Tensor] = {}
    model.train()
    if case.checkpointing:
        model.gradient_checkpointing_enable()
    counts: list[Tensor] = []
    for module in model.modules():
        if isinstance(module, Router):
            module.register_forward_hook(lambda router, args, routing: counts.append(routing.counts_E))
    optimizer = torch.optim.SGD(model.parameters(), lr=case.rate)
    for step in range(case.steps):
        counts.clear()
        result = model(**given)
        sent = torch.stack([torch.stack(counts).sum(0)])
        values[f"{step}.sent"] = gathered(sent)
        for key in ("loss", "segmentation_loss", "aux_loss"):
            value = result[key].detach().clone()
            if dist.is_initialized():
                dist.all_reduce(value)
                value /= dist.get_world_size()
            values[f"{step}.{key}"] = value
        result.loss.backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            values[f"{step}.grad.{name}"] = whole(parameter.grad).clone()
        optimizer.step()
        optimizer.zero_grad()
        model.after_step()
    values |= {f"after.{name}": whole(parameter).detach().clone() for name, parameter in model.named_parameters()}
    values |= {f"buffer.{name}": buffer.clone() for name, buffer in model.named_buffers()}
    model.eval()
    with torch.no_grad():
        logits = model.decode(model.encode(given["volume"]), given["text_PT"])
        torch.testing.assert_close(logits, model(given["volume"], given["text_PT"]).logits)
    values["logits"] = gathered(logits)
    model.save_pretrained(saved)
    return values


def spread_over_processes(rank: int, processes: int, folder: Path, names: list[str]) -> None:
    """Runs cases in one of several processes."""
    from transformers.distributed import DistributedConfig

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / f'meet{processes}'}", rank=rank, world_size=processes
    )
    found: dict[str, dict[str, Tensor]] = {}
    for name in names:
        case = CASES[name]
        distributed = DistributedConfig(ep_size=case.ep_size or processes, fsdp_size=processes)
        checkpoint = folder / name
        model = MoME.from_pretrained(checkpoint, distributed_config=distributed)
        model.save_pretrained(folder / f"{name}-{processes}-unchanged")
        values = run(case, model, batch(case, [rank]), folder / f"{name}-{processes}-trained")
        split = {key: torch.tensor(parameter.to_local().shape[0]) for key, parameter in model.named_parameters()}
        found[name] = values | {f"rows.{key}": rows for key, rows in split.items()}
    if rank == 0:
        torch.save(found, folder / f"{processes}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    spread_over_processes(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
