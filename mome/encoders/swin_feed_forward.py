"""Sparse layers inside the blocks of MONAI's Swin transformer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

from torch import Tensor, nn

from mome.encoders.base import Stride
from mome.layers.sparse import SparseReplacement, places
from mome.map_context import MapContext
from mome.routers.routing import Routing


class _Pass(NamedTuple):
    """One forward pass: the place of the volume, and the routings so far."""

    context: MapContext
    routings: list[Routing]


# MONAI's blocks call their feed-forward layer with tokens alone. Each thread has its own value of this variable, so
# that a server may run one model in several threads.
_PASS: ContextVar[_Pass] = ContextVar("_PASS")


class SwinFeedForward(SparseReplacement):
    """A sparse layer in the place of a block's MLP. MONAI's dropout of units is not part of it.

    Args:
        spec: The layer.
        dim: Channels of the tokens.
        stride: Voxels of the volume per token.
    """

    def __init__(self, spec: dict[str, Any], *, dim: int, stride: Stride) -> None:
        super().__init__(spec, dim=dim, stride=stride, owner="encoder 'swin_unetr'")

    def forward(self, x_BDHWC: Tensor) -> Tensor:
        """Normalised tokens (B, D, H, W, C) → tokens of the same shape; runs inside `routings_of`."""
        now = _PASS.get()
        y_BDHWC, routing = self.layer(x_BDHWC.contiguous(), now.context.with_stride(self.stride))
        if routing is not None:
            now.routings.append(routing)
        return y_BDHWC


@contextmanager
def routings_of(context: MapContext) -> Iterator[list[Routing]]:
    """Yields a list to which the sparse layers that run inside the block add their routings.

    Args:
        context: The place of the volume.
    """
    routings: list[Routing] = []
    token = _PASS.set(_Pass(context, routings))
    try:
        yield routings
    finally:
        _PASS.reset(token)


def replace_feed_forward(swin: Any, spec: dict[str, Any], width: int) -> None:
    """Replaces the MLP of every n-th block by a sparse layer; blocks are counted through the stages, fine to coarse.

    Args:
        swin: MONAI's `SwinTransformer`.
        spec: The layer in its canonical form.
        width: Channels of the first stage, whose tokens are 2 × 2 × 2 voxels.
    """
    blocks: list[tuple[int, nn.Module]] = []
    for level, stage in enumerate((swin.layers1, swin.layers2, swin.layers3, swin.layers4)):
        blocks += [(level, block) for block in stage[0].blocks]
    for index in places(len(blocks), spec, "swin_unetr"):
        level, block = blocks[index]
        block.mlp = SwinFeedForward(spec, dim=width * 2**level, stride=(2 ** (level + 1),) * 3)
