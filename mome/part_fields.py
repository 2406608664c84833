"""The arguments of a part: fields that hold other parts, their defaults, and the checks of a Config class. No torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import MISSING
from typing import Any

from mome import module_objects
from mome.errors import InputError, did_you_mean
from mome.spec import Spec, canonical
from mome.typed import check_fields

# Every kind of part by the name that `mome list` and nested fields use; `mome.registry` fills it.
REGISTRIES: dict[str, Any] = {}


def part(kind: str, default: Any = MISSING) -> Any:
    """A field of a part's Config that holds another part, as in `base: Any = part("experts", "swiglu(n=4)")`.

    The registry validates the nested spec, fills in its defaults and prints it, as it does for a top-level one. The
    class builds it with `REGISTRIES[kind].build(config.base, …)`.

    The default of a field of several parts is a tuple, as in `losses: tuple[Any, ...] = part("losses", ())`.

    Args:
        kind: A key of `REGISTRIES`.
        default: A config string, or a tuple of them; the argument is required where none is given.

    Raises:
        InputError: There are no parts of this kind.
    """
    if kind not in REGISTRIES:
        raise InputError(
            f"a field is declared as part({kind!r:.60}, …), but there are no parts of this kind"
            f"{did_you_mean(str(kind), REGISTRIES)}",
            hint="kinds: " + ", ".join(REGISTRIES),
        )
    several = {"several": True} if isinstance(default, tuple) else {}
    return dataclasses.field(default=default, metadata={"part": kind, **several})


def module(default: Any = MISSING) -> Any:
    """A field of a part's Config that holds a torch module object; see `mome.module_objects`."""
    return dataclasses.field(default=default, metadata={"module": True})


def at_least(least: float, owner: str, **values: float) -> None:
    """Checks arguments of a part.

    Raises:
        InputError: A value is below `least`.
    """
    for key, value in values.items():
        if not value >= least:
            raise InputError(f"{key} of {owner} is at least {least}, got {value}")


def check_config_class(part_class: Any, owner: str) -> None:
    """Checks that a class has a Config whose arguments can be read from a config string.

    Args:
        part_class: The class of a part.
        owner: The part in words, as in "expert 'mlp'".

    Raises:
        InputError: There is no Config dataclass, it is not frozen, or a field has a type that is not read.
    """
    config_class = getattr(part_class, "Config", None)
    if not dataclasses.is_dataclass(config_class):
        raise InputError(
            f"{owner} is no part: {part_class!r:.80} has no dataclass called Config",
            hint="see CONTRIBUTING.md, which has a complete example",
        )
    declared: Any = part_class.Config
    if not declared.__dataclass_params__.frozen:
        raise InputError(
            f"the Config of {owner} is not frozen, so that a saved spec could differ from what was built",
            hint="@dataclass(frozen=True, kw_only=True)",
        )
    check_fields(declared, owner=owner)


def arguments(config: Any) -> dict[str, Any]:
    """The fields of a Config object by name, as they are."""
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}


def nested(field: dataclasses.Field[Any], value: Any) -> Any:
    """A nested part, or several, in canonical form; a module object as its reference; any other value as it is."""
    kind = field.metadata.get("part")
    if kind is not None and field.metadata.get("several"):
        return tuple(REGISTRIES[kind].canonical(each) for each in value)
    if kind is not None and value is not None:
        return REGISTRIES[kind].canonical(value)
    if field.metadata.get("module") and module_objects.is_module(value):
        return module_objects.remember(value)
    return value


def with_nested(config: Any, owner: str) -> Any:
    """A Config object whose nested parts are in their canonical form.

    Args:
        config: A Config object.
        owner: The part in words, for messages.

    Raises:
        InputError: A nested part is wrong; the message names the argument that holds it.
    """
    changed = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        try:
            replaced = nested(field, value)
        except InputError as error:
            where = error.where or f"argument '{field.name}' of {owner}"
            # A string that cannot be read is shown over three lines, which leaves none for the place.
            what = ": ".join(line.strip() for line in error.what.splitlines()[:2])
            raise InputError(what, where=where, hint=error.hint) from error
        if replaced is not value:
            changed[field.name] = replaced
    return dataclasses.replace(config, **changed) if changed else config


def default_fields(config_class: Any) -> Iterator[tuple[dataclasses.Field[Any], Any]]:
    """The fields that have a default, each with its value."""
    for field in dataclasses.fields(config_class):
        if field.default is not MISSING:
            yield field, field.default
        elif field.default_factory is not MISSING:
            yield field, field.default_factory()


def default_arguments(config_class: Any) -> dict[str, Any]:
    """The defaults of a Config as JSON values, nested parts in their canonical form."""
    values = {field.name: nested(field, value) for field, value in default_fields(config_class)}
    return {key: value for key, value in canonical({"name": "defaults", **values}).items() if key != "name"}


def without_defaults(config_class: Any, spec: Spec) -> Spec:
    """A spec with only the arguments that differ from the defaults of its Config, nested parts likewise."""
    defaults = default_arguments(config_class)
    kinds = {field.name: field.metadata.get("part") for field in dataclasses.fields(config_class)}
    short: Spec = {"name": spec["name"]}
    for key, value in spec.items():
        if key == "name" or (key in defaults and _same(defaults[key], value)):
            continue
        kind = kinds.get(key)
        if kind and isinstance(value, dict):
            value = REGISTRIES[kind].without_defaults(value)
        elif kind and isinstance(value, list | tuple):
            value = [REGISTRIES[kind].without_defaults(each) for each in value]
        short[key] = value
    return short


def _same(a: Any, b: Any) -> bool:
    return type(a) is type(b) and a == b
