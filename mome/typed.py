"""Frozen dataclasses from plain data (YAML, JSON, config strings); unknown keys and wrong types are refused.

The registry reads the arguments of parts with it, and training reads its configuration. Imports no torch.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from dataclasses import MISSING
from typing import Any

from mome.errors import InputError, did_you_mean
from mome.printable import printable
from mome.spec import brief


def from_data(cls: Any, data: dict[str, Any], *, owner: str, path: str = "") -> Any:
    """Builds a dataclass from a mapping; fields that are dataclasses are built from nested mappings.

    Args:
        cls: A dataclass.
        data: Field name → value.
        owner: What the fields belong to, for messages, as in "expert 'swiglu'".
        path: Prefix of the nested mapping in messages, as in "train."; empty at the top.

    Raises:
        InputError: An unknown key, a missing one, or a value of another type.
    """
    hints = typing.get_type_hints(cls)
    known = {field.name: field for field in dataclasses.fields(cls) if field.init}
    values = {}
    for key, value in data.items():
        if key not in known:
            raise InputError(
                f"{owner} has no argument '{path}{printable(str(key))[:60]}'{did_you_mean(str(key)[:60], known)}",
                hint="arguments: " + (", ".join(known) or "none"),
            )
        values[key] = typed(value, hints[key], owner=owner, path=f"{path}{key}")
    for name, field in known.items():
        if field.default is MISSING and field.default_factory is MISSING and name not in values:
            raise InputError(f"{owner} needs the argument '{path}{name}'", hint=f"{name}=…")
    return cls(**values)


def typed(value: Any, hint: Any, *, owner: str, path: str) -> Any:
    """Returns `value` as the type of a field: integers become floats and lists become tuples if the field needs that.

    A float is not accepted for an integer field, not even 2.0. Strings are not converted.

    Raises:
        InputError: The value is of another type.
    """
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        return from_data(hint, value, owner=owner, path=f"{path}.")
    if origin in (typing.Union, types.UnionType):
        for option in options:
            try:
                return typed(value, option, owner=owner, path=path)
            except InputError:
                continue
    elif origin is typing.Literal:
        for option in options:
            if type(value) is type(option) and value == option:
                return value
        raise InputError(
            f"{owner}, argument '{path}' is {type_name(hint)}, got {brief(value)}{_close(value, options)}",
            hint=_quotes(value, hint, path),
        )
    elif origin in (tuple, list) and isinstance(value, list | tuple):
        items = options[:1]
        result = [typed(item, items[0], owner=owner, path=f"{path}[{i}]") if items else item
                  for i, item in enumerate(value)]  # fmt: skip
        return tuple(result) if origin is tuple else result
    elif (origin is dict or hint is dict) and isinstance(value, dict):
        return value
    elif hint is type(None) and value is None:
        return None
    elif hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    elif hint in (int, str, bool) and type(value) is hint:
        return value
    raise InputError(
        f"{owner}, argument '{path}' is {type_name(hint)}, got {brief(value)}", hint=_quotes(value, hint, path)
    )


def _close(value: Any, options: tuple[Any, ...]) -> str:
    return did_you_mean(value[:60], [o for o in options if isinstance(o, str)]) if isinstance(value, str) else ""


def _quotes(value: Any, hint: Any, path: str) -> str | None:
    """What to try where a config string holds a bare word, which names a part, for a field that takes text."""
    takes_text = hint is str or any(option is str or isinstance(option, str) for option in typing.get_args(hint))
    if not takes_text or not isinstance(value, dict) or list(value) != ["name"]:
        return None
    return f"text stands in quotes, as in {path.rpartition('.')[2]}={brief(value['name'], 60)}"


def check_fields(cls: Any, *, owner: str) -> None:
    """Checks that `typed` can read every field of a dataclass.

    Raises:
        InputError: The type of a field is none of those that it reads, or names something that is not defined.
    """
    try:
        hints = typing.get_type_hints(cls)
    except (NameError, TypeError) as error:
        raise InputError(
            f"the types of the arguments of {owner} cannot be read: {error!s:.120}",
            hint="annotate with types that the module imports at its top level",
        ) from error
    for field in dataclasses.fields(cls):
        if field.init and not _is_readable(hints[field.name]):
            raise InputError(
                f"argument '{field.name}' of {owner} has the type {_annotation(hints[field.name])}, which is not read",
                hint="int, float, str, bool, dict, list[X], tuple[X, …], Literal[…] of these, unions of them, or Any",
            )


def _annotation(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint).replace("typing.", "")


def _is_readable(hint: Any) -> bool:
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if hint in (Any, int, float, str, bool, dict, type(None)) or origin is dict or dataclasses.is_dataclass(hint):
        return True
    if origin in (typing.Union, types.UnionType):
        return all(_is_readable(option) for option in options)
    if origin is typing.Literal:
        return all(type(option) in (int, str, bool, type(None)) for option in options)
    if origin is list:
        return len(options) == 1 and _is_readable(options[0])
    return origin is tuple and len(options) == 2 and options[1] is Ellipsis and _is_readable(options[0])


def check_range(owner: str, low: float, high: float, **values: float) -> None:
    """Checks that every value lies from `low` to `high`.

    Raises:
        InputError: A value is outside; the message names it as `<owner>.<name>`.
    """
    for name, value in values.items():
        if not low <= value <= high:
            raise InputError(f"{owner}.{name} is from {low:,} to {high:,}, got {value}")


def type_name(hint: Any) -> str:
    """Returns a type in words, as in "a list of int"."""
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint) or dict in (hint, origin):
        return "a mapping of keys to values"
    if origin in (typing.Union, types.UnionType):
        return " or ".join(type_name(option) for option in options)
    if origin in (tuple, list):
        return f"a list of {type_name(options[0])}" if options else "a list"
    if origin is typing.Literal:
        return "one of " + ", ".join(map(str, options))
    if hint is type(None):
        return "None"
    return getattr(hint, "__name__", str(hint))
