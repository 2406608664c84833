"""`mome list`: lists presets, checkpoints, parts and labels. Imports no torch."""

from __future__ import annotations

import argparse
import fnmatch
import json
from typing import Any

from mome.errors import InputError, did_you_mean
from mome.printable import printable
from mome.registry import REGISTRIES
from mome.volumes.writers import WRITERS

_PARTS = {**REGISTRIES, "writers": WRITERS}
KINDS = ("models", *_PARTS, "labels")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command."""
    parser.add_argument("words", nargs="*", help=f"a kind ({', '.join(KINDS)}) and/or a pattern such as 'sw*'")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Runs the command and returns its exit code.

    Raises:
        InputError: Several patterns, or nothing that matches.
    """
    kinds = [word for word in args.words if word in KINDS]
    patterns = [word for word in args.words if word not in KINDS]
    if len(patterns) > 1:
        raise InputError(f"one pattern at a time, got {' '.join(patterns)}", hint="mome list experts 'sw*'")
    if patterns and not patterns[0].strip():
        raise InputError("the pattern is empty", hint="mome list experts 'sw*'; mome list shows everything")
    pattern = patterns[0] if patterns else "*"
    shown = kinds or [kind for kind in KINDS if kind != "labels" or patterns]
    found = {kind: _rows(kind, pattern) for kind in shown}
    if not any(found.values()) and pattern.isidentifier():  # a word without wildcards also matches inside names
        found = {kind: _rows(kind, f"*{pattern}*") for kind in shown}
    if args.json:
        print(json.dumps(found, indent=1))
        return 0
    found = {kind: rows for kind, rows in found.items() if rows}
    if not found:
        kind = did_you_mean(pattern, KINDS)
        raise InputError(
            f"nothing is called {pattern!r}{kind or did_you_mean(pattern, _all_names(shown))}",
            hint="mome list shows everything; the kinds are " + ", ".join(KINDS),
        )
    for kind, rows in found.items():
        print(kind.replace("_", " "))
        width = max(len(row["name"]) for row in rows)
        for row in rows:
            size = f"{row['parameters'] / 1e6:6.1f} M  " if "parameters" in row else ""
            print(printable(f"  {row['name']:<{width}}  {size}{row['summary']}"))
    return 0


def _all_names(kinds: list[str]) -> list[str]:
    return [row["name"] for kind in kinds for row in _rows(kind, "*")]


def _rows(kind: str, pattern: str) -> list[dict[str, Any]]:
    """What is registered of one kind: a dict of name, summary and, for presets and labels, more."""
    if kind == "labels":
        from mome.labels import load_table

        return [
            {"name": label.name, "id": label.id, "summary": ", ".join(label.synonyms[:3])}
            for label in load_table()
            if fnmatch.fnmatch(label.name, pattern)
        ]
    if kind == "models":
        from mome.presets import preset_sizes
        from mome.zoo import list_models

        sizes = preset_sizes()
        rows = [
            {"name": name, "parameters": sizes[name]["parameters"], "summary": sizes[name]["summary"]}
            for name in list_models(pattern)
        ]
        bundled = [
            {"name": name, "summary": "bundled checkpoint; load it with MoME.from_pretrained"}
            for name in list_models(pattern, pretrained=True)
        ]
        return rows + bundled
    registry = _PARTS[kind]
    return [{"name": name, "summary": registry.summary(name)} for name in registry.names(pattern)]
