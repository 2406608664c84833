"""Reads and writes config strings: `swiglu(n=8)` stands for `{"name": "swiglu", "n": 8}`.

```
spec   := name [ "(" key "=" value {"," key "=" value} ")" ]
name   := ident { "." ident }
value  := number | "str" | True/False/None (true/false/null) | [values] | (values) | {str: value} | spec
```
A string is parsed to a syntax tree, of which only a few types of node are accepted; nothing is evaluated. This module
imports no torch.
"""

from __future__ import annotations

import ast
import json
import math
import reprlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from mome.errors import InputError

# This number rises when arguments of a part are renamed; `migrate` brings older specs up to it.
SPEC_VERSION = 2

Spec = dict[str, Any]
_WORDS = {"true": True, "false": False, "null": None}


class SpecError(InputError):
    """A config string does not follow the grammar; the message shows the place with a caret."""


def parse(text: str) -> Spec:
    """Parses a config string to its dict, in which `name` comes first.

    Raises:
        SpecError: The text is not a spec.
    """
    if len(text) > 10_000:
        raise SpecError(f"a config string of {len(text)} characters is too long", hint="use a dict")
    if not text.strip():
        raise SpecError("a config string is empty", hint="begin with a name, as in mlp(n=4)")
    try:
        with warnings.catch_warnings(action="ignore"):  # Python warns of odd escapes and calls in the text
            tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        column = (getattr(error, "offset", None) or 1) - 1
        raise _at(text, column, f"not a config string: {getattr(error, 'msg', None) or error}") from None
    try:
        value = _value(tree, text.strip())
    except RecursionError:
        raise SpecError("a config string nests too deeply", hint="use a dict") from None
    if not isinstance(value, dict) or "name" not in value:
        raise _at(text, 0, "a config string begins with a name")
    return value


def _value(node: ast.expr, text: str) -> Any:
    if isinstance(node, ast.Constant):
        return _constant(node, text)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        number = _value(node.operand, text)
        if isinstance(number, bool) or not isinstance(number, int | float):
            raise _at(text, node.col_offset, "a sign stands before a number only")
        return -number if isinstance(node.op, ast.USub) else number
    if isinstance(node, ast.List | ast.Tuple):
        return [_value(item, text) for item in node.elts]
    if isinstance(node, ast.Dict):
        return _mapping(node, text)
    if isinstance(node, ast.Name) and node.id in _WORDS:
        return _WORDS[node.id]
    if isinstance(node, ast.Name | ast.Attribute):
        return {"name": _name(node, text)}
    if isinstance(node, ast.Call):
        return _call(node, text)
    what = "only names, numbers, strings, lists and dicts may stand here"
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Sub) and isinstance(node.left, ast.Name):
        what = "a name is written with _, not with -"
    raise _at(text, node.col_offset, what)


def _constant(node: ast.Constant, text: str) -> Any:
    value = node.value
    if isinstance(value, float) and not math.isfinite(value):
        raise _at(text, node.col_offset, "a number is too large")
    if isinstance(value, int) and value >= 2**63:
        raise _at(text, node.col_offset, "a number has more than 64 bits")
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise _at(text, node.col_offset, f"a {type(value).__name__} cannot stand here")


def _mapping(node: ast.Dict, text: str) -> dict[str, Any]:
    result = {}
    for key, item in zip(node.keys, node.values, strict=True):
        if not isinstance(key, ast.Constant) or not isinstance(key.value, str):
            raise _at(text, node.col_offset, "keys of a dict are strings, as in {'a': 1}")
        result[key.value] = _value(item, text)
    return result


def _call(node: ast.Call, text: str) -> Spec:
    if not isinstance(node.func, ast.Name | ast.Attribute):
        raise _at(text, node.col_offset, "arguments follow a name")
    spec: Spec = {"name": _name(node.func, text)}
    if node.args:
        raise _at(text, node.args[0].col_offset, "arguments need a name, write key=value")
    for keyword in node.keywords:
        if keyword.arg is None:
            raise _at(text, keyword.value.col_offset, "** cannot stand here, write key=value")
        if keyword.arg in spec:
            raise _at(text, keyword.col_offset, f"argument '{keyword.arg}' is given twice or reserved")
        spec[keyword.arg] = _value(keyword.value, text)
    return spec


