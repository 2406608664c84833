"""Keeps libraries' own chatter out of our output."""

from __future__ import annotations

import os


def quiet_libraries() -> None:
    """No progress bars of weights loading, no advice meant for developers; errors still come through."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
