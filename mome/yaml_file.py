"""Reads YAML into plain values: dicts with text keys, lists, texts, finite numbers, booleans and None."""

from __future__ import annotations

import math
import re
from typing import Any

import yaml

from mome.errors import InputError

# A value is refused if it holds more than this many nodes, each alias counted as what it stands for: nested aliases
# multiply, so that a file of a few lines can stand for billions of nodes.
_MOST_NODES = 20_000
_DEEPEST = 50
LONGEST = 200_000


class _Loader(yaml.SafeLoader):
    """YAML 1.1 with three rules of YAML 1.2.

    Only true and false are booleans: YAML 1.1 would read `mixed_precision: no` as one. Numbers are decimal: it would
    read 010 as 8, and 1:30 as 90. A number with an exponent is a float without a decimal point, too: it would read
    `learning_rate: 1e-3` as a string.
    """


_BOOL, _INT, _FLOAT = (f"tag:yaml.org,2002:{kind}" for kind in ("bool", "int", "float"))
_Loader.yaml_implicit_resolvers = {
    letter: [(tag, pattern) for tag, pattern in resolvers if tag not in (_BOOL, _INT, _FLOAT)]
    for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_FLOATS = r"""^[-+]?(?:
    [0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?
    | \.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?
    | [0-9][0-9_]*[eE][-+]?[0-9]+
    | \.(?:inf|Inf|INF|nan|NaN|NAN)
)$"""
_Loader.add_implicit_resolver(_BOOL, re.compile("^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver(_FLOAT, re.compile(_FLOATS, re.VERBOSE), list("-+.0123456789"))
_Loader.add_implicit_resolver(_INT, re.compile("^[-+]?(?:0|[1-9][0-9_]*)$"), list("-+0123456789"))


class NotYaml(InputError):
    """The text does not follow the grammar of YAML."""


def read_yaml(text: str, where: str | None = None) -> Any:
    """Returns the value of a YAML text. Aliases become copies.

    Args:
        text: The text.
        where: The file, named in errors.

    Raises:
        NotYaml: The text is not YAML.
        InputError: It is too long, nests too deeply, its aliases stand for too many values, a mapping has a key twice,
            or it holds what is neither text, finite number, boolean nor null.
    """
    if len(text) > LONGEST:
        raise InputError(f"a configuration of {len(text):,} characters is too long", where=where)
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _count_nodes(node, {}, where)
        _check_keys(node, where)
        value = loader.construct_document(node)
    except InputError:
        raise
    except RecursionError as error:
        raise _too_deep(where) from error
    except yaml.YAMLError as error:
        raise NotYaml(f"the configuration is not valid YAML: {_fault(error)}", where=where) from error
    except Exception as error:  # PyYAML's constructors raise errors of many types, as for `!!int x` or 2024-99-99
        raise InputError(f"the configuration has a value that YAML cannot read: {error!s:.120}", where=where) from error
    finally:
        if loader is not None:
            loader.dispose()
    return _plain(value, where)


def _count_nodes(node: yaml.Node, counted: dict[int, int], where: str | None, depth: int = 0) -> int:
    """Returns the number of nodes that `node` stands for, each alias counted in full.

    Args:
        node: A node of the graph that YAML's composer makes; aliases share their node.
        counted: id of a node → its number; 0 marks a node that is being counted.
        where: The file, named in errors.
        depth: Number of nodes around this one.

    Raises:
        InputError: There are too many nodes, they nest too deeply, or an alias stands inside what it names.
    """
    if depth > _DEEPEST:
        raise _too_deep(where)
    if id(node) in counted:
        if not counted[id(node)]:
            raise InputError("the configuration has an alias inside its own anchor", where=where)
        return counted[id(node)]
    counted[id(node)] = 0
    children: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        children = [child for pair in node.value for child in pair]
    elif isinstance(node, yaml.SequenceNode):
        children = node.value
    total = 1 + sum(_count_nodes(child, counted, where, depth + 1) for child in children)
    if total > _MOST_NODES:
        raise InputError(
            f"the configuration stands for more than {_MOST_NODES:,} values",
            where=where,
            hint="write out its aliases (*name), which multiply when they are nested",
        )
    counted[id(node)] = total
    return total


def _check_keys(node: yaml.Node, where: str | None) -> None:
    """Checks the keys of a graph of nodes, which `_count_nodes` has found to be small; PyYAML keeps the last of equals.

    Raises:
        InputError: A mapping has a key twice.
    """
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise InputError(
                        f"the configuration has the key {key.value!r:.60} twice in one mapping",
                        where=where,
                        hint="keep one of them: the values of the other would be lost",
                    )
                seen.add(key.value)
            _check_keys(value, where)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _check_keys(item, where)


def _plain(value: Any, where: str | None) -> Any:
    """Returns a copy of a value without shared parts.

    Raises:
        InputError: A value is of a type that JSON does not have, a number is not finite, or a key is no text.
    """
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise InputError(f"the configuration has the key {key!r:.60}, and keys are texts", where=where)
        return {_plain(key, where): _plain(item, where) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item, where) for item in value]
    if isinstance(value, str):
        if "\0" in value:
            raise InputError("the configuration has a text with a NUL character", where=where)
        return value
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"the configuration has the number {value}, and numbers are finite", where=where)
    if isinstance(value, int) and abs(value) >= 2**63:
        raise InputError("the configuration has a number of more than 64 bits", where=where)
    if value is None or isinstance(value, bool | int | float):
        return value
    raise InputError(
        f"the configuration has a {type(value).__name__}, which is neither text, number, list nor mapping",
        where=where,
        hint="put the value in quotes",
    )


def _fault(error: yaml.YAMLError) -> str:
    """Returns what is wrong, and the line and the column where the file has one; PyYAML spreads them over lines."""
    problem, mark = getattr(error, "problem", None), getattr(error, "problem_mark", None)
    if problem is None or mark is None:
        return (str(error).splitlines() or [""])[0][:160]
    return f"{problem!s:.160}, line {mark.line + 1}, column {mark.column + 1}"


def _too_deep(where: str | None) -> InputError:
    return InputError(f"the configuration nests deeper than {_DEEPEST} levels", where=where)
