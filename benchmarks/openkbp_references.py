"""Looks for references of OpenKBP that do not lie on the structure, and scores masks with and without them.

    export MOME_TEST_DATA=…      # the folder that contains openkbp/
    python benchmarks/openkbp_references.py --masks runs/val_masks

`runs/val_masks` is what `mome segment` writes of the validation scans. Two facts of the references alone are measured,
without any model: the volume of the spinal cord, and the share of the brainstem and the parotid glands that lies in air
(below −300 HU). The results are written to results/openkbp_references.json. No published score leaves out a reference.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from mome.labels import load_dataset
from mome.metrics.overlap import dice
from mome.volumes import read_label_map, read_volume
from mome.volumes.case_list import read_case_list

OUT = Path(__file__).parent / "results" / "openkbp_references.json"
AIR_HU = -300.0
# A spinal cord of the training patients has at most 57 ml, and at most 1 % of these three structures lies in air.
MOST_CORD_ML, MOST_IN_AIR = 100.0, 0.1
SOFT = ("brainstem", "parotid_gland_left", "parotid_gland_right")


def facts(split: Path) -> dict[str, dict[str, float]]:
    """Returns `cord_ml` and `in_air` of every case of a split."""
    numbers = load_dataset("openkbp").name_to_id
    found = {}
    for case in sorted(read_case_list(split / "cases.json")):
        labels = read_label_map(split / "labels" / f"{case}.nii.gz")
        hu = read_volume(split / "images" / f"{case}.nii.gz").array
        millilitres = float(np.prod(labels.spacing)) / 1000
        soft = np.isin(labels.array, [numbers[name] for name in SOFT])
        found[case] = {
            "cord_ml": round(float((labels.array == numbers["spinal_cord"]).sum()) * millilitres, 1),
            "in_air": round(float((hu[soft] < AIR_HU).mean()) if soft.any() else 0.0, 3),
        }
    return found


def doubtful(found: dict[str, dict[str, float]], annotated: dict[str, Any]) -> set[tuple[str, str]]:
    """Returns the (case, structure) whose reference cannot be right; of a case with much in air, all of them."""
    pairs = set()
    for case, values in found.items():
        if values["cord_ml"] > MOST_CORD_ML:
            pairs.add((case, "spinal_cord"))
        if values["in_air"] > MOST_IN_AIR:
            pairs |= {(case, structure) for structure in annotated[case]}
    return pairs


def means(scores: dict[tuple[str, str], float]) -> dict[str, float]:
    """Returns the mean Dice of every structure, and `mean` of these."""
    structures = sorted({structure for _, structure in scores})
    found = {name: np.mean([d for (_, structure), d in scores.items() if structure == name]) for name in structures}
    # The mean is taken before rounding, as `mome evaluate` does.
    found["mean"] = np.mean(list(found.values()))
    return {name: round(float(value), 3) for name, value in found.items()}


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--masks", type=Path, required=True, help="masks of the validation scans")
    args = parser.parse_args()
    data = Path(os.environ["MOME_TEST_DATA"]) / "openkbp"
    train, val = facts(data / "train"), facts(data / "val")
    annotated, numbers = read_case_list(data / "val" / "cases.json"), load_dataset("openkbp").name_to_id
    wrong = doubtful(val, annotated)
    assert not doubtful(train, read_case_list(data / "train" / "cases.json")), "the limits are those of training cases"
    scores = {}
    for case in sorted(annotated):
        truth = read_label_map(data / "val" / "labels" / f"{case}.nii.gz").array
        for structure in annotated[case]:
            mask = read_label_map(args.masks / f"{case}_{structure}.nii.gz").array > 0
            scores[case, structure] = dice(mask, truth == numbers[structure])
    report = {
        "training": {
            "patients": len(train),
            "largest_cord_ml": max(values["cord_ml"] for values in train.values()),
            "largest_in_air": max(values["in_air"] for values in train.values()),
        },
        "doubtful": [
            {"case": case, "structure": structure, "dice": round(scores[case, structure], 3), **val[case]}
            for case, structure in sorted(wrong)
        ],
        "dice": {
            "all": means(scores),
            "without_doubtful": means({pair: d for pair, d in scores.items() if pair not in wrong}),
        },
    }
    OUT.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
