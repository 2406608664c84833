"""Activation checkpointing that runs a forward pass twice and moves running statistics once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, cast

from torch import Tensor, nn

_Contexts = tuple[AbstractContextManager[Any], AbstractContextManager[Any]]
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def checkpoint_activations(model: Any) -> None:
    """Switches activation checkpointing on; transformers 5.24 warns of its earlier name for that."""
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()


def checkpoint_contexts(network: nn.Module, given: Callable[[], _Contexts]) -> _Contexts:
    """The contexts of the forward pass and of its repetition, as `context_fn` of `torch.utils.checkpoint` returns them.

    Args:
        network: The network whose batch norms keep their running statistics while a forward pass is repeated.
        given: Another `context_fn`, whose contexts are entered too.
    """
    first, again = given()
    return first, _Repetition(again, network)


@contextmanager
def statistics_kept(network: nn.Module) -> Iterator[None]:
    """Leaves the running statistics of batch norms as they are; outputs and gradients do not change."""
    norms = [m for m in network.modules() if isinstance(m, _BATCH_NORMS) and m.track_running_stats]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        # a momentum of zero keeps the averages; the counts go to a copy
        norm.momentum, norm.num_batches_tracked = 0.0, cast("Tensor", norm.num_batches_tracked).clone()
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count


class _Repetition(AbstractContextManager[None]):
    """The context of a repeated forward pass, which a second backward pass through the same graph enters again."""

    def __init__(self, given: AbstractContextManager[Any], network: nn.Module) -> None:
        self.given, self.network, self.entered = given, network, ExitStack()

    def __enter__(self) -> None:
        with ExitStack() as stack:
            stack.enter_context(self.given)
            stack.enter_context(statistics_kept(self.network))
            self.entered = stack.pop_all()

    def __exit__(self, *error: Any) -> bool:
        return bool(self.entered.__exit__(*error))
