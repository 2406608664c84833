"""Training states on disk: complete or absent, never half-written."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from mome.atomic import atomic_write, output_errors
from mome.errors import InputError


def latest_checkpoint(folder: Path) -> tuple[Path, int] | None:
    """The newest complete training state and its step."""
    found = sorted(path for path in folder.glob("step_*") if path.is_dir() and path.suffix != ".part")
    return (found[-1], int(found[-1].name.split("_")[1])) if found else None


def save_checkpoint(accelerator: Accelerator, folder: Path, step: int, keep: int) -> None:
    """Writes the state under a temporary name and moves it; then removes states beyond the newest `keep`.

    These are Accelerate's own files: local state, never published and never loaded from a Hub id.

    Raises:
        OutputError: The state cannot be written; the earlier ones stay.
    """
    final = folder / f"step_{step:08d}"
    part = folder / f"step_{step:08d}.part"  # one name for all processes
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
        complete = sorted(path for path in folder.glob("step_*") if path.suffix != ".part")
        for old in complete[: -max(1, keep)]:
            shutil.rmtree(old)
        for stale in folder.glob("step_*.part"):
            shutil.rmtree(stale)
    accelerator.wait_for_everyone()


# Settings that a resumed run may change: they decide where and how fast it runs, not what it computes.
_FREE = {"out", "threads", "workers", "log_every", "checkpoint_every", "keep_checkpoints", "tracker"}
_FREE |= {"validate_every", "validate_cases"}


def _settings(run: Any) -> dict[str, Any]:
    settings = json.loads(json.dumps(dataclasses.asdict(run)))
    for section in ("validation", "cache"):
        settings.pop(section)
    settings["train"] = {key: value for key, value in settings["train"].items() if key not in _FREE}
    return settings


def note_run(folder: Path, run: Any) -> None:
    """Keeps a run's settings in `run.json`, for `check_same_run`."""
    with atomic_write(folder / "run.json", "the run's settings") as part:
        part.write_text(json.dumps(_settings(run), indent=1) + "\n")


def check_same_run(folder: Path, run: Any) -> None:
    """Compares a run's settings with those noted in its folder, if there are any.

    Raises:
        InputError: The folder holds a run with other settings.
    """
    settings, path = _settings(run), folder / "run.json"
    if path.is_file():
        before = json.loads(path.read_text())
        changed = [key for key in settings if settings[key] != before.get(key)]
        if changed:
            key = changed[0]
            if isinstance(settings[key], dict) and isinstance(before.get(key), dict):
                old = before[key]
                key += "." + next(k for k in {**old, **settings[key]} if settings[key].get(k) != old.get(k))
            raise InputError(
                f"the run in this folder was started with another '{key}'",
                where=str(folder),
                hint="another train.out=…, or --restart to begin anew",
            )


class StepLog:
    """One JSON line per optimiser step. A resumed run drops the lines after its checkpoint and goes on."""

    def __init__(self, path: Path, resume_step: int) -> None:
        self.path = path
        kept = []
        if path.is_file() and resume_step:
            for line in path.read_text().splitlines():
                try:
                    entry = json.loads(line)
                except json.JSONDecodeError:  # the line that a killed run was writing
                    continue
                if entry["step"] <= resume_step:
                    kept.append(line)
        with atomic_write(path, "the log") as part:
            part.write_text("".join(line + "\n" for line in kept))

    def write(self, **values: Any) -> None:
        """Appends one line and flushes it."""
        with self.path.open("a") as file:
            file.write(json.dumps(values) + "\n")
