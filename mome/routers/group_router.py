"""What routers have in common whose choice for one voxel depends on the other voxels of its group."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from mome.registry import at_least
from mome.routers.base import Router
from mome.routers.gate import LinearGate
from mome.routers.groups import Groups, check_window


class GroupRouter(Router):
    """A router that compares the voxels of a group.

    A group is one patch of the batch, or a cubic window of it; it never holds voxels of two samples. So the number of
    tiles that run together, the number of processes and the split into micro-batches change no result. The size of the
    patch does, unless `window` fixes the groups. Our choice.

    Args:
        owner: The router's name, for messages.
        window: Side of the windows in voxels of the map; 0 makes each patch one group.
    """

    group: ClassVar[Literal["token", "patch"]] = "patch"

    def __init__(self, owner: str, window: int) -> None:
        super().__init__()
        at_least(0, f"router {owner}", window=window)
        self.owner, self.window = owner, window

    def check_map(self, sides: tuple[int, int, int]) -> None:
        check_window(self.owner, self.window, sides)

    def groups_of(self, x_BDHWC: Tensor) -> Groups:
        """The groups of a map.

        Raises:
            InputError: The windows do not divide the map.
        """
        batch, depth, height, width = x_BDHWC.shape[:4]
        self.check_map((depth, height, width))
        return Groups(batch, (depth, height, width), self.window)


def logits_by_group(gate: LinearGate, x_BDHWC: Tensor, groups: Groups) -> Tensor:
    """The gate's logits (G, M, E) in float32.

    Each sample goes through a product of its own: for a larger batch a matrix product may round its rows differently,
    and then another voxel may be the last one that is chosen.
    """
    return groups.split(torch.cat([gate(x_DHWC.flatten(0, 2)) for x_DHWC in x_BDHWC.unbind(0)]))
