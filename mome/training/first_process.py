"""Work that one process of a run does before the others, which hear of its progress."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from mome.errors import InputError

Progress = Callable[[Iterable[Any]], Iterable[Any]]
_Result = TypeVar("_Result")
_GOES_ON, _DONE = "goes on", "done"


class FirstProcessFailed(InputError):
    """The first process could not finish what the others waited for."""


def first_then_others(accelerator: Accelerator, work: Callable[[Progress], _Result], shown: Progress) -> _Result:
    """Does some work in the main process first, then in the others, which find its files.

    The main process tells the others after every item, so that none of them waits longer for one message than an item
    takes: waiting for the whole work would end after the time limit of the processes' connection, half an hour with
    gloo and ten minutes with NCCL.

    Args:
        accelerator: Knows the processes.
        work: The work; it gets what it is to wrap its iteration with.
        shown: Wraps the iteration of the main process, for a progress bar.

    Raises:
        FirstProcessFailed: In the other processes, where the work of the main one has raised an error.
    """
    if accelerator.num_processes == 1:
        return work(shown)
    if not accelerator.is_main_process:
        while (state := _exchanged("")) == _GOES_ON:
            pass
        if state != _DONE:
            raise FirstProcessFailed(f"the first process could not prepare the data: {state}")
        return work(lambda items: items)

    def told(items: Iterable[Any]) -> Iterable[Any]:
        for item in shown(items):
            yield item
            _exchanged(_GOES_ON)

    try:
        result = work(told)
    except BaseException as error:
        with contextlib.suppress(RuntimeError):  # a lost connection must not hide the error
            _exchanged(error.what if isinstance(error, InputError) else type(error).__name__)
        raise
    _exchanged(_DONE)
    return result


def _exchanged(state: str) -> str:
    """Sends a text from the main process to all; returns it."""
    states = [state]
    broadcast_object_list(states)
    return states[0]
