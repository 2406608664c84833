"""The contract of a token router."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mome.map_context import MapContext
from mome.routers.routing import Assignments, Routing, Slots, TokenChoice


class Router(nn.Module):
    """Decides which voxels of a map go to which experts.

    A router computes in float32 whatever the model's precision: it leaves autocast and casts its input. Its parameters
    and buffers stay in float32 when a model is cast to another precision or loaded in it, because a balancing bias
    moves by steps that half precision would lose. It is deterministic in eval; in training it draws noise from torch's
    default generator only, whose state is saved with a run. Its parameters are its own (`nn.Parameter`), or belong to
    submodules that it calls: a weight that is read outside its module's `forward` is invisible to offloading and
    adapters.

    Attributes:
        returns: The form of routing that the router returns.
        reads_prompts: Whether the routing depends on the prompts; then the experts run once per prompt.
    """

    returns: ClassVar[type[TokenChoice] | type[Assignments] | type[Slots]] = TokenChoice
    reads_prompts: ClassVar[bool] = False
    num_experts: int

    def forward(self, x_BDHWC: Tensor, context: MapContext) -> Routing:
        """Routes the voxels of a map.

        Args:
            x_BDHWC: The map, channels last; its voxels in this order are the T tokens.
            context: Where the map lies.
        """
        raise NotImplementedError

    def observe(self, routing: Routing) -> None:
        """Collects statistics of a routing, such as counts, for `after_step`.

        The model calls it in training, once for each routing of a forward pass. It is not called again when activation
        checkpointing runs the forward a second time, so counts belong here and not in `forward`.
        """

    def after_step(self) -> None:
        """Updates state that follows the optimiser, such as a balancing bias.

        The training loop calls `MoME.after_step` once per optimiser step, which calls this.
        """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Moves the tensors as `nn.Module.to` and its relatives do, but leaves float32 tensors in float32."""

        def moved(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            if tensor.dtype == torch.float32 and result.dtype != torch.float32:
                return tensor.to(result.device)
            return result

        return super()._apply(moved, recurse)
