"""Wildcard patterns for names of parts, models and labels. Imports no torch."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Sequence

from mome.errors import InputError
from mome.printable import printable

Patterns = str | Sequence[str]


def as_list(patterns: Patterns) -> list[str]:
    """One pattern or several, as a list.

    Raises:
        InputError: A pattern is empty, is no text, or opens a bracket that it does not close.
    """
    found = [patterns] if isinstance(patterns, str) else list(patterns)
    for pattern in found:
        if not isinstance(pattern, str):
            raise InputError(f"a pattern is a text, got {pattern!r:.60}", hint="'sw*', or ['sw*', 'mlp']")
        if not pattern.strip():
            raise InputError("the pattern is empty", hint="'sw*', or '*' for everything")
        # fnmatch would look for the bracket itself, which no name holds
        if "[" in re.sub(r"\[!?\]?[^\]]*\]", "", pattern):
            raise InputError(
                f"the pattern {printable(pattern)!r:.60} opens a bracket that it does not close",
                hint="'[a-m]*' matches names that begin with a to m",
            )
    return found


def matching(names: Iterable[str], include: Patterns = "*", exclude: Patterns = ()) -> list[str]:
    """Sorted names that match any of the patterns `include` and none of `exclude`; capital letters count.

    Args:
        names: The names.
        include: Patterns with the wildcards `*`, `?` and `[…]`. An empty list matches nothing.
        exclude: Patterns of names that are left out.

    Raises:
        InputError: See `as_list`.
    """
    wanted, unwanted = as_list(include), as_list(exclude)
    return sorted(name for name in names if _any(name, wanted) and not _any(name, unwanted))


def _any(name: str, patterns: list[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
