"""The contracts of expert bodies. A body says what it reads: tokens, the whole map, or the map and a prompt.

Shapes: T tokens, D width of a token, E experts, K experts per token; maps are (B, D, H, W, C), channels last.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor, nn

from mome.map_context import MapContext

Reads = Literal["tokens", "map", "prompt"]


class Experts(nn.Module):
    """E expert networks that keep the width of what they read.

    An expert returns its own result only; the residual belongs to the layer around it. Its parameters are its own
    (`nn.Parameter`), or belong to submodules that it calls. Parameters that differ between experts are stacked along
    dimension 0 where the kernels run them.

    Attributes:
        reads: `tokens`, `map` or `prompt`.
        num_experts: E.
    """

    reads: ClassVar[Reads]
    num_experts: int

    @property
    def always_on(self) -> nn.Module | None:
        """A submodule that reads every voxel once, whatever the routing: (…, D) → (…, D); None where there is none.

        The dispatcher adds its result to the weighted sum. `forward` does not: it may see assignments or slots.
        """
        return None


class TokenExperts(Experts):
    """Experts that see one voxel at a time; the grouped kernels run them.

    Attributes:
        dense_when_single: Whether `forward` takes None for ids and weights where there is one expert, which then runs
            on every token without sorting and weighing.
        stacked: Whether all parameters are the module's own, with the experts along dimension 0, and `forward` also
            works with a part of them and ids that count from the first of these. Then expert parallelism can split
            them (`mome.expert_parallel`).
        routed_part: The name of the submodule of token experts that `forward` calls for the experts that have weights,
            with ids that count from its first expert; None where the module's own experts are these. Expert
            parallelism splits the submodule.
    """

    reads: ClassVar[Reads] = "tokens"
    dense_when_single: ClassVar[bool] = False
    stacked: ClassVar[bool] = False
    routed_part: ClassVar[str | None] = None

    def forward(self, x_TD: Tensor, ids_TK: Tensor | None, weights_TK: Tensor | None) -> Tensor:
        """Σ_k weight · expert(x) for every token: (T, D) → (T, D).

        The signature is that of Hugging Face's experts, which its expert parallelism replaces. Routings that give a
        token a variable number of experts use it too: each assignment is then a token of its own, with K = 1.
        """
        raise NotImplementedError


class MapExperts(Experts):
    """Experts that see the whole map, such as convolutions; every expert runs on it and gates weigh the results."""

    reads: ClassVar[Reads] = "map"

    def forward(self, x_BDHWC: Tensor, gates_BDHWE: Tensor, context: MapContext) -> Tensor:
        """Σ_e gate · expert_e(map): (B, D, H, W, C) → (B, D, H, W, C).

        Args:
            x_BDHWC: The map, channels last.
            gates_BDHWE: The weight of every expert at every voxel, float32 where a router made them. The result has
                the type of the map.
            context: Where the map lies; for prompt experts also `text_BT`.
        """
        raise NotImplementedError


class PromptExperts(MapExperts):
    """Experts that read the prompt's text row, `context.text_BT`; they run once for every prompt.

    Args of `__init__`: they get `text_dim` beside `dim`.
    """

    reads: ClassVar[Reads] = "prompt"
