"""Silence of pydicom and the decoders: their messages quote values, which may be the patient's, and show tracebacks."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator

_LOGGERS = ("pydicom", "pylibjpeg", "openjpeg", "openjpeg.decode", "jpeg_ls")


@contextlib.contextmanager
def quiet_decoders() -> Iterator[None]:
    """Suppresses warnings and log records of pydicom and the decoders inside the block."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
