"""Random patches of images and labels: from NIfTI, and from training caches, plain and compressed. One process per arm.

    python benchmarks/random_patches.py --out runs/patches                        # phantoms, 12 cases of 192³ voxels
    python benchmarks/random_patches.py --data "$MOME_TEST_DATA/openkbp/train" --dataset openkbp --out runs/patches

Every arm reads the same boxes of the same voxels: the cases of the cache are written as NIfTI, too, with one number
per set of structures, so that NIfTI pays neither for resampling nor for masks. `nifti_gz` and `nifti` read a box
through nibabel, which reads an uncompressed file only where the box lies; `volume_reader` reads the whole files with
our own reader, as a loop without a cache does. `samples` makes whole training samples from the plain cache (box, codes,
default augmentation), on one core.

Prints and writes JSON: seconds per patch (median over rounds, the first round apart), bytes on disk, and the growth of
the process's memory: `anonymous_mb`, which belongs to it alone, and `resident_mb`, which includes pages of mapped files
that the system takes back when it needs them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mome.atomic import atomic_write

ARMS = ("nifti_gz", "nifti", "volume_reader", "plain", "blosc2", "samples")
LABELS = ["spinal_cord", "brainstem", "esophagus", "parotid_gland_left", "parotid_gland_right", "mandible", "larynx"]


def build(args: argparse.Namespace) -> None:
    """Builds both caches, and writes the cases of one as NIfTI."""
    import nibabel as nib

    caches = {cache_format: open_cache(args, cache_format) for cache_format in ("plain", "blosc2")}
    for ending in ("nii", "nii.gz"):
        for i in range(len(caches["plain"])):
            case = caches["plain"][i]
            arrays = {"volume": np.asarray(case.volume).astype(np.int16) * 4 - 500, "labels": np.asarray(case.labels)}
            for kind, array in arrays.items():
                path = args.out / ending.replace(".", "_") / f"{i:05d}.{kind}.{ending}"
                if not path.is_file():
                    path.parent.mkdir(parents=True, exist_ok=True)
                    with atomic_write(path, "a scan") as part:
                        nib.save(nib.Nifti1Image(array, np.diag([2.0, 2.0, 2.0, 1.0])), part)


def open_cache(args: argparse.Namespace, cache_format: str) -> Any:
    """Opens a cache of the cases; builds it where there is none."""
    from mome.data.cache_build import LoadedCase, build_cache, cache_case_folder
    from mome.data.layouts import open_cases
    from mome.data.phantom import phantom
    from mome.processing import MoMEProcessor
    from mome.volumes import Grid

    spacing = [args.spacing] * 3
    processor = MoMEProcessor(spacing=spacing, hu_window=[-500, 520])
    root = args.out / "cache"
    if args.data:
        cases = open_cases(args.data, "cases", args.dataset)[: args.cases]
        return cache_case_folder(root, cases, "patches", LABELS, processor, cache_format=cache_format)

    def loader(seed: int) -> Callable[[], Any]:
        def load() -> Any:
            made = phantom(seed)
            return LoadedCase(made.array, Grid(made.array.shape, made.affine), made.masks)

        return load

    loaders = [(f"phantom_{seed}", loader(seed)) for seed in range(args.cases)]
    return build_cache(root, "patches", LABELS, processor, loaders, str(args.cases), cache_format=cache_format)


def reader(arm: str, args: argparse.Namespace, shapes: list[list[int]]) -> Callable[[int, list[int]], Any]:
    """Returns the function that reads the patch of a case that begins at a voxel."""
    side = args.patch
    if arm in ("nifti_gz", "nifti", "volume_reader"):
        import nibabel as nib

        from mome.volumes import read_label_map, read_volume

        ending = "nii.gz" if arm != "nifti" else "nii"
        folder = args.out / ending.replace(".", "_")

        def from_nifti(case: int, start: list[int]) -> Any:
            box = tuple(slice(first, first + side) for first in start)
            paths = [folder / f"{case:05d}.{kind}.{ending}" for kind in ("volume", "labels")]
            if arm == "volume_reader":
                return read_volume(paths[0]).array[box].copy(), read_label_map(paths[1]).array[box].copy()
            return [np.array(nib.load(path).dataobj[box]) for path in paths]

        return from_nifti
    from mome.data.patch_box import read_box

    cache = open_cache(args, "blosc2" if arm == "blosc2" else "plain")
    if arm == "samples":
        import torch

        from mome.data.augmentation import AugmentationConfig, BatchAugmentation
        from mome.data.sampling import PatchDataset

        torch.set_num_threads(1)
        augmentation = BatchAugmentation(AugmentationConfig(affine=0.2), LABELS)
        patches = PatchDataset([cache], [1.0], LABELS, [side] * 3, 10**6, 0, augmentation=augmentation)
        numbers = iter(range(10**6))
        return lambda case, start: patches[next(numbers)]

    def from_cache(case: int, start: list[int]) -> Any:
        found = cache[case]
        return read_box(found.volume, start, [side] * 3), read_box(found.labels, start, [side] * 3)

    return from_cache


def measure(arm: str, args: argparse.Namespace) -> dict[str, Any]:
    """Reads patches in rounds, and returns times and the growth of memory."""
    shapes = [entry["shape"] for entry in open_cache(args, "plain").index]
    read = reader(arm, args, shapes)
    rng = np.random.default_rng(0)
    before, seconds = memory_mb(), []
    for _ in range(args.rounds + 1):
        places = [int(rng.integers(len(shapes))) for _ in range(args.patches)]
        starts = [[int(rng.integers(max(size - args.patch, 0) + 1)) for size in shapes[case]] for case in places]
        began = time.perf_counter()
        for case, start in zip(places, starts, strict=True):
            read(case, start)
        seconds.append((time.perf_counter() - began) / args.patches)
    after = memory_mb()
    return {
        "arm": arm,
        "seconds": statistics.median(seconds[1:]),
        "first_round_seconds": seconds[0],
        "anonymous_mb": round(after["Anonymous"] - before["Anonymous"], 1),
        "resident_mb": round(after["Rss"] - before["Rss"], 1),
    }


def memory_mb() -> dict[str, float]:
    """Returns the resident and the anonymous memory of this process."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    found = {line.split(":")[0]: line.split()[1] for line in lines[1:]}
    return {key: int(found[key]) * 1024 / 1e6 for key in ("Rss", "Anonymous")}


