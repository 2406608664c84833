"""`mome convert`: published weights of other projects become a checkpoint folder."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from mome.convert import FAMILIES
from mome.errors import InputError
from mome.printable import printable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command."""
    families = "; ".join(f"{name}: {summary}" for name, (_, summary) in FAMILIES.items())
    parser.add_argument("family", help=families)
    parser.add_argument("source", type=Path, help="the published weights (.safetensors, or a .pt of tensors alone)")
    parser.add_argument("out", type=Path, help="folder for the checkpoint")
    parser.add_argument("parts", nargs="*", help="parts after the encoder, as in experts='swiglu(n=8)'")
    parser.add_argument("--spacing", type=float, nargs=3, help="voxel size of the network grid in mm")
    parser.add_argument("--orientation", help="axes of the network grid, as in RAS")
    parser.add_argument("--hu-window", type=float, nargs=2, help="HU that become 0 and 1")
    parser.add_argument("--norm", help="of segresnet, where the file does not tell: instance or group")
    parser.add_argument("--seed", type=int, default=0, help="seed of the tensors that the file does not hold")
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint in the folder")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(args: argparse.Namespace) -> int:
    """Runs the command and returns its exit code."""
    parts = {}
    for given in args.parts:
        key, equals, value = given.partition("=")
        if not equals:
            raise InputError(f"{given!r:.60} is no part", hint="experts='swiglu(n=8)'")
        parts[key] = value
    processor = {"spacing": args.spacing, "orientation": args.orientation, "hu_window": args.hu_window}
    from mome.cli.quiet import quiet_libraries

    quiet_libraries()
    from mome.convert.run import convert

    report = convert(
        args.family,
        args.source,
        args.out,
        parts=parts,
        processor={key: value for key, value in processor.items() if value is not None},
        norm=args.norm,
        overwrite=args.overwrite,
        seed=args.seed,
    )
    if args.json:
        print(json.dumps(report.to_json(), indent=1))
        return 0
    for line in report.lines():
        print(printable(line))
    then = f"train --config run.yaml init={args.out}" if report.random else f"segment ct.nii.gz -p liver -m {args.out}"
    print(printable(f"written to {args.out}; next: mome {then}"))
    return 0
