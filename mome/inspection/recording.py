"""Records what the routers and the fusion decide while a tile is encoded and decoded."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from types import TracebackType
from typing import Any, NamedTuple

from torch import Tensor, nn

from mome.modeling import MoME
from mome.router_names import named_routers
from mome.routers.routing import Routing


class SeenRouting(NamedTuple):
    """A routing of one tile.

    Attributes:
        name: The router.
        sides: Voxels of the map along D, H, W; its tokens in this order.
        stride: Voxels of the network grid per voxel of the map.
        routing: What the router returned.
    """

    name: str
    sides: tuple[int, int, int]
    stride: tuple[int, int, int]
    routing: Routing


class TileRecorder:
    """A context manager; inside the block it sees the model's routings and fusion weights.

    Args:
        model: A MoME in eval mode.

    Attributes:
        routings: The routings since `clear`.
        weights_SDHW: The weights of the scales for the prompt that was decoded last, float32, at the finest
            resolution; None where the fusion tells none.
    """

    def __init__(self, model: MoME) -> None:
        self.model = model
        self.clear()
        self._hooks: list[Any] = []

    def clear(self) -> None:
        """Forgets what was seen."""
        self.routings: list[SeenRouting] = []
        self.weights_SDHW: Tensor | None = None

    def __enter__(self) -> TileRecorder:
        for name, router in named_routers(self.model).items():
            self._hooks.append(router.register_forward_hook(partial(self._saw, name)))
        self.model.observer = self
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.model.observer = None
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _saw(self, name: str, router: nn.Module, given: tuple[Any, ...], routing: Routing) -> None:
        x_BDHWC, context = given
        depth, height, width = x_BDHWC.shape[1:4]
        self.routings.append(SeenRouting(name, (depth, height, width), context.stride, routing))

    def on_routings(self, routings: Sequence[Routing]) -> None:
        """Sees the routings of a training step, of which there is none here."""

    def on_fusion(self, prompt: int, weights_BSDHW: Tensor | None) -> None:
        """Sees the weights of the scales for one prompt."""
        self.weights_SDHW = None if weights_BSDHW is None else weights_BSDHW[0].float()
