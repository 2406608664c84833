"""Training steps and forward passes of whole models on one device, with three ways of computing the experts."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from mome_kernels import moe_mlp
from peers import eager_loop, torch_grouped_mm

from mome import create_model
from mome.experts import mlp
from mome.routers.base import Router

Experts = Callable[..., torch.Tensor]
# Losses and gradients of two ways of computing the experts may differ by rounding to bfloat16.
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 0.01, 0.05


def as_moe_mlp(peer: Experts) -> Experts:
    """A peer of the kernels with the arguments of `moe_mlp`; like it, it casts to the type of autocast."""

    def run(
        x_TD: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor, up: torch.Tensor, up_bias: Any,
        down: torch.Tensor, down_bias: Any, activation: str = "gelu", gated: bool = False,
    ) -> torch.Tensor:  # fmt: skip
        if up_bias is not None or down_bias is not None:
            raise NotImplementedError("the peers have no biases")
        kind = x_TD.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x_TD.dtype
        return peer(x_TD.to(dtype), ids_TK, weights_TK, up.to(dtype), down.to(dtype), activation, gated)

    return run


WAYS: dict[str, Experts] = {
    "kernels": moe_mlp,
    "loop": as_moe_mlp(eager_loop),
    "grouped_mm": as_moe_mlp(torch_grouped_mm),
}


@contextmanager
def experts_computed_by(way: str) -> Iterator[None]:
    """Replaces the function that `mlp`, `swiglu` and `geglu` experts call."""
    usual = mlp.moe_mlp
    mlp.moe_mlp = WAYS[way]
    try:
        yield
    finally:
        mlp.moe_mlp = usual


@dataclass
class Setup:
    """A model with random weights and one random batch.

    Attributes:
        model: In training mode.
        batch: Arguments of its forward.
    """

    model: torch.nn.Module
    batch: dict[str, torch.Tensor]

    @classmethod
    def of(cls, preset: str, device: str, side: int, batch: int, prompts: int) -> Setup:
        """Builds a preset for patches of `side`³ voxels.

        Args:
            preset: A name of the zoo.
            device: `cuda` or `cpu`.
            side: Voxels of a patch along each axis.
            batch: Patches.
            prompts: Prompts of the batch.
        """
        torch.manual_seed(0)
        model = create_model(preset).to(device).train()
        patch = (side, side, side)
        generator = torch.Generator().manual_seed(1)
        text_PT = torch.randn(prompts, model.config.text_dim, generator=generator)
        volume = torch.rand(batch, 1, *patch, generator=generator)
        targets = (torch.rand(batch, prompts, *patch, generator=generator) > 0.7).float()
        return cls(
            model, {k: v.to(device) for k, v in (("volume", volume), ("text_PT", text_PT), ("targets", targets))}
        )

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.batch["volume"].device

    def loss(self) -> torch.Tensor:
        """The training loss of the batch, with bfloat16 inside the network."""
        with torch.autocast(self.device.type, torch.bfloat16):
            return self.model(**self.batch).loss

    def loss_and_gradient(self) -> dict[str, float]:
        """The loss, and the norm of the gradient of all experts."""
        self.model.zero_grad(set_to_none=True)
        loss = self.loss()
        loss.backward()
        squares = [
            p.grad.float().square().sum()
            for name, p in self.model.named_parameters()
            if ".experts." in name and p.grad is not None
        ]
        norm = float(torch.stack(squares).sum().sqrt()) if squares else 0.0
        self.model.zero_grad(set_to_none=True)
        return {"loss": float(loss.detach()), "expert_gradient": norm}

    def tokens(self) -> dict[str, int]:
        """Tokens that the routers see in one forward pass, and their assignments to experts."""
        found = {"tokens": 0, "assignments": 0}

        def count(router: torch.nn.Module, given: tuple[Any, ...], routing: Any) -> None:
            found["tokens"] += given[0][..., 0].numel()
            found["assignments"] += int(routing.counts_E.sum())

        hooks = [m.register_forward_hook(count) for m in self.model.modules() if isinstance(m, Router)]
        with torch.no_grad():
            self.loss()
        for hook in hooks:
            hook.remove()
        return found


def wait(device: torch.device) -> None:
    """Waits for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()


