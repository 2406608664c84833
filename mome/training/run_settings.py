"""The settings that a run was started with, kept in `run.json` in its folder: a resumed run must have the same ones."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from mome.atomic import atomic_write
from mome.errors import InputError
from mome.spec import brief, parse
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

_CONTENTS = "contents_of_sources"


def save_run_settings(folder: Path, run: RunConfig, contents: str = "") -> None:
    """Writes a run's settings to `run.json`, for `check_same_run`.

    Args:
        folder: The run's folder.
        run: The settings.
        contents: A checksum of the training cases, for `check_same_cases`.

    Raises:
        OutputError: The file cannot be written.
    """
    with atomic_write(folder / "run.json", "the run's settings") as part:
        part.write_text(json.dumps({**_fixed_settings(run), _CONTENTS: contents}, indent=1) + "\n")


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


def check_same_cases(folder: Path, contents: str) -> None:
    """Checks that the training cases of a run are those it was started with: other ones would be drawn at every step.

    Args:
        folder: The run's folder.
        contents: The checksum that `save_run_settings` was given; a run of an earlier release has none.

    Raises:
        InputError: They are others.
    """
    path = folder / "run.json"
    before = read_json(path, "the settings of the run in this folder").get(_CONTENTS) if path.is_file() else None
    if not isinstance(before, str) or before.partition(":")[0] != contents.partition(":")[0]:
        return  # caches of another format, which a resumed run may have, cannot be compared
    if before != contents:
        raise InputError(
            "the training cases have changed since the run in this folder began",
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
    for name in ("checkpoints", "model", "best", "log.jsonl"):
        if (folder / name).exists():
            raise InputError(
                f"the folder holds {name!r} and no run.json, so it is not a run's folder",
                where=str(folder),
                # --restart does not remove checkpoints of another program
                hint="another train.out=…, or "
                + ("move them away" if name == "checkpoints" else "--restart to replace what is there"),
            )


def tracker_settings(run: RunConfig) -> dict[str, Any]:
    """Returns the settings as flat scalars, which is what trackers such as TensorBoard store.

    The run's folder and every path of this machine are left out: a tracker may send them, and paths often hold names of
    people.
    """
    model = {f"model.{key}": _as_text(_without_paths(key, value)) for key, value in run.model.items()}
    loop = {key: value for key, value in vars(run.train).items() if key != "out"}
    flat = {f"train.{key}": value for key, value in loop.items() if isinstance(value, int | float | str)}
    return {"preset": run.preset, **model, **flat}


def _as_text(value: Any) -> str:
    """Returns a value of a configuration as text, parts as config strings."""
    return brief(value) if isinstance(value, dict) and "name" in value else str(value)


def _without_paths(key: str, value: Any) -> Any:
    """Returns a value of a configuration in which `<path>` stands for every path of this machine."""
    if isinstance(value, str) and "(" in value:
        with contextlib.suppress(InputError):
            value = parse(value)
    if isinstance(value, dict):
        return {inner: _without_paths(inner, item) for inner, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_paths(key, item) for item in value]
    return "<path>" if isinstance(value, str) and _is_path(key, value) else value


def _is_path(key: str, text: str) -> bool:
    """Says whether a text is a path of this machine; a name of the Hub, org/name, is none unless it exists here."""
    named = key in ("file", "folder", "path", "checkpoint")
    written = text.startswith(("/", "~", ".", "$", "file:")) or "\\" in text or text.count("/") > 1
    return named or written or ("/" in text and os.path.exists(text))


def _fixed_settings(run: RunConfig) -> dict[str, Any]:
    """Returns the settings that a resumed run must share, as JSON values."""
    settings = json.loads(json.dumps(dataclasses.asdict(run)))
    for section in _CHANGEABLE_SECTIONS:
        del settings[section]
    settings["train"] = {key: value for key, value in settings["train"].items() if key not in _CHANGEABLE_TRAIN_KEYS}
    return settings