def disk_mb(arm: str, args: argparse.Namespace) -> float:
    """Returns the bytes on disk of what an arm reads."""
    if arm in ("plain", "blosc2", "samples"):
        folder = open_cache(args, "blosc2" if arm == "blosc2" else "plain").folder
    else:
        folder = args.out / ("nii" if arm == "nifti" else "nii_gz")
    return round(sum(path.stat().st_size for path in folder.iterdir()) / 1e6, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for caches, NIfTI files and results")
    parser.add_argument("--data", type=Path, help="a folder of cases; phantoms where none is given")
    parser.add_argument("--dataset", default="openkbp")
    parser.add_argument("--cases", type=int, default=12)
    parser.add_argument("--spacing", type=float, default=2.0, help="voxel side of the cache in mm")
    parser.add_argument("--patch", type=int, default=64)
    parser.add_argument("--patches", type=int, default=40, help="per round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--arm", choices=ARMS, help="measure one arm in this process")
    args = parser.parse_args()
    if args.arm:
        print(json.dumps(measure(args.arm, args)))
        return
    build(args)
    rows = []
    for arm in args.arms:
        done = subprocess.run([sys.executable, *sys.argv, "--arm", arm], capture_output=True, text=True, check=False)
        if done.returncode:
            rows.append({"arm": arm, "error": done.stderr[-500:]})
        else:
            rows.append({**json.loads(done.stdout.splitlines()[-1]), "disk_mb": disk_mb(arm, args)})
        print(json.dumps(rows[-1]), flush=True)
    slow = {row["arm"]: row["seconds"] for row in rows if "seconds" in row}
    ratios = {
        f"{nifti} / {cached}": round(slow[nifti] / slow[cached], 1)
        for nifti in ("nifti_gz", "nifti", "volume_reader")
        for cached in ("plain", "blosc2")
        if nifti in slow and cached in slow
    }
    settings = {key: str(value) for key, value in vars(args).items() if key not in ("arm", "out")}
    machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    result = {"settings": settings, "machine": machine, "arms": rows, "ratios": ratios}
    with atomic_write(args.out / "random_patches.json", "the result") as part:
        part.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(ratios))


if __name__ == "__main__":
    main()
