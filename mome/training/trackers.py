"""Trackers of a run, by name. All are optional packages, and nothing is sent unless one that sends is asked for."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mome.atomic import NO_SPACE
from mome.errors import InputError, OutputError

if TYPE_CHECKING:
    from accelerate import Accelerator

# Name → the extra of this package that installs it. wandb sends to its server unless WANDB_MODE is offline, mlflow to
# MLFLOW_TRACKING_URI or into files of the working folder; tensorboard and trackio write files.
TRACKERS = {"tensorboard": "train", "wandb": "wandb", "mlflow": "mlflow", "trackio": "trackio"}
NONE = "none"


def tracker_to_use(name: str) -> str | None:
    """Returns the tracker's name for Accelerate; None for `none`, and for TensorBoard where it is not installed.

    TensorBoard is the default, so a run does without it; `missing_note` says so.

    Raises:
        InputError: Another tracker is not installed.
    """
    if name == NONE or (name == "tensorboard" and not is_installed(name)):
        return None
    if not is_installed(name):
        raise InputError(
            f"train.tracker={name} needs the package {name}, which is not installed",
            hint=f'pip install "mome[{TRACKERS[name]}]", or train.tracker=none',
        )
    return name


def missing_note(name: str) -> str | None:
    """Returns a note where the default tracker is not installed; the losses are in `log.jsonl` all the same."""
    if name != "tensorboard" or is_installed(name):
        return None
    return 'tensorboard is not installed, so that losses are in log.jsonl only (pip install "mome[train]")'


def is_installed(name: str) -> bool:
    """Says whether the package of a tracker can be imported."""
    return importlib.util.find_spec(name) is not None


@contextlib.contextmanager
def tracker_errors(out: Path) -> Iterator[None]:
    """Says that it was the tracker which could not write, on a full disk or over the network.

    Args:
        out: Folder of the run.

    Raises:
        OutputError: The operating system refused what the block wrote.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or (str(error).splitlines() or [type(error).__name__])[0][:200]
        hint = "free some disk space, or train.tracker=none" if error.errno in NO_SPACE else "train.tracker=none"
        raise OutputError(f"the tracker's log could not be written: {reason}", where=str(out), hint=hint) from error


def start_tracker(accelerator: Accelerator, name: str, out: Path, settings: dict[str, Any]) -> None:
    """Starts the tracker of a run on the main process.

    Args:
        accelerator: Was built with `tracker_to_use(name)`.
        name: The tracker.
        out: Folder of the run; a tracker that writes files writes them there.
        settings: What it stores of the run's settings, as flat scalars.

    Raises:
        OutputError: The disk is full, or the like.
    """
    if tracker_to_use(name) is None:
        return
    own: dict[str, dict[str, Any]] = {
        "wandb": {"dir": str(out), "name": out.name},
        "mlflow": {"run_name": out.name},
        "trackio": {"name": out.name},
    }
    with tracker_errors(out):
        accelerator.init_trackers("mome", config=settings, init_kwargs={name: own.get(name, {})})
