"""Sums what routers and the fusion decide over the regions of a scan.

Shapes: R regions, T voxels of a map, E experts, S scales.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mome.routers.routing import Assignments, Routing, Slots, TokenChoice
from mome.routers.shares import chosen_experts, shares_of_tokens, slot_masses, winners, wins

_FORMS = {TokenChoice: "every voxel chooses experts", Assignments: "lists of voxels per expert", Slots: "slots"}


class RouterTally:
    """Sums of one router, in voxels of the network grid.

    Args:
        routing: A routing of the router, for the number of its experts and its form.
        regions: Names of the R regions.
    """

    def __init__(self, routing: Routing, regions: list[str]) -> None:
        self.regions, self.experts = regions, routing.counts_E.shape[0]
        self.form = _FORMS[type(routing)]
        self._voxels_R = torch.zeros(len(regions), dtype=torch.float64)
        self._load_RE, self._wins_RE, self._mass_RE = (
            torch.zeros(len(regions), self.experts, dtype=torch.float64) for _ in range(3)
        )
        self._without_R = torch.zeros(len(regions), dtype=torch.float64)

    def add(self, routing: Routing, counts_RT: Tensor, winner_T: Tensor, voxels_per_token: int) -> None:
        """Adds a tile.

        Args:
            routing: How its voxels were routed.
            counts_RT: Voxels of each region in each voxel of the map.
            winner_T: See `winners`.
            voxels_per_token: Voxels of the network grid in a voxel of the map.
        """
        counts_RT = counts_RT.double()
        is_slots = isinstance(routing, Slots)
        load_TE = shares_of_tokens(routing) if is_slots else chosen_experts(routing)
        self._load_RE += counts_RT @ load_TE.cpu().double()
        if isinstance(routing, Slots):
            self._mass_RE += counts_RT / voxels_per_token @ slot_masses(routing)[0].cpu().double()
        won_T1 = winner_T[:, None]
        self._wins_RE += counts_RT @ (won_T1 == torch.arange(self.experts)).double()
        self._without_R += counts_RT @ (won_T1[:, 0] < 0).double()
        self._voxels_R += counts_RT.sum(dim=1)

    def report(self, regions: list[str] | None = None) -> dict[str, Any]:
        """The loads by region; None in place of numbers where a region is empty.

        Returns:
            `voxels` of the network grid; `load`, the share of the assignments that each expert gets, or in slots of the
            weight with which voxels read its results; `wins`, the share of the voxels where each expert weighs most;
            `without_expert`, the share of the voxels that none gets; in slots `mass`, the share of what each expert
            reads in the scan that comes from the region.
        """
        report: dict[str, Any] = {}
        for r, name in enumerate(self.regions):
            if regions is not None and name not in regions:
                continue
            voxels = self._voxels_R[r]
            entry: dict[str, Any] = {"voxels": int(voxels), "load": None, "wins": None, "without_expert": None}
            if voxels:
                entry["load"] = _rounded(self._load_RE[r] / self._load_RE[r].sum().clamp(min=1e-20))
                entry["wins"] = _rounded(self._wins_RE[r] / voxels)
                entry["without_expert"] = round(float(self._without_R[r] / voxels), 6)
            if self._mass_RE.any():
                entry["mass"] = _rounded(self._mass_RE[r] / self._mass_RE[0].clamp(min=1e-20))
            report[name] = entry
        return report


class FusionTally:
    """Sums of the weights of the scales for one prompt.

    Args:
        scales: S.
        regions: Names of the R regions.
    """

    def __init__(self, scales: int, regions: list[str]) -> None:
        self.regions = regions
        self._voxels_R = torch.zeros(len(regions), dtype=torch.float64)
        self._weight_RS, self._wins_RS = (torch.zeros(len(regions), scales, dtype=torch.float64) for _ in range(2))
        self._low_S, self._high_S = torch.full((scales,), torch.inf), torch.full((scales,), -torch.inf)

    def add(self, weights_ST: Tensor, counts_RT: Tensor) -> None:
        """Adds a tile: the weights of the scales, and the voxels of each region in each voxel of the map."""
        counts_RT, weights_ST = counts_RT.double(), weights_ST.cpu()
        self._weight_RS += counts_RT @ weights_ST.T.double()
        self._wins_RS += counts_RT @ wins(weights_ST).T.double()
        self._voxels_R += counts_RT.sum(dim=1)
        seen_ST = weights_ST[:, counts_RT.sum(dim=0) > 0]
        if seen_ST.shape[1]:
            self._low_S = torch.minimum(self._low_S, seen_ST.amin(dim=1))
            self._high_S = torch.maximum(self._high_S, seen_ST.amax(dim=1))

    @property
    def varies(self) -> bool:
        """Whether the weights differ between voxels by more than rounding."""
        return bool((self._high_S - self._low_S).max() > 1e-4)

    def report(self) -> dict[str, Any]:
        """Mean weight and share of the voxels won, by region and scale; None where a region is empty."""
        return {
            name: {
                "voxels": int(voxels),
                "weight": _rounded(self._weight_RS[r] / voxels) if voxels else None,
                "wins": _rounded(self._wins_RS[r] / voxels) if voxels else None,
            }
            for r, (name, voxels) in enumerate(zip(self.regions, self._voxels_R, strict=True))
        }


def winner_map(routing: Routing) -> Tensor:
    """`winners` on the CPU as int16 (T,)."""
    return winners(routing).cpu().to(torch.int16)


def winning_scale(weights_ST: Tensor) -> tuple[Tensor, Tensor]:
    """The scale that weighs most at each voxel (T,) int16, −1 where all weigh the same, and its weight (T,)."""
    weight_T, scale_T = weights_ST.cpu().max(dim=0)
    alike_T = (weight_T - weights_ST.cpu().amin(dim=0)) < 1e-6
    alone = weights_ST.shape[0] == 1
    return (scale_T if alone else scale_T.masked_fill(alike_T, -1)).to(torch.int16), weight_T


def _rounded(values: Tensor) -> list[float]:
    return [round(value, 6) for value in values.tolist()]
