"""`mome data check|prepare|list`: folders of training cases, their training configurations, and known data sets."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys

from mome.cli.parser import given_path, output_folder
from mome.errors import InputError, did_you_mean
from mome.memory import parse_bytes
from mome.printable import printable

_MOST_NOTES = 3  # that are printed; most say the same of many cases
_ACTIONS = ("check", "prepare", "list")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command."""
    parser.add_argument("action", help="check (read every case), prepare (a training), or list (known data sets)")
    parser.add_argument("folder", nargs="?", type=given_path, help="folder of cases, or the file of a manifest")
    parser.add_argument("--layout", help="how it is laid out: cases, nnunet, masks, bids, openkbp or manifest")
    parser.add_argument("--dataset", help="whose numbers its label maps use: lits, or a YAML file of yours")
    parser.add_argument(
        "--own",
        action="append",
        default=[],
        metavar="NAME",
        help="a structure that the folder names and the class table does not have, as in thymus",
    )
    parser.add_argument("--against", type=given_path, help="another folder that must share no patient and no scan")
    parser.add_argument("-o", "--out", type=output_folder, help="prepare: the folder for run.yaml and the caches")
    parser.add_argument("-p", "--prompt", action="append", default=[], help="prepare: train this structure only")
    parser.add_argument("--preset", default="mome_ct_tiny", help="prepare: the model")
    parser.add_argument("--memory", default="8GB", help="prepare: memory of the device that will train")
    parser.add_argument("--held-out", type=float, default=0.2, help="prepare: share of patients for validation")
    parser.add_argument("--cache-format", default="plain", help="prepare: plain, or blosc2 (compressed)")
    parser.add_argument("--skip-broken", action="store_true", help="prepare: leave out cases that cannot be used")
    parser.add_argument("--workers", type=int, default=1, help="prepare: scans that are read at once")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Runs the command and returns its exit code: 2 if a case cannot be trained on."""
    if args.action not in _ACTIONS:
        close = did_you_mean(args.action, _ACTIONS)
        raise InputError(f"unknown action {args.action!r:.60}{close}", hint="mome data check FOLDER, mome data list")
    if args.action == "list":
        return _list(as_json=args.json)
    if args.folder is None:
        raise InputError("no folder was given", hint=f"mome data {args.action} FOLDER --layout nnunet --dataset lits")
    if args.action == "prepare":
        return _prepare(args)
    from rich.console import Console
    from rich.progress import track

    from mome.cli.quiet import quiet_readers
    from mome.data.check import check_cases, check_named
    from mome.data.layouts import open_cases
    from mome.labels.own import read_own_structures

    layout = _layout(args)
    own = read_own_structures(dict.fromkeys(args.own))
    folders = [args.folder, *([] if args.against is None else [args.against])]
    cases, *against = (open_cases(folder, layout, args.dataset, own) for folder in folders)
    others = {str(args.against): one for one in against}
    check_named(args.own, cases, args.folder)
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


def _layout(args: argparse.Namespace) -> str:
    """Returns the layout: the one that was given, else that of the data set, else the one that the folder shows."""
    from mome.labels.dataset_file import open_dataset

    of_dataset = open_dataset(args.dataset).layout if args.dataset else ""
    if args.layout or of_dataset:
        return args.layout or of_dataset
    is_nnunet = (args.folder / "dataset.json").is_file() and (args.folder / "labelsTr").is_dir()
    return "nnunet" if is_nnunet else "cases"


def _prepare(args: argparse.Namespace) -> int:
    """Plans a training and fills its caches."""
    if args.out is None:
        raise InputError("no folder for the results was given", hint="-o prepared")
    if args.workers < 1:
        raise InputError(f"--workers is at least 1, got {args.workers}", hint="--workers 2")
    if not 0 <= args.held_out < 1:
        raise InputError(
            f"--held-out is at least 0 and below 1, got {args.held_out}",
            hint="--held-out 0.2 for a fifth of the patients",
        )
    memory = parse_bytes(args.memory, "--memory")
    from rich.console import Console
    from rich.progress import track

    from mome.cli.quiet import quiet_libraries
    from mome.labels import load_table
    from mome.labels.dataset_file import own_names
    from mome.labels.own import find_own
    from mome.training.prepare import prepare

    quiet_libraries()
    own = [*args.own, *own_names(args.dataset)]
    named: list[str] = []
    for text in args.prompt:
        mine = find_own(text, own)
        named += [mine] if mine else load_table().resolve(text).names or (text,)
    labels = tuple(dict.fromkeys(named))  # "kidneys" and "left kidney" name one of them twice
    error = Console(stderr=True)
    plan, path, earlier = prepare(
        args.folder,
        args.out,
        layout=_layout(args),
        dataset=args.dataset,
        labels=labels,
        own=args.own,
        preset=args.preset,
        memory_bytes=memory,
        held_out=args.held_out,
        skip_broken=args.skip_broken,
        workers=args.workers,
        cache_format=args.cache_format,
        progress=lambda items: track(
            items, "reading", console=error, transient=True, disable=args.json or not error.is_terminal
        ),
    )
    found = json.loads((path.parent / "fingerprint.json").read_text())
    without = found["without_voxels"]
    if args.json:
        plan_values = {"configuration": str(path), **dataclasses.asdict(plan), "without_voxels": without}
        print(json.dumps(plan_values, indent=1))
        return 0
    sides = " × ".join(f"{side:g}" for side in plan.spacing)
    patch = " × ".join(map(str, plan.patch_size))
    print(f"voxels of {sides} mm, window {plan.hu_window[0]:g} to {plan.hu_window[1]:g} HU")
    print(f"{plan.batch_size} patches of {patch} voxels a step, {plan.step_bytes / 1e9:.1f} GB expected")
    asked = [name for name in without if name in labels]
    for names, effect in (
        ([] if labels else without, "run.yaml does not train them"),
        (asked, "only their absence is trained"),
    ):
        if names:
            print(printable(f"annotated, but without a voxel in any training case: {', '.join(names)}; {effect}"))
    notes = [note for case in found["cases"] for note in case["notes"]]
    for note in notes[:_MOST_NOTES]:
        print(printable(f"note: {note}"))
    if len(notes) > _MOST_NOTES:
        print(f"note: {len(notes) - _MOST_NOTES} more are in fingerprint.json")
    left_out = found["problems"]
    if left_out:
        print(
            printable(
                f"left out: {len(left_out)} cases, such as {next(iter(left_out))!r:.60}; fingerprint.json says why"
            )
        )
    if args.held_out and "validation:" not in path.read_text():
        print(f"no case is held out for validation: with few cases, --held-out {args.held_out:g} may choose none")
    if earlier is not None:
        print(printable(f"the earlier configuration, which differs, is now {earlier}"))
    print(printable(f"wrote {path}; next: mome train --config {path}"))
    return 0


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
