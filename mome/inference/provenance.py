"""The versions that a result was made with."""

from __future__ import annotations

import platform
import sys


def versions() -> dict[str, str]:
    """Returns the versions of mome, torch, transformers and Python."""
    import torch
    import transformers

    return {
        "mome": sys.modules[__package__.partition(".")[0]].__version__,  # this package is loaded already
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
