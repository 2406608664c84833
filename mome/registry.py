"""Registries of parts by name. Targets are strings, so that listing imports nothing heavy; no torch here."""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import importlib
import re
import types
import typing
import warnings
from dataclasses import MISSING
from importlib.metadata import entry_points
from typing import Any

from mome.errors import InputError
from mome.spec import Spec, canonical, dump

_ALL: list[Registry] = []


@dataclasses.dataclass(frozen=True)
class _Entry:
    target: str
    summary: str
    owner: str
    extra: str | None


class Registry:
    """Parts of one kind.

    A part is a class with a frozen, keyword-only `Config` dataclass; it is built as `cls(config, **runtime)`.
    Built-in parts are registered by the torch-free `__init__` of `package`; other packages add theirs through
    the entry-point group, `name = "package.module:Class"`.

    Args:
        kind: What a part is called in messages, as in "router".
        package: Package whose import registers the built-in parts.
        group: Entry-point group.
    """

    def __init__(self, kind: str, package: str, group: str) -> None:
        self.kind, self.package, self.group = kind, package, group
        self._entries: dict[str, _Entry] = {}
        self._deprecated: dict[str, str] = {}
        self._loaded: set[str] = set()
        _ALL.append(self)

    def register(
        self, name: str, target: str, *, summary: str = "", owner: str = "mome", extra: str | None = None
    ) -> None:
        """Adds a part.

        Args:
            name: What users write.
            target: "package.module:Class", imported on first use.
            summary: One line for lists.
            owner: The package it comes from.
            extra: The extra of `mome` that installs what it imports.

        Raises:
            InputError: The name is taken; the message names both owners.
        """
        held = self._entries.get(name)
        if held is not None and held.target != target:
            raise InputError(
                f"two packages register the {self.kind} '{name}': {held.owner} ({held.target}) and {owner} ({target})",
                hint="rename one of them, or uninstall one of the packages",
            )
        self._entries[name] = _Entry(target, summary, owner, extra)

    def register_deprecated(self, old: str, new: str) -> None:
        """An old name that still works, with a warning."""
        self._deprecated[old] = new

    def names(self, pattern: str = "*") -> list[str]:
        """Sorted names that match a wildcard pattern. Imports no part."""
        self._load_builtin()
        self._load_plugins()
        return sorted(name for name in self._entries if fnmatch.fnmatch(name, pattern))

    def summary(self, name: str) -> str:
        """The one line of a part."""
        return self._entry(name).summary

    def resolve(self, spec: str | Spec | Any) -> tuple[type, Any]:
        """The part's class and its Config object.

        Args:
            spec: A string, a dict with a name, or a Config object of one of the parts.

        Raises:
            InputError: Unknown name or argument, wrong type, or a package that is not installed.
        """
        given = self._given(spec)
        name = self._current(given["name"])
        cls = self._import(name)
        arguments = {key: value for key, value in given.items() if key != "name"}
        return cls, self._config(name, cls, arguments)

    def build(self, spec: str | Spec | Any, **runtime: Any) -> Any:
        """Builds a part. `runtime` is what other parts decide, such as `dim`; it is never saved."""
        cls, config = self.resolve(spec)
        return cls(config, **runtime)

    def canonical(self, spec: str | Spec | Any) -> Spec:
        """The validated dict with every default filled in, `name` first."""
        given = self._given(spec)
        _, config = self.resolve(given)
        return canonical({"name": self._current(given["name"]), **_arguments(config)})

    def defaults(self, spec: Spec) -> dict[str, Any]:
        """The part's default arguments as JSON values."""
        cls = self._import(self._current(spec["name"]))
        values = {}
        for field in dataclasses.fields(cls.Config):
            if field.default is not MISSING:
                values[field.name] = field.default
            elif field.default_factory is not MISSING:
                values[field.name] = field.default_factory()
        return {k: v for k, v in canonical({"name": "defaults", **values}).items() if k != "name"}

    # -- loading ---------------------------------------------------------------------------------------------

    def _load_builtin(self) -> None:
        if "builtin" not in self._loaded:
            self._loaded.add("builtin")
            importlib.import_module(self.package)

    def _load_plugins(self) -> None:
        if "plugins" not in self._loaded:
            self._loaded.add("plugins")
            for point in entry_points(group=self.group):
                owner = point.dist.name if point.dist is not None else point.value.split(":")[0]
                self.register(point.name, point.value, owner=owner, summary=f"from {owner}")

    def _current(self, name: str) -> str:
        self._load_builtin()
        if name in self._deprecated and name not in self._entries:
            new = self._deprecated[name]
            warnings.warn(f"{self.kind} '{name}' is now called '{new}'", DeprecationWarning, stacklevel=3)
            return new
        return name

    def _entry(self, name: str) -> _Entry:
        self._load_builtin()
        if name not in self._entries:
            self._load_plugins()
        if name in self._entries:
            return self._entries[name]
        for other in _ALL:
            if other is not self and name in other.names():
                raise InputError(
                    f"'{name}' is registered as a {other.kind}, not as a {self.kind}",
                    hint=f"{self.kind} has: " + ", ".join(self.names()),
                )
        close = difflib.get_close_matches(name, self.names(), n=1)
        raise InputError(
            f"unknown {self.kind} '{name}'" + (f", did you mean '{close[0]}'?" if close else ""),
            hint=f"{self.kind} has: " + ", ".join(self.names()),
        )

    def _import(self, name: str) -> Any:
        entry = self._entry(name)
        module, _, attribute = entry.target.partition(":")
        try:
            return getattr(importlib.import_module(module), attribute)
        except ImportError as error:
            missing = getattr(error, "name", None) or str(error)
            raise InputError(
                f"{self.kind} '{name}' needs {missing}, which is not installed",
                hint=f"pip install 'mome[{entry.extra}]'" if entry.extra else f"pip install {missing}",
            ) from error

    # -- arguments ------------------------------------------------------------------------------------------

    def _given(self, spec: Any) -> Spec:
        if dataclasses.is_dataclass(spec) and not isinstance(spec, type):
            return canonical({"name": self._name_of(type(spec)), **_arguments(spec)})
        return canonical(spec)

    def _name_of(self, config_class: type) -> str:
        """The one part whose Config is exactly this class; a subclass of a Config belongs to another part."""
        found = []
        for name in self.names():
            try:
                part = self._import(name)
            except InputError:  # a part whose package is missing made no Config object
                continue
            if getattr(part, "Config", None) is config_class:
                found.append(name)
        if len(found) == 1:
            return found[0]
        shown = config_class.__qualname__
        if not found:
            raise InputError(
                f"{shown} is not the Config of a registered {self.kind}",
                hint=f"{self.kind} has: {', '.join(self.names())}",
            )
        raise InputError(
            f"{shown} is the Config of several: {', '.join(found)}", hint=f"name one, as in {{'name': '{found[0]}'}}"
        )

    def _config(self, name: str, cls: Any, arguments: dict[str, Any]) -> Any:
        hints = typing.get_type_hints(cls.Config)
        known = [field.name for field in dataclasses.fields(cls.Config)]
        values = {}
        for key, value in arguments.items():
            if key not in known:
                close = difflib.get_close_matches(key, known, n=1)
                raise InputError(
                    f"{self.kind} '{name}' has no argument '{key}'"
                    + (f", did you mean '{close[0]}'?" if close else ""),
                    hint="arguments: " + (", ".join(known) or "none"),
                )
            values[key] = _typed(value, hints[key], f"{self.kind} '{name}', argument '{key}'")
        required = [
            f.name
            for f in dataclasses.fields(cls.Config)
            if f.default is MISSING and f.default_factory is MISSING and f.name not in values
        ]
        if required:
            raise InputError(
                f"{self.kind} '{name}' needs the argument '{required[0]}'", hint=f"{name}({required[0]}=…)"
            )
        return cls.Config(**values)


