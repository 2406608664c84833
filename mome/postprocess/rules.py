"""Which post-processors run on which structure: as a user asks, a checkpoint says, or the rules of this package say.

A rule is a config string, such as `minimum_size(ml=0.5)`. Rules of a structure run in their order.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from mome.errors import InputError, did_you_mean
from mome.labels import load_table
from mome.postprocess import POSTPROCESSORS
from mome.postprocess.base import PostProcessor
from mome.spec import dump, parse

NONE, RULES = "none", "rules"
ALL = "*"
"""Stands for every structure in a table of rules."""

_MOST_STRUCTURES, _MOST_RULES, _LONGEST_RULE = 2000, 10, 300
_HINT = "{'spinal_cord': ['minimum_size(ml=0.5)']}"


def checked_rules(value: Any) -> dict[str, list[str]]:
    """Returns a table of rules as it is stored: structure → config strings. The table may come from anybody.

    Raises:
        InputError: It is no such table, or names an unknown post-processor or a wrong argument.
    """
    if not isinstance(value, Mapping) or len(value) > _MOST_STRUCTURES:
        raise InputError("rules of post-processing are a table of structures", hint=_HINT)
    checked: dict[str, list[str]] = {}
    for name, rules in value.items():
        if not isinstance(name, str) or not name.strip() or len(name) > _LONGEST_RULE:
            raise InputError(f"rules of post-processing belong to a structure, got {name!r:.60}", hint=_HINT)
        if not isinstance(rules, list | tuple) or len(rules) > _MOST_RULES:
            raise InputError(
                f"the rules of {name!r:.60} are a list of at most {_MOST_RULES} config strings", hint=_HINT
            )
        checked[name] = [dump(_parsed(rule)) for rule in rules]
    return checked


@lru_cache(maxsize=1)
def default_rules() -> dict[str, list[str]]:
    """Returns the rules of this package, `rules.yaml`; the file says how they were chosen."""
    text = (Path(__file__).parent / "rules.yaml").read_text(encoding="utf-8")
    return checked_rules(yaml.safe_load(text)["rules"])


def asked_rules(
    asked: str | Sequence[str] | None, of_checkpoint: Mapping[str, Sequence[str]] | None
) -> dict[str, list[str]]:
    """Returns the table of rules that a request means.

    Args:
        asked: None for the checkpoint's rules; `none`; `rules` for the checkpoint's rules, or those of this package
            where it has none; a rule for every structure; or `structure=rule`. Several are given as a list.
        of_checkpoint: The rules of the checkpoint's processor.

    Raises:
        InputError: A rule cannot be read, `none` stands beside others, or a structure is unknown.
    """
    texts = [asked] if isinstance(asked, str) else list(asked or [])
    if not texts:
        return checked_rules(of_checkpoint or {})
    if NONE in texts:
        if len(texts) > 1:
            raise InputError("'none' switches post-processing off, and rules are given too", hint="give one of them")
        return {}
    table: dict[str, list[str]] = {}
    for text in texts:
        if not isinstance(text, str):
            raise InputError(f"a rule of post-processing is a text, got {text!r:.60}", hint="largest_component")
        if text.strip() == RULES:
            for name, rules in (of_checkpoint or default_rules()).items():
                table.setdefault(name, []).extend(rules)
            continue
        named = re.match(r"^\s*([^(=]+?)\s*=\s*(.+)$", text, flags=re.DOTALL)
        for structure in _structures(named[1]) if named else (ALL,):
            table.setdefault(structure, []).append(named[2] if named else text)
    return checked_rules(table)


def are_asked_by_name(asked: str | Sequence[str] | None) -> bool:
    """Says whether a request names a rule itself, and not only a checkpoint's rules or those of this package."""
    return any(text not in (RULES, NONE) for text in ([asked] if isinstance(asked, str) else asked or ()))


def build_rules(rules: Sequence[str]) -> list[tuple[str, PostProcessor]]:
    """Returns the post-processors of one structure with their config strings."""
    return [(rule, POSTPROCESSORS.build(rule)) for rule in rules]


def _structures(text: str) -> tuple[str, ...]:
    """Returns the labels that a name, a synonym, a pair or a group stands for; any other text is free text."""
    return load_table().names_of(text) or (text.strip(),)


def _parsed(rule: Any) -> dict[str, Any]:
    """Returns a rule as a canonical dict, without the arguments that have their default.

    Raises:
        InputError: It is no config string of a post-processor.
    """
    if not isinstance(rule, str) or len(rule) > _LONGEST_RULE:
        raise InputError(f"a rule of post-processing is a short config string, got {rule!r:.60}", hint=_HINT)
    spec = parse(rule)
    if spec["name"] not in POSTPROCESSORS.names():
        choices = [*POSTPROCESSORS.names(), RULES, NONE]
        raise InputError(
            f"unknown postprocessor {spec['name']!r:.60}{did_you_mean(spec['name'], choices)}",
            hint="postprocessors: " + ", ".join(POSTPROCESSORS.names()),
        )
    POSTPROCESSORS.build(spec)  # some arguments are checked by the part alone
    return POSTPROCESSORS.without_defaults(POSTPROCESSORS.canonical(spec))
