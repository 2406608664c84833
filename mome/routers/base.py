"""The contract of a token router."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

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
        group: What decides about a voxel beside its own value, place and prompt: `token`, nothing; `patch`, the other
            voxels of its group, which is a patch of the batch or a window of it (`mome.routers.group_router`).
        reads_place: Whether the routing depends on where the map lies.
        reads_prompts: Whether the routing depends on the prompts; then the experts run once per prompt, or once for
            each set of prompts that `prompt_groups` says share their result. The router is built with `text_dim`.
        reads_labels: Whether the router reads `label_B` and `labels` of the context.
        needed_alone: Whether the router is used where there is one expert, too.
    """

    returns: ClassVar[type[TokenChoice] | type[Assignments] | type[Slots]] = TokenChoice
    group: ClassVar[Literal["token", "patch"]] = "token"
    reads_place: ClassVar[bool] = False
    reads_prompts: ClassVar[bool] = False
    reads_labels: ClassVar[bool] = False
    needed_alone: ClassVar[bool] = False
    num_experts: int

    def forward(self, x_BDHWC: Tensor, context: MapContext) -> Routing:
        """Routes the voxels of a map.

        Args:
            x_BDHWC: The map, channels last; its voxels in this order are the T tokens.
            context: Where the map lies.
        """
        raise NotImplementedError

    def check_map(self, sides: tuple[int, int, int]) -> None:
        """Checks that the router can divide a map of these sides (voxels along D, H, W); the model calls it when built.

        Raises:
            InputError: It cannot.
        """

    def check_labels(self, labels: Sequence[str]) -> None:
        """Checks that the router can serve the labels of the model, which calls it when built and when relabelled.

        Raises:
            InputError: It cannot.
        """

    def prompt_groups(self, prompts: MapContext) -> Tensor | None:
        """Says which prompts have the same routing, for routers that read prompts.

        Args:
            prompts: The P prompts: `text_BT` and `label_B` have one row for each of them.

        Returns:
            (P,) int64; prompts with equal numbers share one pass of the experts. None, the default, where each prompt
            needs its own.
        """
        return None

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
