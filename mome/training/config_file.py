"""Reads a training configuration: one YAML file, then `key=value` overrides from the command line."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

from mome.errors import InputError, did_you_mean
from mome.registry import PARTS
from mome.spec import parse
from mome.text_file import read_text
from mome.training.config import RunConfig
from mome.typed import from_data
from mome.yaml_file import LONGEST, NotYaml, read_yaml

# Overrides of these keys need no `model.` before them.
MODEL_KEYS = (*PARTS, "dim", "head_channels", "patch_size", "residual")
_MOST_KEYS = 20  # of the dotted path of an override


def load_run_config(path: str | Path, overrides: list[str]) -> RunConfig:
    """Reads a YAML file and applies `key=value` overrides.

    `experts="swiglu(n=8)"` replaces a part of the model, `experts.n=8` one of its arguments, `train.steps=100` a
    setting of the loop. Values are read as YAML.

    Args:
        path: The YAML file, in UTF-8.
        overrides: Strings `key=value`; the key is a dotted path of keys.

    Raises:
        InputError: No such file, not YAML, an unknown key, or a value of the wrong type.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError("no such training configuration", where=str(path))
    data = read_yaml(read_text(path, "the configuration", limit=4 * LONGEST), str(path))
    data = {} if data is None else data
    if not isinstance(data, dict):
        raise InputError("a training configuration is a mapping of keys to values", where=str(path))
    try:
        return _run_config(data, overrides)
    except InputError as error:
        where = error.where or _wrong_override(data, overrides, error) or str(path)
        raise InputError(error.what, where=where, hint=error.hint) from error


def _run_config(data: dict[str, Any], overrides: Sequence[str]) -> RunConfig:
    """Returns the settings of a file's contents, which stay as they are, with overrides."""
    data = copy.deepcopy(data)
    for override in overrides:
        _apply_override(data, override)
    return from_data(RunConfig, data, owner="the configuration")


def _wrong_override(data: dict[str, Any], overrides: Sequence[str], error: InputError) -> str | None:
    """Returns the override without which an error would not be there; None where the file itself is wrong."""
    for i, override in enumerate(overrides):
        try:
            _run_config(data, [*overrides[:i], *overrides[i + 1 :]])
        except InputError as other:
            if other.what == error.what:
                continue
        return f"the override {override!r:.80}"
    return None


def _check_section(name: str, where: str) -> None:
    """Checks the first key of an override.

    Raises:
        InputError: A configuration has no such key.
    """
    sections = get_type_hints(RunConfig)
    known = [*(field.name for field in fields(RunConfig)), *MODEL_KEYS]
    if name in known:
        return
    inner = {field.name: f"{key}.{field.name}" for key, kind in sections.items() if is_dataclass(kind)
             for field in fields(kind)}  # fmt: skip
    close = f", did you mean '{inner[name]}'?" if name in inner else did_you_mean(name[:60], [*known, *inner.values()])
    raise InputError(f"the configuration has no argument {name!r:.60}{close}", where=where, hint=", ".join(known))


def _apply_override(data: dict[str, Any], override: str) -> None:
    """Sets one value in the nested mappings of the configuration; missing sections are created.

    Raises:
        InputError: The override is not `key=value`, or a key on the path to the value is not a section.
    """
    dotted, sign, text = override.partition("=")
    if not sign or not dotted.strip():
        raise InputError(f"an override is written key=value, got {override!r:.80}", hint="train.steps=100")
    keys = dotted.strip().split(".")
    if len(keys) > _MOST_KEYS:
        raise InputError(f"an override has at most {_MOST_KEYS} keys, got {len(keys)}", where=override[:80])
    _check_section(keys[0], f"the override {override!r:.80}")
    if keys[0] in MODEL_KEYS:
        keys = ["model", *keys]
    try:
        value = read_yaml(text, override[:80])
    except NotYaml:
        value = text
    section = data
    for i, key in enumerate(keys[:-1]):
        child = section.get(key)
        if isinstance(child, str) and keys[0] == "model":  # a config string such as 'swiglu(n=8)'
            child = parse(child)
        elif child is None:
            child = {}
        elif not isinstance(child, dict):
            raise InputError(f"{'.'.join(keys[: i + 1])} is not a section", where=override[:80])
        section[key] = child
        section = child
    section[keys[-1]] = value
