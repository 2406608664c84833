"""Training states on disk. A state is complete or absent, never half written."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from accelerate import Accelerator

from mome.atomic import output_errors


def latest_checkpoint(folder: Path) -> tuple[Path, int] | None:
    """The newest complete training state and its step, or None if there is none."""
    complete = _complete_states(folder)
    return (complete[-1], int(complete[-1].name.split("_")[1])) if complete else None


def save_checkpoint(accelerator: Accelerator, folder: Path, step: int, keep: int) -> None:
    """Saves the training state of a step, then removes all but the newest `keep` states.

    The state is written under a temporary name and renamed when it is complete. It holds Accelerate's own files, which
    may contain pickles: they are local, never published and never loaded from a Hub id.

    Raises:
        OutputError: The state cannot be written; the earlier states stay.
    """
    final = folder / f"step_{step:08d}"
    part = folder / f"step_{step:08d}.part"  # the same name in all processes, which write it together
    if accelerator.is_main_process:
        shutil.rmtree(part, ignore_errors=True)
    accelerator.wait_for_everyone()
    with output_errors(final, "the training state", part):
        folder.mkdir(parents=True, exist_ok=True)
        accelerator.save_state(str(part))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(final, ignore_errors=True)
        os.replace(part, final)
        for old in _complete_states(folder)[: -max(1, keep)]:
            shutil.rmtree(old)
        for stale in folder.glob("step_*.part"):
            shutil.rmtree(stale)
    accelerator.wait_for_everyone()


def _complete_states(folder: Path) -> list[Path]:
    """Folders of complete states, from the oldest to the newest."""
    return sorted(path for path in folder.glob("step_*") if path.is_dir() and path.suffix != ".part")
