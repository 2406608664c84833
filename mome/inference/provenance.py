"""What a result was made with: versions, and the memory that it took."""

from __future__ import annotations

import platform
import sys
from pathlib import Path
from typing import Any


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


def peak_memory() -> dict[str, Any]:
    """Returns the largest memory in bytes that this process has taken so far, and that of its GPU where it uses one.

    On Linux it is VmHWM. The numbers grow over a run; that of a study includes the model and the scan which is read
    ahead.
    """
    import torch

    found: dict[str, Any] = {"peak_memory_bytes": _resident_peak()}
    if torch.cuda.is_initialized():
        found["peak_gpu_memory_bytes"] = max(
            torch.cuda.max_memory_allocated(device) for device in range(torch.cuda.device_count())
        )
    return found


def _resident_peak() -> int | None:
    """Returns the largest resident memory in bytes; None where the system does not say."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
