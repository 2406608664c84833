"""`mome list`: lists presets, checkpoints, parts and labels. Imports no torch."""

from __future__ import annotations

import argparse
import json
from typing import Any

from mome.errors import InputError, did_you_mean
from mome.patterns import as_list, matching
from mome.postprocess import POSTPROCESSORS
from mome.presets import PRESETS, preset_sizes
from mome.pretrained import PRETRAINED, matching_models, pretrained_models, tags
from mome.printable import printable
from mome.registry import REGISTRIES
from mome.volumes.writers import WRITERS

_PARTS = {**REGISTRIES, "writers": WRITERS, "postprocessors": POSTPROCESSORS}
KINDS = ("models", *_PARTS, "labels")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command."""
    parser.add_argument("words", nargs="*", help=f"kinds ({', '.join(KINDS)}) and/or patterns such as 'sw*'")
    parser.add_argument(
        "--exclude", metavar="PATTERN", action="append", default=[], help="leave out names that match; may be repeated"
    )
    parser.add_argument("--pretrained", action="store_true", help="only models whose weights are there, by their tags")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Runs the command and returns its exit code.

    Raises:
        InputError: A pattern is empty, opens a bracket that it does not close, or matches nothing.
    """
    kinds = [word for word in args.words if word in KINDS]
    patterns = as_list([word for word in args.words if word not in KINDS])
    as_list(args.exclude)
    if args.pretrained and kinds not in ([], ["models"]):
        raise InputError("--pretrained concerns models", hint="mome list models --pretrained")
    shown = kinds or [kind for kind in KINDS if kind != "labels" or patterns]
    every = {kind: _rows(kind) for kind in (["models"] if args.pretrained else shown)}
    if args.pretrained:
        every = {"models": [row for row in every["models"] if "tag" in row]}
    found: dict[str, list[dict[str, Any]]] = {kind: [] for kind in every}
    if not kinds:  # "expert" is a slip for "experts" rather than a part of the name expert_choice
        _refuse_singulars(patterns)
    for pattern in patterns or ["*"]:
        hits = {kind: _matching(rows, pattern, args.exclude) for kind, rows in every.items()}
        if not any(hits.values()) and pattern.isidentifier():  # a word without wildcards also matches inside names
            hits = {kind: _matching(rows, f"*{pattern}*", args.exclude) for kind, rows in every.items()}
        if not any(hits.values()):
            if any(_matching(rows, pattern, []) for rows in every.values()):
                raise InputError(
                    f"nothing is called {pattern!r} apart from what --exclude leaves out",
                    hint="leave out the pattern, or --exclude",
                )
            names = [row["name"] for rows in every.values() for row in rows]
            raise InputError(
                f"nothing is called {pattern!r}{did_you_mean(pattern, KINDS) or did_you_mean(pattern, names)}",
                hint="mome list shows everything; the kinds are " + ", ".join(KINDS),
            )
        for kind, rows in hits.items():
            found[kind] += [row for row in rows if row not in found[kind]]
    if args.json:
        print(json.dumps(found, indent=1))
        return 0
    _print({kind: rows for kind, rows in found.items() if rows})
    return 0


def _refuse_singulars(patterns: list[str]) -> None:
    singulars = {"model": "models", "preset": "models", "presets": "models"}
    singulars |= {registry.kind.replace(" ", "_"): kind for kind, registry in _PARTS.items()}
    for pattern in patterns:
        if pattern in singulars:
            raise InputError(
                f"nothing is called {pattern!r}, did you mean '{singulars[pattern]}'?",
                hint=f"mome list {singulars[pattern]}; mome list '*{pattern}*' looks inside names",
            )


def _print(found: dict[str, list[dict[str, Any]]]) -> None:
    """Prints the rows of every kind under its name."""
    for kind, rows in found.items():
        print(kind.replace("_", " "))
        width = max(len(row["name"]) for row in rows)
        for row in rows:
            size = f"{row['parameters'] / 1e6:6.1f} M  " if "parameters" in row else ""
            print(printable(f"  {row['name']:<{width}}  {size}{row['summary']}"))


def _matching(rows: list[dict[str, Any]], pattern: str, exclude: list[str]) -> list[dict[str, Any]]:
    """The rows whose names match; in names of models - and _ are the same."""
    if any("preset" in row for row in rows):
        names = set(matching_models([row["name"] for row in rows], pattern, exclude))
    else:
        names = set(matching([row["name"] for row in rows], pattern, exclude))
    return [row for row in rows if row["name"] in names]


def _rows(kind: str) -> list[dict[str, Any]]:
    """What is registered of one kind: a dict of name, summary and, for models and labels, more."""
    if kind == "labels":
        from mome.labels import load_table

        return [
            {"name": label.name, "id": label.id, "summary": ", ".join(label.synonyms[:3])} for label in load_table()
        ]
    if kind == "models":
        return [*map(_preset_row, sorted(PRESETS)), *map(_pretrained_row, pretrained_models())]
    registry = _PARTS[kind]
    return [{"name": name, "summary": registry.summary(name)} for name in registry.names()]


def _preset_row(name: str) -> dict[str, Any]:
    entry = preset_sizes()[name]
    numbers = {key: entry[key] for key in ("parameters", "active_parameters", "flops", "licence")}
    return {"name": name, "preset": name, **numbers, "weights": tags(name), "summary": entry["summary"]}


def _pretrained_row(name: str) -> dict[str, Any]:
    preset_name, tag = name.split(".")
    weights = PRETRAINED[preset_name][tag]
    return {
        "name": name,
        "preset": preset_name,
        "tag": tag,
        "licence": weights.licence,
        "weights": weights.place,
        "summary": f"weights: {weights.summary}",
    }
