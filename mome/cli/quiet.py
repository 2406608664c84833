"""Silences messages of libraries that are not meant for users of the command line."""

from __future__ import annotations

import os


def quiet_libraries() -> None:
    """Turns off transformers' warnings and progress bars, and a warning of tokenizers; errors still appear."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
