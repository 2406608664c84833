"""Reads docstrings of parts: their text, the meaning of each argument, and the sources that they name."""

from __future__ import annotations

import inspect
import re
import sys
from typing import Any

_SECTION = re.compile(r"^(Args|Arguments|Attributes|Raises|Returns|Yields|Examples?|Notes?)\b.*:$")
_ENTRY = re.compile(r"^ {2,8}(\w+(?:, \w+)*): (.*)$")
_ARXIV = re.compile(r"arXiv[: ]\s*(\d{4}\.\d{4,5})", re.IGNORECASE)
_ADDRESS = re.compile(r"https?://[^\s)>\]]*[^\s)>\].,;]")
_OUR_CHOICE = re.compile(r"\bour\s+choices?\b", re.IGNORECASE)


def own_docstring(thing: Any) -> str:
    """The docstring that a class or module has itself, without indentation; empty where it has none.

    A dataclass without a docstring gets its signature as one from Python; that is no docstring.
    """
    text = vars(thing).get("__doc__") or ""
    if isinstance(thing, type) and text.startswith(f"{thing.__name__}("):
        return ""
    return inspect.cleandoc(text)


def module_docstring(cls: type) -> str:
    """The docstring of the module that a class is defined in; empty where it has none."""
    module = sys.modules.get(cls.__module__)
    return "" if module is None else own_docstring(module)


def prose(text: str) -> str:
    """A docstring up to its first section such as `Args:`."""
    lines = text.splitlines()
    end = next((i for i, line in enumerate(lines) if _SECTION.match(line)), len(lines))
    return "\n".join(lines[:end]).strip()


def first_sentence(text: str) -> str:
    """The first line of a docstring without its full stop."""
    return text.strip().split("\n")[0].strip().rstrip(".")


def argument_meanings(config_class: type) -> dict[str, str]:
    """The meaning of each argument, from the `Args` of a Config's docstring and of those that it derives from.

    Several names may share one line, as in `drop_rate, drop_path_rate: Dropout of units and of whole blocks.`
    """
    found: dict[str, str] = {}
    for cls in reversed(config_class.__mro__[:-1]):
        found |= _entries(own_docstring(cls))
    return found


def _entries(text: str) -> dict[str, str]:
    found: dict[str, str] = {}
    names: list[str] = []
    inside, depth = False, 0
    for line in text.splitlines():
        if _SECTION.match(line):
            inside, names = line.startswith("Arg"), []
        elif inside:
            entry = _ENTRY.match(line)
            # the first entry sets the indentation; a line that is indented more continues an entry
            if entry and (not names or _indent(line) <= depth):
                depth, names = _indent(line), entry[1].split(", ")
                found |= dict.fromkeys(names, entry[2].strip())
            elif line.strip() and names:
                found |= {name: f"{found[name]} {line.strip()}" for name in names}
    return found


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def sources(*texts: str) -> list[str]:
    """The sources that docstrings name: links, papers of arXiv as links, and "our choice"; each once."""
    found: list[str] = []
    for text in texts:
        found += [f"https://arxiv.org/abs/{number}" for number in _ARXIV.findall(text)]
        found += _ADDRESS.findall(text)
        found += ["our choice"] if _OUR_CHOICE.search(text) else []
    return list(dict.fromkeys(found))