def _arguments(config: Any) -> dict[str, Any]:
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}


def at_least(least: float, part: str, **values: float) -> None:
    """Checks arguments of a part.

    Raises:
        InputError: A value is below `least`.
    """
    for key, value in values.items():
        if not value >= least:
            raise InputError(f"{key} of {part} is at least {least}, got {value}")


def _typed(value: Any, hint: Any, where: str) -> Any:
    """`value` as the field's type: whole floats are not integers, integers are floats, lists become tuples."""
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        for option in options:
            try:
                return _typed(value, option, where)
            except InputError:
                continue
    elif origin in (tuple, list) and isinstance(value, list | tuple):
        items = [_typed(item, options[0], where) for item in value] if options else list(value)
        return tuple(items) if origin is tuple else items
    elif (origin is dict or hint is dict) and isinstance(value, dict):
        return value
    elif hint is type(None) and value is None:
        return None
    elif hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    elif hint in (int, str, bool) and type(value) is hint:
        return value
    wanted = re.sub(r"<class '(\w+)'>", r"\1", str(hint))
    written = dump(value) if isinstance(value, dict) and isinstance(value.get("name"), str) else repr(value)
    raise InputError(f"{where} is {wanted}, got {written}")


ENCODERS = Registry("encoder", "mome.encoders", "mome.encoders")
TEXT_ENCODERS = Registry("text encoder", "mome.encoders.text", "mome.text_encoders")
EXPERTS = Registry("expert", "mome.experts", "mome.experts")
ROUTERS = Registry("router", "mome.routers", "mome.routers")
FUSIONS = Registry("fusion", "mome.routers.fusion", "mome.fusions")
HEADS = Registry("head", "mome.layers.heads", "mome.heads")
LOSSES = Registry("loss", "mome.losses", "mome.losses")

REGISTRIES = {
    "encoders": ENCODERS,
    "text_encoders": TEXT_ENCODERS,
    "experts": EXPERTS,
    "routers": ROUTERS,
    "fusions": FUSIONS,
    "heads": HEADS,
    "losses": LOSSES,
}
