"""A thread beside the main one, for reading and writing; or none, where the same steps run at once."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any


@contextlib.contextmanager
def one_thread(name: str) -> Iterator[ThreadPoolExecutor]:
    """Gives an executor of one thread. At the end what is running is finished, and what waits is dropped."""
    executor = ThreadPoolExecutor(1, f"mome-{name}")
    try:
        yield executor
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def submit(executor: ThreadPoolExecutor | None, step: Callable[..., None], *arguments: Any) -> Future[None]:
    """Runs a step in a thread, or at once where there is none."""
    if executor is not None:
        return executor.submit(step, *arguments)
    future: Future[None] = Future()
    try:
        step(*arguments)
    except Exception as error:
        future.set_exception(error)
    else:
        future.set_result(None)
    return future


def wait_for(future: Future[None] | None) -> None:
    """Waits for a step, if there is one, and raises what it raised."""
    if future is not None:
        future.result()
