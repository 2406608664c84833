"""Masks of a turned or tilted scan on a network grid that is turned with it, and on an upright one around the patient.

`python tests/turned_runs.py SCAN --out turned_scans.json` turns a scan by several angles, segments it with a bundled
model on both grids, and adds the Dice with the masks of the scan as it is to a JSON file. A shift by half a voxel says
how much of a difference is that of interpolating the scan once more. `LARGEST_ROTATION_DEG` is chosen from these.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from orientation_runs import dice, places, sampled, tilted_grid, turned

from mome import processing
from mome.inference import Segmenter
from mome.volumes import Grid, Volume
from mome.volumes.upright import rotation_degrees

ANGLES = (5, 10, 15, 20)
# Masks of fewer voxels change by more than the angle does.
FEWEST_VOXELS = 200


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scan", type=Path)
    parser.add_argument("--model", default="mome-ct-tiny")
    parser.add_argument("--angles", type=float, nargs="+", default=ANGLES)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    image = nib.load(args.scan)
    array, affine = np.asarray(image.get_fdata(), dtype=np.float32), image.affine
    segmenter = Segmenter(args.model)
    prompts = segmenter.prepare(sorted(segmenter.model.config.trained_labels))
    plain = segmenter.segment(Volume(array, affine), prompts)
    names = [name for name in plain.masks if plain.masks.voxels[name] >= FEWEST_VOXELS]

    def run(grid: np.ndarray, largest: float) -> dict[str, float]:
        """Mean and lowest Dice, where scans that are turned by more than an angle are put upright."""
        processing.LARGEST_ROTATION_DEG = largest
        at = places(array.shape, grid)
        hu = sampled(array, affine, at, order=1, fill=-1000)
        found = segmenter.segment(Volume(hu, grid), prompts)
        scores = [
            dice(found.masks[name], sampled(plain.masks[name], affine, at, order=1, fill=0) > 0.5) for name in names
        ]
        return {"mean": round(float(np.mean(scores)), 4), "lowest": round(min(scores), 4)}

    shifted = affine.copy()
    shifted[:3, 3] += affine[:3, :3] @ np.full(3, 0.5)
    result: dict[str, Any] = {"structures": len(names), "shifted by half a voxel": run(shifted, 180)}
    for kind, move in {"turned": turned, "tilted": tilted_grid}.items():
        for angle in args.angles:
            grid = move(affine, array.shape, angle)
            result[f"{kind} by {angle:g}°"] = {
                "rotation": round(rotation_degrees(Grid(array.shape, grid)), 2),
                "turned grid": run(grid, 180),
                "upright grid": run(grid, 0),
            }
            print(f"{kind} by {angle:g}°", result[f"{kind} by {angle:g}°"], flush=True)
            report = json.loads(args.out.read_text()) if args.out.is_file() else {}
            report[args.scan.name] = {**report.get(args.scan.name, {}), **result}
            args.out.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
