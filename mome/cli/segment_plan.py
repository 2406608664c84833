"""`mome segment --plan`: says what segmenting each scan will take, and writes nothing."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from mome.printable import printable

if TYPE_CHECKING:
    from mome.inference import Segmenter


def print_plans(segmenter: Segmenter, args: argparse.Namespace, dicom: Any) -> int:
    """Reads every scan, measures one tile of the network, prints the plans and returns the exit code.

    Args:
        segmenter: The model with its settings.
        args: The options of `mome segment`.
        dicom: Which DICOM series are read.
    """
    from mome.errors import InputError
    from mome.inference.plan import measured_tile, plan_scan
    from mome.inference.scans import find_scans
    from mome.memory import process_bytes
    from mome.volumes import read_volume

    prompts = segmenter.prepare(args.prompt)
    cost = measured_tile(segmenter, prompts)
    base, found, failed = process_bytes(), [], 0
    for scan in find_scans(args.inputs):
        try:
            volume = read_volume(scan, frame=args.frame, dicom=dicom)
            plan = plan_scan(segmenter, volume, prompts, cost, base)
        except InputError as error:
            failed += 1
            found.append({"scan": scan.name, "error": str(error)})
            if not args.json:
                print(f"{printable(scan.name)}\n  cannot be segmented: {printable(str(error), keep=chr(10))}")
            continue
        found.append({"name": scan.name, **plan.as_dict()})
        if not args.json:
            print("\n  ".join([printable(scan.name), *plan.lines()]))
    if args.json:
        print(json.dumps({"plans": found}, indent=1))
    return 2 if failed else 0
