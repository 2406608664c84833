"""`mome data check|list`: what is wrong with a folder of training cases, and which data sets are known."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys

from mome.cli.parser import given_path
from mome.errors import InputError, did_you_mean
from mome.printable import printable

_ACTIONS = ("check", "list")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command."""
    parser.add_argument("action", help="check (read every case) or list (the data sets that are known)")
    parser.add_argument("folder", nargs="?", type=given_path, help="folder of cases, or the file of a manifest")
    parser.add_argument("--layout", help="how it is laid out: cases, nnunet, masks, bids, openkbp or manifest")
    parser.add_argument("--dataset", help="the data set whose numbers its label maps use, as in lits")
    parser.add_argument("--against", type=given_path, help="another folder that must share no patient and no scan")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Runs the command and returns its exit code: 2 if a case cannot be trained on."""
    if args.action not in _ACTIONS:
        close = did_you_mean(args.action, _ACTIONS)
        raise InputError(f"unknown action {args.action!r:.60}{close}", hint="mome data check FOLDER, mome data list")
    if args.action == "list":
        return _list(as_json=args.json)
    if args.folder is None:
        raise InputError("no folder was given", hint="mome data check FOLDER --layout nnunet --dataset lits")
    from rich.console import Console
    from rich.progress import track

    from mome.cli.quiet import quiet_readers
    from mome.data.check import check_cases
    from mome.data.layouts import open_cases
    from mome.labels import load_dataset

    layout = args.layout or (load_dataset(args.dataset).layout if args.dataset else "cases")
    cases = open_cases(args.folder, layout, args.dataset)
    others = {} if args.against is None else {str(args.against): open_cases(args.against, layout, args.dataset)}
    quiet_readers()
    error = Console(stderr=True)
    found = check_cases(
        cases,
        others,
        progress=lambda items: track(
            items, "reading", console=error, transient=True, disable=args.json or not error.is_terminal
        ),
    )
    failed = {finding.case for finding in found if finding.is_error}
    if args.json:
        print(json.dumps({"cases": len(cases), "findings": [dataclasses.asdict(f) for f in found]}, indent=1))
    else:
        for finding in found:
            verb = "error" if finding.is_error else "doubt"
            print(printable(f"{finding.case}  {verb}: {finding.what}"))
            if finding.where:
                print(printable(f"  in: {finding.where}"))
            if finding.hint:
                print(printable(f"  try: {finding.hint}"))
        doubted = {finding.case for finding in found} - failed
        print(f"{len(cases)} cases: {len(failed)} cannot be used, {len(doubted)} with doubts", file=sys.stderr)
    return 2 if failed else 0


def _list(*, as_json: bool) -> int:
    from mome.labels import dataset_names, load_dataset

    sets = {name: load_dataset(name) for name in dataset_names()}
    if as_json:
        shown = {
            name: {
                "name": one.name, "citation": one.citation, "licence": one.licence, "get": one.get,
                "layout": one.layout, "annotated": list(one.annotated),
            }
            for name, one in sets.items()
        }  # fmt: skip
        print(json.dumps(shown, indent=1))
        return 0
    width = max(map(len, sets))
    for name, one in sets.items():
        print(f"{name:<{width}}  {len(one.annotated):>3} structures  {one.layout:<8}  {one.name}")
    return 0
