"""Compares the masks of bfloat16 and of the default settings with those of float32, on the OpenKBP validation patients.

    export MOME_TEST_DATA=…      # the folder that contains openkbp/
    python benchmarks/inference_precision.py --out benchmarks/results/inference_precision.json

Every scan is segmented for every structure that the bundled model knows: in float32 with every tile computed
(`exact`), in bfloat16 with every tile computed (`bf16`), with the default settings of `Segmenter` (`default`), and with
these in float32 (`default_fp32`). `--modes` names some of them; results of other modes stay in the JSON file. `exact`
is computed always. A run that was stopped goes on with the scans that are not in the file.

Two measures are reported per structure: the Dice coefficient of a mode's mask and the exact mask, over the scans where
one of the two is not empty, and the Dice coefficient of each mode's mask and the manual contour, over the annotated
scans. No time is measured, so a busy machine does not change the result. On two idle cores all modes take about six
minutes.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from segmenter_modes import MODEL, MODES

from mome.data.case_folder import Case, CaseFolder
from mome.inference import Segmenter
from mome.labels import load_dataset
from mome.metrics import dice
from mome.module_objects import weights_sha256
from mome.volumes import read_label_map, read_volume

COMPARED = [mode for mode in MODES if mode != "exact"]


def score_case(
    segmenters: dict[str, Segmenter], case: Case, structures: Sequence[str], ids: dict[str, int]
) -> dict[str, Any]:
    """Returns structure → the voxels of the exact mask, and mode → Dice with it and with the manual contour.

    Dice is None where both masks are empty, and where the structure is not annotated.
    """
    volume, contours = read_volume(case.image), read_label_map(case.labels).array
    masks = {mode: segmenter.segment(volume, list(structures)).masks for mode, segmenter in segmenters.items()}
    scores: dict[str, Any] = {}
    for name in structures:
        exact = masks["exact"][name]
        is_annotated = name in case.annotated
        scores[name] = {
            "voxels": int(exact.sum()),
            "exact": {mode: defined(dice(masks[mode][name], exact)) for mode in masks},
            "manual": {
                mode: defined(dice(masks[mode][name], contours == ids[name])) if is_annotated else None
                for mode in masks
            },
        }
    return scores


def defined(value: float) -> float | None:
    """The value to five digits, or None for NaN, which JSON cannot store."""
    return None if math.isnan(value) else round(value, 5)


def summary(cases: dict[str, Any], structures: Sequence[str]) -> dict[str, Any]:
    """Returns the lowest and the mean Dice per structure and mode, and over all structures as `all`."""
    result: dict[str, Any] = {}
    for name in [*structures, "all"]:
        entries = [case[key] for case in cases.values() for key in ([name] if name != "all" else structures)]
        result[name] = {}
        for mode in MODES:
            agreement = [value for entry in entries if (value := entry["exact"].get(mode)) is not None]
            manual = [value for entry in entries if (value := entry["manual"].get(mode)) is not None]
            if not agreement:
                continue
            result[name][mode] = {
                "lowest": min(agreement),
                "mean": statistics.fmean(agreement),
                "not_empty": len(agreement),
                "manual": statistics.fmean(manual) if manual else None,
                "annotated": len(manual),
            }
    return result


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("MOME_TEST_DATA"), help="contains openkbp/")
    parser.add_argument("--modes", nargs="+", choices=COMPARED, default=COMPARED)
    parser.add_argument("--scans", type=int, default=0, help="only this many scans; 0 for all")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 for torch's choice")
    parser.add_argument("--out", type=Path, help="write the results to this JSON file")
    args = parser.parse_args()
    if args.data is None:
        parser.error("--data or MOME_TEST_DATA must name the folder that contains openkbp/")
    if args.threads:
        torch.set_num_threads(args.threads)
    folder = CaseFolder(Path(args.data) / "openkbp" / "val", "openkbp")
    segmenters = {mode: Segmenter(MODEL, **MODES[mode]) for mode in ("exact", *args.modes)}
    ids = load_dataset("openkbp").name_to_id
    structures = list(ids)
    weights = weights_sha256(segmenters["exact"].model)[:16]
    earlier = json.loads(args.out.read_text()) if args.out and args.out.exists() else {}
    if earlier.get("weights") != weights:  # scores of other weights say nothing about these
        earlier = {"cases": {}, "precision": {}}
    cases: dict[str, Any] = earlier["cases"]
    for case in list(folder)[: args.scans or None]:
        known = cases.get(case.name)
        if known and all(mode in entry["exact"] for entry in known.values() for mode in args.modes):
            continue
        scores = score_case(segmenters, case, structures, ids)
        for name, entry in cases.get(case.name, {}).items():
            for key in ("exact", "manual"):
                scores[name][key] = {**entry[key], **scores[name][key]}
        cases[case.name] = scores
        lowest = {
            mode: min((v for name in structures if (v := scores[name]["exact"][mode]) is not None), default=None)
            for mode in args.modes
        }
        print(f"{case.name:<12} lowest Dice with the exact masks: {lowest}", flush=True)
        report = {
            "model": MODEL,
            "weights": weights,
            "bfloat16_instructions": bool(torch.cpu.get_capabilities().get("avx512_bf16")),
            "precision": {**earlier["precision"], **{mode: segmenters[mode].precision for mode in segmenters}},
            "summary": summary(cases, structures),
            "cases": cases,
        }
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(report, indent=1) + "\n")
    for name, row in summary(cases, structures).items():
        for mode, entry in row.items():
            manual = "–" if entry["manual"] is None else f"{entry['manual']:.4f} ({entry['annotated']})"
            print(
                f"{name:<20} {mode:<8} lowest {entry['lowest']:.4f}  mean {entry['mean']:.4f}  "
                f"not empty {entry['not_empty']:>3}  with manual contours {manual}"
            )


if __name__ == "__main__":
    main()
