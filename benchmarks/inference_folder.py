"""Times `mome segment` on a folder: the 33 OpenKBP validation scans, seven prompts, masks written.

    export MOME_TEST_DATA=…      # the folder that contains openkbp/
    git worktree add ../before COMMIT
    python benchmarks/inference_folder.py --before ../before --rounds 3 --out benchmarks/results/inference_folder.json

The command is run as a user runs it, so its time holds the imports, the loading of the model, and the reading and
writing of all scans and masks. With `--before`, the same command of an earlier checkout runs in turn; `--before-scans`
lets it segment some of the scans only. Seconds a scan are those of the whole command divided by the number of scans.
The report's seconds are those of the work on one scan, of which a part is done while others are in work.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from processes import commit_of, in_turns, machine, medians, packages_of, run_python, write_results

CHECKOUT = Path(__file__).resolve().parents[1]
MODEL = "mome-ct-tiny"
PROMPTS = ("spinal_cord", "brainstem", "esophagus", "parotid_gland_left", "parotid_gland_right", "mandible", "larynx")


def run_command(checkout: Path, scans: list[Path], threads: int) -> dict[str, Any]:
    """Runs the command into an empty folder; returns its seconds and those of the report."""
    with tempfile.TemporaryDirectory() as folder:
        prompts = [part for prompt in PROMPTS for part in ("-p", prompt)]
        arguments = ["-m", "mome.cli.main", "segment", *map(str, scans), "-m", MODEL, *prompts, "-o", f"{folder}/masks"]
        began = time.perf_counter()
        run_python(sys.executable, arguments, packages=packages_of(checkout), threads=threads, folder=folder)
        seconds = time.perf_counter() - began
        masks = list(Path(folder, "masks").glob("*.nii.gz"))
        entries = json.loads(Path(folder, "masks", "report.json").read_text())["studies"]
    if len(masks) != len(PROMPTS) * len(scans):
        raise SystemExit(f"{len(masks)} masks of {len(scans)} scans and {len(PROMPTS)} prompts")
    each = [entry["seconds"] for entry in (entries.values() if isinstance(entries, dict) else entries)]
    return {
        "scans": len(scans),
        "seconds": seconds,
        "seconds_per_scan": seconds / len(scans),
        "reported_seconds_per_scan": statistics.fmean(each),
    }


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("MOME_TEST_DATA"), help="contains openkbp/")
    parser.add_argument("--before", type=Path, help="checkout of an earlier commit")
    parser.add_argument("--before-scans", type=int, default=0, help="scans for the earlier commit; 0 for all")
    parser.add_argument("--scans", type=int, default=0, help="only this many scans; 0 for all")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 for torch's choice")
    parser.add_argument("--out", type=Path, help="write the results to this JSON file")
    args = parser.parse_args()
    if args.data is None:
        parser.error("--data or MOME_TEST_DATA must name the folder that contains openkbp/")
    scans = sorted(Path(args.data).resolve().glob("openkbp/val/images/*.nii.gz"))[: args.scans or None]
    sides = {"now": (CHECKOUT, scans)}
    if args.before:
        sides["before"] = (args.before.resolve(), scans[: args.before_scans or None])
    header = {
        "commits": {side: commit_of(checkout) for side, (checkout, _) in sides.items()},
        "machine": machine(),
        "rounds": args.rounds,
        "prompts": len(PROMPTS),
    }

    def run(side: str) -> dict[str, Any]:
        result = run_command(*sides[side], args.threads)
        print(
            f"{side:<7} {result['seconds_per_scan']:.2f} s a scan: {result['scans']} in {result['seconds']:.1f} s; "
            f"{result['reported_seconds_per_scan']:.2f} s a scan by the report",
            flush=True,
        )
        return result

    def keep(runs: dict[str, list[dict[str, Any]]]) -> None:
        measured = {side: medians(entries) for side, entries in runs.items()}
        write_results(args.out, {**header, "sides": measured, "runs": runs})

    in_turns({side: partial(run, side) for side in sides}, args.rounds, keep)


if __name__ == "__main__":
    main()
