"""Statistics of the routers and of the fusion over one optimiser step, summed over its batches and all processes.

They are collected in the steps that are logged and read once, after the step: the loop waits for the device and for
other processes once more, and no loss changes. Shapes: T tokens, E experts, S scales.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from mome.modeling import MoME
from mome.router_names import named_routers
from mome.routers.base import Router
from mome.routers.routing import Routing, Slots
from mome.routers.shares import chosen_experts, number_of_tokens, shares_of_tokens, wins


class RouterStatistics:
    """Observes the forward passes of one optimiser step; see `ForwardObserver`.

    Args:
        model: The model itself, without wrappers.
        prompts: Names of all prompts; without a choice, every step decodes them in this order.
    """

    def __init__(self, model: MoME, prompts: Sequence[str]) -> None:
        self.model, self.prompts = model, list(prompts)
        self.routers = named_routers(model)
        self._asked = list(range(len(self.prompts)))
        self._names = {id(router): name for name, router in self.routers.items()}
        self._clear()

    def _clear(self) -> None:
        self._sums: dict[str, Tensor] = {}  # of a router: see `_routing_sums`
        self._losses: dict[str, dict[str, Tensor]] = {}  # of a router, by loss: sum and number
        self._fusion: dict[int, Tensor] = {}  # of a prompt: weights and wins of the S scales, and the voxels

    @contextlib.contextmanager
    def collecting(self, asked: Sequence[int] | None = None) -> Iterator[None]:
        """Collects from the forward passes inside the block.

        Args:
            asked: Indices of the prompts that the block decodes; None for all.
        """
        self._clear()
        self._asked = list(range(len(self.prompts))) if asked is None else list(asked)
        self.model.observer = self
        try:
            yield
        finally:
            self.model.observer = None

    @torch.no_grad()
    def on_routings(self, routings: Sequence[Routing]) -> None:
        """Adds the routings of one forward pass."""
        for routing in routings:
            name = self._names[id(routing.router)]
            self._sums[name] = self._sums.get(name, 0) + _routing_sums(routing)
            named = self._losses.setdefault(name, {})
            for loss, value in routing.losses.items():
                pair = torch.stack([value.detach().double(), torch.ones_like(value, dtype=torch.float64)])
                named[loss] = named.get(loss, 0) + pair

    @torch.no_grad()
    def on_fusion(self, prompt: int, weights_BSDHW: Tensor | None) -> None:
        """Adds the weights of the scales for one prompt."""
        if weights_BSDHW is not None:
            weights_SV = weights_BSDHW.detach().flatten(2).transpose(0, 1).flatten(1)
            wins_SV = wins(weights_SV)
            voxels = torch.full_like(wins_SV[:1, 0], wins_SV.shape[1], dtype=torch.float64)
            sums = torch.cat(
                [weights_SV.sum(dim=1, dtype=torch.float64), wins_SV.sum(dim=1, dtype=torch.float64), voxels]
            )
            self._fusion[prompt] = self._fusion.get(prompt, 0) + sums

    def read(self, accelerator: Accelerator) -> dict[str, Any]:
        """Returns the statistics of the step over all processes; every process must call it.

        Returns:
            `routers`, by name: `load` of every expert (its share of the assignments, and of the weights where voxels
            are mixed into slots), `idle_experts` (those without load), `without_expert` (the share of tokens that no
            expert gets), `mean_entropy` (of the shares of one token) and `entropy_of_mean` (of the mean shares), both
            divided by log E, so that 1 is even and 0 is one expert; every loss by name, and the state of one number or
            one number per expert that the router keeps. `fusion`, by prompt: `weight` and `wins` of the scales from
            coarse to fine, the mean weight and the share of voxels where a scale weighs most.
        """
        keys = [("router", name, "") for name in self._sums]
        keys += [("loss", name, loss) for name in self._losses for loss in self._losses[name]]
        keys += [("fusion", str(prompt), "") for prompt in self._fusion]
        parts = [*self._sums.values()]
        parts += [pair for named in self._losses.values() for pair in named.values()]
        parts += [*self._fusion.values()]
        report: dict[str, Any] = {"routers": {}, "fusion": {}}
        if parts:
            total = accelerator.reduce(torch.cat(parts), reduction="sum").cpu()
            for (kind, name, loss), values in zip(keys, total.split([len(part) for part in parts]), strict=True):
                if kind == "router":
                    report["routers"][name] = {**_router_report(values), "losses": {}}
                elif kind == "loss":
                    report["routers"][name]["losses"][loss] = (values[0] / values[1]).item()
                else:
                    weight_S, wins_S = (values[:-1] / values[-1]).chunk(2)
                    report["fusion"][self.prompts[self._asked[int(name)]]] = {
                        "weight": weight_S.tolist(),
                        "wins": wins_S.tolist(),
                    }
        for name, router in self.routers.items():
            state = _state(router)
            if state and name in report["routers"]:
                report["routers"][name]["state"] = state
        self._clear()
        return report


def _routing_sums(routing: Routing) -> Tensor:
    """Sums over the tokens of a routing, float64.

    They are the load (E) and the shares (E) of the experts, the entropy of the shares, and the numbers of tokens with a
    share, of those without an expert, and of all.
    """
    shares_TE = shares_of_tokens(routing)
    has_share_T = shares_TE.sum(dim=1) > 0
    entropy = -torch.xlogy(shares_TE, shares_TE).sum(dim=1, dtype=torch.float64).sum()
    shares_E = shares_TE.sum(dim=0, dtype=torch.float64)
    load_E = shares_E if isinstance(routing, Slots) else routing.counts_E.detach().double()
    without = (~chosen_experts(routing).any(dim=1)).sum().double()
    tokens = torch.full_like(without, number_of_tokens(routing))
    return torch.cat([load_E, shares_E, torch.stack([entropy, has_share_T.sum().double(), without, tokens])])


def _router_report(sums: Tensor) -> dict[str, Any]:
    """The statistics of a router from the sums of `_routing_sums`."""
    load_E, shares_E = sums[:-4].chunk(2)
    entropy, with_share, without, tokens = sums[-4:].tolist()
    mean_E = shares_E / max(with_share, 1)
    largest = math.log(len(load_E)) or 1.0
    return {
        "load": (load_E / load_E.sum().clamp(min=1e-20)).tolist(),
        "idle_experts": int((load_E == 0).sum()),
        "without_expert": without / max(tokens, 1),
        "mean_entropy": entropy / max(with_share, 1) / largest,
        "entropy_of_mean": -torch.xlogy(mean_E, mean_E).sum().item() / largest,
    }


def _state(router: Router) -> dict[str, list[float]]:
    """The saved buffers of a router that hold one number, or one number per expert, such as a balancing bias."""
    saved = router.state_dict()
    return {
        name: buffer.detach().float().flatten().tolist()
        for name, buffer in router.named_buffers()
        if name in saved and buffer.numel() in (1, router.num_experts)
    }


def flat(statistics: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """Nested statistics as single numbers by path, for trackers: `routers/scale_0/load/3`."""
    numbers: dict[str, float] = {}
    for key, value in statistics.items():
        path = f"{prefix}{key}"
        if isinstance(value, dict):
            numbers |= flat(value, f"{path}/")
        elif isinstance(value, list):
            numbers |= {f"{path}/{index}": number for index, number in enumerate(value)}
        else:
            numbers[path] = value
    return numbers
