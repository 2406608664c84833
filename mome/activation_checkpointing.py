"""Activation checkpointing that runs a forward pass twice and moves running statistics once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, cast

from torch import Tensor, nn

_Contexts = tuple[AbstractContextManager[Any], AbstractContextManager[Any]]
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def checkpoint_contexts(network: nn.Module, given: Callable[[], _Contexts]) -> _Contexts:
    """The contexts of the forward pass and of its repetition, as `context_fn` of `torch.utils.checkpoint` returns them.

    Args:
        network: The network whose batch norms keep their running statistics while a forward pass is repeated.
        given: Another `context_fn`, whose contexts are entered too.
    """
    first, again = given()
    return first, _joined(again, statistics_kept(network))


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


@contextmanager
def _joined(*managers: AbstractContextManager[Any]) -> Iterator[None]:
    with ExitStack() as stack:
        for manager in managers:
            stack.enter_context(manager)
        yield
