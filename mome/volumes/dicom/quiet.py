"""Silence of pydicom and the decoders: their messages quote values, which may be the patient's, and show tracebacks."""

from __future__ import annotations

import contextlib
import logging
import threading
import warnings
from collections.abc import Iterator

_LOGGERS = ("pydicom", "pylibjpeg", "openjpeg", "openjpeg.decode", "jpeg_ls")


class _Silence:
    """The silence of all threads: it begins with the first block and ends with the last.

    Filters of warnings and levels of loggers belong to the process. If every block restored them, the end of a block in
    one thread would let the messages of another thread through.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._blocks = 0
        self._undo = contextlib.ExitStack()

    def begin(self) -> None:
        with self._lock:
            if self._blocks == 0:
                for name in _LOGGERS:
                    logger = logging.getLogger(name)
                    self._undo.callback(logger.setLevel, logger.level)
                    logger.setLevel(logging.CRITICAL + 1)
                self._undo.enter_context(warnings.catch_warnings())
                warnings.simplefilter("ignore")
            self._blocks += 1

    def end(self) -> None:
        with self._lock:
            self._blocks -= 1
            if self._blocks == 0:
                self._undo.close()


_silence = _Silence()


@contextlib.contextmanager
def quiet_decoders() -> Iterator[None]:
    """Suppresses warnings and log records of pydicom and the decoders inside the block, in all threads."""
    _silence.begin()
    try:
        yield
    finally:
        _silence.end()
