"""What may look at a forward pass of the model: how voxels were routed, and how the fusion weighed the scales."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from mome.routers.routing import Routing


class ForwardObserver(Protocol):
    """Sees what a forward pass decided; it must change nothing. `MoME.observer` holds it."""

    def on_routings(self, routings: Sequence[Routing]) -> None:
        """Sees the routings of one forward pass in training.

        It is called once for each pass, also where activation checkpointing runs parts of it again.
        """

    def on_fusion(self, prompt: int, weights_BSDHW: Tensor | None) -> None:
        """Sees the weights of the scales for one prompt, in training and in eval.

        Args:
            prompt: The position of the prompt among those that are decoded.
            weights_BSDHW: The weights at the finest resolution; None where the fusion tells none.
        """
