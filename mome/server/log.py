"""The log of the server. It holds ids, sizes, times and states, and nothing that a client has sent.

A traceback quotes values, which may come from a scan's header. It is therefore written without the message of the
exception, as its class and the place in the source.
"""

from __future__ import annotations

import logging
import sys
import traceback
from types import TracebackType
from typing import Any

LOGGER = logging.getLogger("mome.server")


class PlaceFormatter(logging.Formatter):
    """Writes an exception as its class and its place."""

    def formatException(self, ei: Any) -> str:
        """Returns one line for an exception."""
        return place_of(ei[1], ei[2])


def place_of(error: BaseException | None, trace: TracebackType | None = None) -> str:
    """Returns the class of an error and the last place in its traceback, as in "KeyError at mome/x.py:12"."""
    frames = traceback.extract_tb(trace or (error.__traceback__ if error is not None else None))
    ours = [frame for frame in frames if "/mome/" in frame.filename.replace("\\", "/")] or list(frames)
    place = f" at {'/'.join(ours[-1].filename.replace(chr(92), '/').split('/')[-2:])}:{ours[-1].lineno}" if ours else ""
    return f"{type(error).__name__}{place}"


def set_up_log() -> None:
    """Sends the server's log, and the warnings of uvicorn and asyncio, to stderr without what clients sent."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(PlaceFormatter("%(asctime)s %(levelname)s %(message)s"))
    for name, level in (("mome.server", logging.INFO), ("uvicorn", logging.ERROR), ("asyncio", logging.ERROR)):
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.setLevel(level)
        logger.propagate = False
    # asyncio's messages quote objects, which may hold a request.
    logging.getLogger("asyncio").addFilter(_without_arguments)


def _without_arguments(record: logging.LogRecord) -> bool:
    record.msg, record.args = "error in a task of the event loop", ()
    return True


def megabytes(count: int) -> str:
    """Returns a number of bytes for the log."""
    return f"{count / 1e6:.1f} MB"
