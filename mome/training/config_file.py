"""Reads a training configuration: one YAML file, then `key=value` overrides from the command line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from mome.errors import InputError
from mome.registry import PARTS
from mome.spec import parse
from mome.training.config import RunConfig
from mome.typed import from_data

# Overrides of these keys need no `model.` before them.
MODEL_KEYS = (*PARTS, "dim", "head_channels", "patch_size", "residual")


class _Loader(yaml.SafeLoader):
    """YAML 1.1 with two rules of YAML 1.2.

    Only true and false are booleans: YAML 1.1 would read `mixed_precision: no` as one. A number with an exponent is a
    float without a decimal point too: YAML 1.1 would read `learning_rate: 1e-3` as a string.
    """


_BOOL, _FLOAT = "tag:yaml.org,2002:bool", "tag:yaml.org,2002:float"
_Loader.yaml_implicit_resolvers = {
    letter: [(tag, pattern) for tag, pattern in resolvers if tag != _BOOL]
    for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_BOOL, re.compile("^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver(
    _FLOAT, re.compile(r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)[eE][-+]?[0-9]+$"), list("-+.0123456789")
)


def load_run_config(path: str | Path, overrides: list[str]) -> RunConfig:
    """Reads a YAML file and applies `key=value` overrides.

    `experts="swiglu(n=8)"` replaces a part of the model, `experts.n=8` one of its arguments, `train.steps=100` a
    setting of the loop. Values are read as YAML.

    Args:
        path: The YAML file.
        overrides: Strings `key=value`; the key is a dotted path of keys.

    Raises:
        InputError: No such file, not YAML, an unknown key, or a value of the wrong type.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError("no such training configuration", where=str(path))
    try:
        data = yaml.load(path.read_text(), Loader=_Loader) or {}
    except yaml.YAMLError as error:
        first = str(error).splitlines()[0]
        raise InputError(f"the configuration is not valid YAML: {first}", where=str(path)) from error
    if not isinstance(data, dict):
        raise InputError("a training configuration is a mapping of keys to values", where=str(path))
    for override in overrides:
        _apply_override(data, override)
    return from_data(RunConfig, data, owner="the configuration")


def _apply_override(data: dict[str, Any], override: str) -> None:
    """Sets one value in the nested mappings of the configuration; missing sections are created.

    Raises:
        InputError: The override is not `key=value`, or a key on the way to the value is not a section.
    """
    dotted, sign, text = override.partition("=")
    if not sign or not dotted:
        raise InputError(f"an override is written key=value, got {override!r}", hint="train.steps=100")
    keys = dotted.strip().split(".")
    if keys[0] in MODEL_KEYS:
        keys = ["model", *keys]
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError:
        value = text
    section = data
    for i, key in enumerate(keys[:-1]):
        child = section.get(key)
        if isinstance(child, str) and keys[0] == "model":  # a config string such as 'swiglu(n=8)'
            child = parse(child)
        elif child is None:
            child = {}
        elif not isinstance(child, dict):
            raise InputError(f"{'.'.join(keys[: i + 1])} is not a section", where=override)
        section[key] = child
        section = child
    section[keys[-1]] = value
