"""Silences messages of libraries that are not meant for users of the command line."""

from __future__ import annotations

import logging
import os
import warnings

# Readers and writers that print their own account of a file before our message. What matters of it is in our notes and
# errors. highdicom logs that a mask is empty, which the volume of 0 ml says.
_READERS = ("nibabel", "nibabel.global", "pydicom", "highdicom")


def quiet_libraries() -> None:
    """Turns off transformers' warnings and progress bars, and a warning of tokenizers; errors still appear."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    quiet_readers()


def quiet_readers() -> None:
    """Turns off the warnings of the libraries that read scans and write masks."""
    for name in _READERS:
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    for module in ("nibabel", "pydicom"):
        warnings.filterwarnings("ignore", module=module)