def _name(node: ast.expr, text: str) -> str:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{_name(node.value, text)}.{node.attr}"
    raise _at(text, node.col_offset, "a name is written a or a.b")


def _at(text: str, column: int, what: str) -> SpecError:
    column = max(0, min(column, len(text)))
    # Only the part around the column of a long string is shown.
    start = max(0, column - 40)
    shown = "".join(c if c.isprintable() else " " for c in text[start : start + 80])
    return SpecError(f"{what}, at column {column + 1}\n  {shown}\n  {' ' * (column - start)}^")


def canonical(spec: str | Spec) -> Spec:
    """Turns a string or a dict into a dict of JSON values, `name` first. `Registry.canonical` also takes objects.

    Raises:
        SpecError: It is none of these, or holds what JSON cannot.
    """
    if isinstance(spec, str):
        return parse(spec)
    if not isinstance(spec, dict) or not isinstance(spec.get("name"), str):
        raise SpecError(
            f"a part is named by a string or a dict with a name, got {brief(spec, 60)}", hint="experts='mlp(n=4)'"
        )
    try:
        return json.loads(json.dumps({"name": spec["name"], **spec}, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise SpecError(f"the spec of '{spec['name']:.60}' holds what JSON cannot: {error!s:.120}") from None
    except RecursionError:
        raise SpecError(f"the spec of '{spec['name']:.60}' nests too deeply") from None


def dump(spec: Spec, registry: Any = None) -> str:
    """Writes a dict as a config string. With a registry, arguments that equal the part's defaults are left out."""
    return write(spec if registry is None else registry.without_defaults(spec))


def write(value: Any) -> str:
    """Returns a JSON value as the grammar spells it; a dict with a name becomes `name(key=value)`."""
    return "".join(_pieces(value))


def brief(value: Any, limit: int = 200) -> str:
    """Returns the beginning of `write(value)` for a message: one line of at most `limit` characters.

    Only this beginning is computed, so that a value that repeats one part millions of times costs nothing.
    """
    text = ""
    for piece in _pieces(value):
        text += piece
        if len(text) > limit:
            return text[: limit - 1] + "…"
    return text


def _pieces(value: Any) -> Iterator[str]:
    """Yields the text of `write(value)` in pieces."""
    if isinstance(value, dict):
        name = value.get("name")
        is_spec = isinstance(name, str) and is_name(name) and all(_is_word(key) for key in value)
        arguments = [(key, item) for key, item in value.items() if not (is_spec and key == "name")]
        if is_spec:
            yield str(name)
        if arguments or not is_spec:
            yield "(" if is_spec else "{"
            for i, (key, item) in enumerate(arguments):
                yield ", " if i else ""
                yield f"{key}=" if is_spec else f"{repr(key) if isinstance(key, str) else reprlib.repr(key)}: "
                yield from _pieces(item)
            yield ")" if is_spec else "}"
    elif isinstance(value, list | tuple):
        yield "["
        for i, item in enumerate(value):
            yield ", " if i else ""
            yield from _pieces(item)
        yield "]"
    elif isinstance(value, str | int | float) or value is None:
        yield repr(value)
    else:
        yield reprlib.repr(value)


def _is_word(text: Any) -> bool:
    import keyword

    return isinstance(text, str) and text.isidentifier() and not keyword.iskeyword(text) and text not in _WORDS


def is_name(text: str) -> bool:
    """Whether a config string can begin with this name."""
    return all(_is_word(part) for part in text.split("."))


# Maps a spec version to the function that brings a spec to the next version. Models of version 1 had other tensors.
_MIGRATIONS: dict[int, Callable[[Spec], Spec]] = {}


def migrate(spec: Spec, version: int) -> Spec:
    """Brings a stored spec from `version` to `SPEC_VERSION`.

    Raises:
        SpecError: The spec comes from a newer version of the package.
    """
    if version > SPEC_VERSION:
        raise SpecError(
            f"this model was saved with spec version {version}, this package reads up to {SPEC_VERSION}",
            hint="pip install --upgrade mome",
        )
    for step in range(version, SPEC_VERSION):
        if step not in _MIGRATIONS:
            raise SpecError(
                f"this model was saved with spec version {version}, whose tensors have other names",
                hint="train it again, or load it with the version of mome that saved it",
            )
        spec = _MIGRATIONS[step](spec)
    return spec
