"""Scores a torso model on turned slabs at the spleen, cut from the held-out scans of benchmarks/torso.py.

    export MOME_TEST_DATA=…      # the folder that contains torso/ and anatomy/
    python benchmarks/turned_slabs.py --extend 0
    python benchmarks/turned_slabs.py --extend 15

A slab is 60 mm thick, as large as the scan, and turned about an axis in its plane: by 15° about x, and by 20° about x
and y. Prints the mean Dice over the structures of a slab, and the means of both turns.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import nibabel
import numpy as np
import torch
from scipy.spatial.transform import Rotation
from torso import Scan, held_out, score

from mome.inference import Segmenter
from mome.volumes import Grid, Volume, resample

THICK_MM = 60.0
TURNS = ((15.0, (1.0, 0.0, 0.0)), (20.0, (1.0, 1.0, 0.0)))


def turned_slab(scan: Scan, degrees: float, about: tuple[float, float, float]) -> Scan:
    """Returns a slab around the middle of the spleen, resampled to planes that are turned."""
    grid = scan.volume.grid
    axis = next(i for i, letter in enumerate(nibabel.aff2axcodes(grid.affine)) if letter in "SI")
    heights = np.flatnonzero(scan.masks["spleen"].any(axis=tuple(i for i in range(3) if i != axis)))
    middle = (np.asarray(grid.shape) - 1) / 2
    middle[axis] = (heights[0] + heights[-1]) / 2
    shape, affine = list(grid.shape), grid.affine.copy()
    shape[axis] = round(THICK_MM / grid.spacing[axis])
    turn = Rotation.from_rotvec(np.deg2rad(degrees) * np.asarray(about) / np.linalg.norm(about)).as_matrix()
    affine[:3, :3] = turn @ affine[:3, :3]
    centre = (grid.affine @ [*middle, 1.0])[:3]
    affine[:3, 3] = centre - affine[:3, :3] @ ((np.asarray(shape) - 1) / 2)
    target = Grid((shape[0], shape[1], shape[2]), affine)
    masks = {
        name: resample(mask.astype(np.float32), grid, target, mode="nearest").numpy() > 0.5
        for name, mask in scan.masks.items()
    }
    hu = resample(scan.volume.array, grid, target, fill=-1000.0).numpy()
    return Scan(f"{scan.name}, {degrees:g}°", Volume(hu, affine), masks, scan.source)


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mome-ct-torso-tiny")
    parser.add_argument("--extend", type=float, help="mm by which scans are continued; the model says where not given")
    parser.add_argument("--threads", type=int, default=0)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    segmenter = Segmenter(args.model)
    if args.extend is not None:
        segmenter.processor.extend_mm = args.extend
    means: dict[float, list[float]] = {degrees: [] for degrees, _ in TURNS}
    for scan in held_out(Path(os.environ["MOME_TEST_DATA"])):
        if "spleen" in scan.masks:
            for degrees, about in TURNS:
                slab = turned_slab(scan, degrees, about)
                found = [row["dice"] for row in score(segmenter, slab, None) if "dice" in row]
                means[degrees].append(float(np.mean(found)))
                print(f"{slab.name}: {means[degrees][-1]:.3f}", flush=True)
    for degrees, values in means.items():
        print(f"{degrees:g}°: {np.mean(values):.3f}, mean of {len(values)} slabs")


if __name__ == "__main__":
    main()