class Clock:
    """Marks moments by CUDA events, or by the clock on a CPU, and gives the milliseconds between them."""

    def __init__(self, device: torch.device) -> None:
        self._cuda, self._marks = device.type == "cuda", []

    def mark(self) -> None:
        """Marks this moment in the stream of the device."""
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def between(self) -> list[float]:
        """Milliseconds between neighbouring marks."""
        if self._cuda:
            self._marks[-1].synchronize()
            return [a.elapsed_time(b) for a, b in zip(self._marks, self._marks[1:], strict=False)]
        return [1e3 * (b - a) for a, b in zip(self._marks, self._marks[1:], strict=False)]


def begin_peak(device: torch.device) -> None:
    """Begins to measure the highest memory of a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()


def peak_mib(device: torch.device) -> float | None:
    """The highest memory that torch allocated since `begin_peak`; None on a CPU."""
    return torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else None


def training_times(setup: Setup, warm_up: int, steps: int, seconds: float) -> dict[str, Any]:
    """Medians of forward, backward and optimiser (fused AdamW) of whole steps, and the peak memory of all.

    Args:
        setup: The model and its batch; the weights change.
        warm_up: Steps that are not measured.
        steps: Most steps that are measured.
        seconds: No further step begins after these.
    """
    cuda = setup.device.type == "cuda"
    optimizer = torch.optim.AdamW(setup.model.parameters(), lr=1e-5, fused=cuda or None)
    rows: list[list[float]] = []
    began = time.perf_counter()
    for step in range(warm_up + steps):
        if step == warm_up:
            begin_peak(setup.device)
            began = time.perf_counter()
        if rows and time.perf_counter() - began > seconds:
            break
        clock = Clock(setup.device)
        clock.mark()
        loss = setup.loss()
        clock.mark()
        loss.backward()
        clock.mark()
        optimizer.step()
        setup.model.after_step()
        optimizer.zero_grad(set_to_none=True)
        clock.mark()
        if step >= warm_up:
            rows.append(clock.between())
    names = ("forward_ms", "backward_ms", "optimizer_ms")
    parts = {name: statistics.median(row[i] for row in rows) for i, name in enumerate(names)}
    return {
        **parts,
        "step_ms": statistics.median(sum(row) for row in rows),
        "slowest_step_ms": max(sum(row) for row in rows),
        "steps": len(rows),
        "peak_mib": peak_mib(setup.device),
    }


@torch.inference_mode()
def inference_times(setup: Setup, warm_up: int, passes: int) -> dict[str, Any]:
    """The median time of a forward pass of the batch in eval, and its peak memory."""
    model, given = setup.model.eval(), (setup.batch["volume"], setup.batch["text_PT"])
    times = []
    for step in range(warm_up + passes):
        if step == warm_up:
            begin_peak(setup.device)
        clock = Clock(setup.device)
        clock.mark()
        with torch.autocast(setup.device.type, torch.bfloat16):
            model(*given)
        clock.mark()
        if step >= warm_up:
            times += clock.between()
    model.train()
    return {"forward_ms": statistics.median(times), "passes": len(times), "peak_mib": peak_mib(setup.device)}


def disagreement(found: dict[str, float], expected: dict[str, float]) -> str | None:
    """A message where losses or gradients of two ways differ by more than rounding, or are not finite; else None."""
    for key, most in (("loss", LOSS_TOLERANCE), ("expert_gradient", GRADIENT_TOLERANCE)):
        share = abs(found[key] - expected[key]) / max(abs(expected[key]), 1e-12)
        if not share <= most:
            return f"{key} is {found[key]:.6g}, that of the loop over experts {expected[key]:.6g}"
    return None
