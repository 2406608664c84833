"""Tables of parts by name. Targets are strings, so that listing imports nothing heavy; no torch here."""

from __future__ import annotations

import dataclasses
import importlib
import warnings
from importlib.metadata import entry_points
from typing import Any

from mome import module_objects
from mome.errors import InputError, did_you_mean
from mome.part_fields import check_config_class
from mome.part_import import import_part
from mome.patterns import Patterns, matching
from mome.spec import is_name

_ALL: list[PartTable] = []


@dataclasses.dataclass(frozen=True)
class _Entry:
    target: str | type
    summary: str
    owner: str
    extra: str | None


class PartTable:
    """Parts of one kind.

    A part is a class with a frozen, keyword-only `Config` dataclass; it is built as `cls(config, **runtime)`.
    The torch-free `__init__` of `package` registers the built-in parts. Other packages register theirs through the
    entry-point group, `name = "package.module:Class"`, or by calling `register`.

    Args:
        kind: The word for a part in messages, as in "router".
        package: The package whose import registers the built-in parts.
        group: The entry-point group.
        contract: "package.module:Class", the base class of every part; None where there is none.
    """

    def __init__(self, kind: str, package: str, group: str, contract: str | None = None) -> None:
        self.kind, self.package, self.group, self.contract = kind, package, group, contract
        self._entries: dict[str, _Entry] = {}
        self._loaded: set[str] = set()
        _ALL.append(self)

    def register(
        self, name: str, target: str | type, *, summary: str = "", owner: str | None = None, extra: str | None = None
    ) -> None:
        """Adds a part.

        Args:
            name: The name that users write.
            target: A class, or "package.module:Class", which is imported on first use.
            summary: One line for lists.
            owner: The package that the part comes from; None takes it from the path of the target or class.
            extra: The extra of `mome` that installs what the part imports.

        Raises:
            InputError: The name is taken (the message names both owners), or the class has no `Config`.
        """
        if name == module_objects.OBJECT:
            raise InputError(f"the name '{name}' is reserved for module objects", hint="choose another name")
        if not is_name(name):
            raise InputError(
                f"{name!r:.60} cannot be written in a config string", hint="use letters, digits and underscores"
            )
        # The parts of the package come first. A taken name is then refused here, where another can be chosen, and not
        # when the package is imported later, which would leave all parts after that name out.
        self._load_builtin()
        if isinstance(target, type):
            self._check_class(name, target)
        if owner is None:
            owner = (target.__module__ if isinstance(target, type) else target).partition(":")[0].partition(".")[0]
        held = self._entries.get(name)
        if held is not None and not _same_target(held.target, target):
            raise InputError(
                f"two packages register the {self.kind} '{name}': {held.owner} ({held.target}) and {owner} ({target})",
                hint="rename one of them, or uninstall one of the packages",
            )
        self._entries[name] = _Entry(target, summary, owner, extra)

    def names(self, pattern: Patterns = "*", exclude: Patterns = ()) -> list[str]:
        """Sorted names that match any wildcard pattern and none of `exclude`. Imports no part.

        Raises:
            InputError: A pattern is empty or opens a bracket that it does not close.
        """
        self._load_builtin()
        self._load_plugins()
        return matching(self._entries, pattern, exclude)

    def summary(self, name: str) -> str:
        """The one-line summary of a part."""
        return self._entry(name).summary

    def origin(self, name: str) -> tuple[str, str | None]:
        """The package that a part comes from, and the extra of `mome` that installs what it imports, or None."""
        entry = self._entry(name)
        return entry.owner, entry.extra

    def part_class(self, name: str) -> Any:
        """The class of a part, imported where it was not yet.

        Raises:
            InputError: The name is unknown, or the part cannot be imported.
        """
        return self._import(name)

    def base_class(self) -> type | None:
        """The base class of every part of this kind, imported where it was not yet; None where there is none."""
        if self.contract is None:
            return None
        path, _, base = self.contract.partition(":")
        return getattr(importlib.import_module(path), base)

    @property
    def plural(self) -> str:
        """The word for parts in messages, as in "routers"."""
        return self.kind + ("es" if self.kind.endswith("s") else "s")

    def _load_builtin(self) -> None:
        if "builtin" not in self._loaded:
            self._loaded.add("builtin")
            try:
                importlib.import_module(self.package)
            except BaseException:
                self._loaded.remove("builtin")  # else the next call would find no part and no error
                raise

    def _load_plugins(self) -> None:
        if "plugins" not in self._loaded:
            self._loaded.add("plugins")
            for point in entry_points(group=self.group):
                owner = point.dist.name if point.dist is not None else point.module
                try:
                    self.register(point.name, f"{point.module}:{point.attr}", owner=owner, summary=f"from {owner}")
                except InputError as error:  # one faulty package must not hide the others
                    warnings.warn(f"a part of the package {owner} is left out: {error.what}", stacklevel=3)

    def _entry(self, name: str) -> _Entry:
        self._load_builtin()
        if name not in self._entries:
            self._load_plugins()
        if name in self._entries:
            return self._entries[name]
        for other in _ALL:
            if other is not self and name in other.names():
                raise InputError(
                    f"'{name}' is registered as {_with_article(other.kind)}, not as {_with_article(self.kind)}",
                    hint=f"{self.plural}: " + ", ".join(self.names()),
                )
        close = did_you_mean(name, self.names())
        elsewhere = "" if close else "; a part of another package is known once that is installed"
        raise InputError(
            f"unknown {self.kind} '{name}'{close}", hint=f"{self.plural}: {', '.join(self.names())}{elsewhere}"
        )

    def _import(self, name: str) -> Any:
        entry = self._entry(name)
        if isinstance(entry.target, type):
            return entry.target
        found = import_part(entry.target, f"{self.kind} '{name}'", package=entry.owner, extra=entry.extra)
        self._check_class(name, found)
        return found

    def _check_class(self, name: str, target: Any) -> None:
        check_config_class(target, f"{self.kind} '{name}'")
        self._check_contract(target)

    def _check_contract(self, target: type) -> None:
        base = self.base_class()
        if base is not None and not issubclass(target, base):
            raise InputError(
                f"the class '{target.__qualname__}' is no {self.kind}: it does not derive from "
                f"{base.__module__}.{base.__qualname__}",
                hint="CONTRIBUTING.md lists the base class of every kind of part",
            )


def _same_target(a: str | type, b: str | type) -> bool:
    """Whether both are one part. A class that is defined again, as in a notebook, replaces its earlier definition."""
    if isinstance(a, type) and isinstance(b, type):
        return (a.__module__, a.__qualname__) == (b.__module__, b.__qualname__)
    return a == b


def _with_article(kind: str) -> str:
    return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"
