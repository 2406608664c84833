"""Silences messages of libraries that are not meant for users of the command line."""

from __future__ import annotations

import importlib.util
import logging
import os
import warnings
from collections.abc import Iterable
from pathlib import Path

from mome.volumes.scan_files import is_nifti

# Readers and writers that print their own account of a file before our message. What matters of it is in our notes and
# errors. highdicom logs that a mask is empty, which the volume of 0 ml says.
_READERS = ("nibabel", "nibabel.global", "pydicom", "highdicom", "SimpleITK")


def quiet_libraries() -> None:
    """Turns off transformers' warnings and progress bars, and a warning of tokenizers; errors still appear."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    quiet_readers()


def quiet_readers(paths: Iterable[Path] = ()) -> None:
    """Turns off the warnings of the libraries that read scans and write masks.

    Args:
        paths: What will be read. SimpleITK, whose import takes a while, is imported for files that are no NIfTI.
    """
    for name in _READERS:
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    for module in ("nibabel", "pydicom"):
        warnings.filterwarnings("ignore", module=module)
    if any(not is_nifti(path) for path in paths) and importlib.util.find_spec("SimpleITK"):
        import SimpleITK

        SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)
