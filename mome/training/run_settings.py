"""The settings that a run was started with, kept in `run.json` in its folder: a resumed run must have the same ones."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from mome.atomic import atomic_write
from mome.errors import InputError
from mome.text_file import read_json
from mome.training.config import RunConfig, SourceConfig

# A resumed run may change these: they decide where and how fast it runs, and what it reports, not what it computes.
_CHANGEABLE_SECTIONS = ("validation", "cache", "cache_format")
_CHANGEABLE_TRAIN_KEYS = frozenset(
    (
        "out", "threads", "workers", "log_every", "checkpoint_every", "keep_checkpoints", "tracker", "validate_every",
        "validate_cases", "cpu", "patience",
    )
)  # fmt: skip


def save_run_settings(folder: Path, run: RunConfig) -> None:
    """Writes a run's settings to `run.json`, for `check_same_run`.

    Raises:
        OutputError: The file cannot be written.
    """
    with atomic_write(folder / "run.json", "the run's settings") as part:
        part.write_text(json.dumps(_fixed_settings(run), indent=1) + "\n")


def remove_run_settings(folder: Path) -> None:
    """Removes `run.json` if there is one."""
    (folder / "run.json").unlink(missing_ok=True)


def check_same_run(folder: Path, run: RunConfig) -> None:
    """Compares a run's settings with those saved in its folder, if there are any.

    Raises:
        InputError: The folder holds a run with other settings, its `run.json` cannot be read, or it holds results
            without a `run.json`.
    """
    path = folder / "run.json"
    if not path.is_file():
        _refuse_folder_of_others(folder)
        return
    before = read_json(path, "the settings of the run in this folder", hint="another train.out=…, or --restart")
    before, now = _with_defaults(before), _fixed_settings(run)
    key = next((key for key in now if now[key] != before.get(key)), None)
    if key is None:
        return
    new, old = now[key], before.get(key)
    if isinstance(new, dict) and isinstance(old, dict):
        missing = object()
        key += "." + next(inner for inner in {**old, **new} if new.get(inner, missing) != old.get(inner, missing))
    raise InputError(
        f"the run in this folder was started with another '{key}'",
        where=str(folder),
        hint="another train.out=…, or --restart to start again",
    )


def _with_defaults(before: dict[str, Any]) -> dict[str, Any]:
    """Returns the settings of a run with the defaults of those that its release did not have."""
    merged = {**_fixed_settings(RunConfig()), **before}
    for section, default in _fixed_settings(RunConfig()).items():
        if isinstance(default, dict) and isinstance(merged[section], dict):
            merged[section] = {**default, **merged[section]}
    if isinstance(merged["sources"], list):
        default = json.loads(json.dumps(dataclasses.asdict(SourceConfig())))
        merged["sources"] = [{**default, **one} if isinstance(one, dict) else one for one in merged["sources"]]
    return merged


def _refuse_folder_of_others(folder: Path) -> None:
    """Checks that a folder without `run.json` holds nothing that a run would replace.

    Raises:
        InputError: There is a model, a log, or training states.
    """
    for name in ("model", "best", "log.jsonl", "checkpoints"):
        if (folder / name).exists():
            raise InputError(
                f"the folder holds {name!r} and no run.json, so it is not a run's folder",
                where=str(folder),
                hint="another train.out=…, or --restart to replace what is there",
            )


def tracker_settings(run: RunConfig) -> dict[str, Any]:
    """Returns the settings as flat scalars, which is what trackers such as TensorBoard store.

    The run's folder is left out: a tracker may send them, and paths often hold names of people.
    """
    flat: dict[str, Any] = {f"model.{key}": str(value) for key, value in run.model.items()}
    loop = {key: value for key, value in vars(run.train).items() if key != "out"}
    flat |= {f"train.{key}": value for key, value in loop.items() if isinstance(value, int | float | str)}
    return {"preset": run.preset, **flat}


def _fixed_settings(run: RunConfig) -> dict[str, Any]:
    """Returns the settings that a resumed run must share, as JSON values."""
    settings = json.loads(json.dumps(dataclasses.asdict(run)))
    for section in _CHANGEABLE_SECTIONS:
        del settings[section]
    settings["train"] = {key: value for key, value in settings["train"].items() if key not in _CHANGEABLE_TRAIN_KEYS}
    return settings
