"""Peak memory and time of segmenting one large scan, and where the bytes go. One case per process.

    python benchmarks/inference_memory.py --make scan.nii.gz   # 512 × 512 × 600 voxels, from ts_example_ct
    python benchmarks/inference_memory.py scan.nii.gz --case bundled --prompts 100
    python benchmarks/inference_memory.py scan.nii.gz --case organs --labels label_map.nii.gz
    python benchmarks/inference_memory.py scan.nii.gz --case body --prompts 100

`bundled` runs the bundled model, which knows seven labels of the neck, so that most masks are empty. `organs` replaces
the network by signed distances of the classes of a label map, stretched over the scan. `body` replaces it by a network
that finds the whole body for every prompt, the worst case for all that follows the network.

Prints one JSON object: seconds by phase, seconds inside of the network, seconds of writing, the peaks of memory of the
process (VmHWM) while it reads, segments and writes, and the bytes that are expected of every part at most.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch


def memory_gb(field: str) -> float:
    """Returns VmHWM (the peak since the last `reset_peak`) or VmRSS of this process in GB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024 / 1e9


def reset_peak() -> None:
    """Sets VmHWM to the present memory."""
    Path("/proc/self/clear_refs").write_text("5")


def make_scan(out: Path, shape: tuple[int, int, int] = (512, 512, 600)) -> None:
    """Writes `ts_example_ct` stretched to 400 × 400 × 600 mm, with noise of 8 HU as a scanner gives it."""
    import nibabel as nib

    from mome.volumes import Grid, read_volume, resample

    volume = read_volume(Path(os.environ["MOME_TEST_DATA"]) / "torso" / "ts_example_ct.nii.gz")
    factor = np.array(volume.shape) / shape
    affine = volume.affine @ np.diag([*factor, 1.0])
    affine[:3, 3] = (volume.affine @ np.array([*(-0.5 + 0.5 * factor), 1.0]))[:3]
    hu = resample(volume.array, volume.grid, Grid(shape, affine), fill=-1024).numpy()
    hu += np.random.default_rng(0).normal(0, 8, shape).astype(np.float32)
    spacing = (-400 / shape[0], -400 / shape[1], 600 / shape[2])
    nib.save(nib.Nifti1Image(np.round(hu).astype(np.int16), np.diag([*spacing, 1.0])), out)


class Timed:
    """Wraps a predictor and measures the time inside of it."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.seconds, self.tiles = inner, 0.0, 0

    @property
    def patch_size(self) -> tuple[int, int, int]:
        return self.inner.patch_size

    @property
    def device(self) -> torch.device:
        return self.inner.device

    def encode(self, tile: torch.Tensor, origin: tuple[int, int, int]) -> Any:
        began = time.perf_counter()
        features = self.inner.encode(tile, origin)
        self.seconds += time.perf_counter() - began
        self.tiles += 1
        return features

    def decode(self, features: Any, text: torch.Tensor) -> torch.Tensor:
        began = time.perf_counter()
        logits = self.inner.decode(features, text)
        self.seconds += time.perf_counter() - began
        return logits


class Body:
    """Every prompt is the whole body."""

    patch_size, device = (64, 64, 64), torch.device("cpu")

    def encode(self, tile: torch.Tensor, origin: tuple[int, int, int]) -> torch.Tensor:
        return (tile - 0.05) * 20

    def decode(self, features: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        return features.expand(-1, text.shape[0], -1, -1, -1).clone()


class Distances:
    """Prompt p is the class p of a label map that is stretched over the network grid: a signed distance in voxels."""

    patch_size, device = (64, 64, 64), torch.device("cpu")

    def __init__(self, labels: np.ndarray, shape: tuple[int, int, int]) -> None:
        from scipy.ndimage import distance_transform_edt, zoom

        stretched = zoom(labels, np.array(shape) / labels.shape, order=0, mode="nearest", grid_mode=True)
        classes = [number for number in np.unique(stretched) if number]
        self.distances = np.empty((len(classes), *shape), dtype=np.int8)
        for row, number in enumerate(classes):
            inside = stretched == number
            signed = distance_transform_edt(inside) - distance_transform_edt(~inside)
            self.distances[row] = np.clip(np.round(4 * signed), -120, 120)

    def encode(self, tile: torch.Tensor, origin: tuple[int, int, int]) -> np.ndarray:
        place = tuple(slice(at, at + side) for at, side in zip(origin, self.patch_size, strict=True))
        return self.distances[(slice(None), *place)]

    def decode(self, features: np.ndarray, text: torch.Tensor) -> torch.Tensor:
        rows = torch.from_numpy(features[text[:, 0].long().numpy()]).float() / 4
        missing = [want - have for want, have in zip(self.patch_size, rows.shape[1:], strict=True)]
        return torch.nn.functional.pad(rows, [n for side in reversed(missing) for n in (0, side)], value=-30)[None]


def main() -> None:
    """Runs one case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scan", type=Path, nargs="?")
    parser.add_argument("--make", type=Path)
    parser.add_argument("--case", choices=["bundled", "organs", "body"], default="bundled")
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--labels", type=Path)
    parser.add_argument("--exact", action="store_true")
    parser.add_argument("--memory", help="a budget, as in 4GB")
    parser.add_argument("--spacing", type=float, help="voxels of the network grid in mm; those of the bundled model")
    args = parser.parse_args()
    if args.make:
        make_scan(args.make)
        return
    from mome.inference import PreparedPrompts, Segmenter
    from mome.inference.memory_plan import MemoryPlan, Work
    from mome.labels import Resolved, load_table
    from mome.prompts import Prompt
    from mome.volumes import read_volume

    options = {"memory": args.memory} if args.memory else {}
    segmenter = Segmenter("mome-ct-tiny", exact=args.exact or args.case == "organs", **options)
    if args.spacing:
        segmenter.processor.spacing = [args.spacing] * 3
    names = [label.name for label in load_table()][: args.prompts]
    if args.case == "bundled":
        prepared = segmenter.prepare(names)
    else:
        if args.case == "organs":
            import nibabel as nib

            shape = segmenter.processor.network_grid(read_volume(args.scan).grid).shape
            # the classes of the label map in RAS, as the network grid is
            image = nib.as_closest_canonical(nib.load(args.labels))
            segmenter.predictor = Distances(np.asarray(image.dataobj), shape)
            names = [f"class {number}" for number in range(len(segmenter.predictor.distances))]
        else:
            segmenter.predictor = Body()
        prompts = [Prompt(name, name, Resolved(name, None, None, "free", None), True, None) for name in names]
        prepared = PreparedPrompts(prompts, torch.arange(len(names), dtype=torch.float32)[:, None])
    timed = Timed(segmenter.predictor)
    segmenter.predictor = timed
    reset_peak()
    before, began = memory_gb("VmRSS"), time.perf_counter()
    volume = read_volume(args.scan)
    read_s, read_peak = time.perf_counter() - began, memory_gb("VmHWM")
    reset_peak()
    began = time.perf_counter()
    result = segmenter.segment(volume, prepared)
    segment_s, segment_peak, after = time.perf_counter() - began, memory_gb("VmHWM"), memory_gb("VmRSS")
    reset_peak()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        paths = result.save(folder, "scan")
        save_s, save_peak = time.perf_counter() - began, memory_gb("VmHWM")
        written = sum(path.stat().st_size for path in paths)
    part = segmenter.load(volume).network.shape
    work = Work(volume.shape, part, timed.patch_size, len(names), segmenter.network_bytes or 0)
    plan = MemoryPlan(len(names), segmenter.decoded_at_once, half_sums=not segmenter.exact)
    voxels = result.masks.voxels
    print(
        json.dumps(
            {
                "case": args.case,
                "prompts": len(names),
                "scan": list(volume.shape),
                "threads": torch.get_num_threads(),
                "precision": segmenter.precision,
                "exact": segmenter.exact,
                "tiles": timed.tiles,
                "masks_with_voxels": sum(count > 0 for count in voxels.values()),
                "share_of_scan": round(sum(voxels.values()) / volume.array.size, 3),
                "seconds": {
                    "read": round(read_s, 1),
                    "segment": round(segment_s, 1),
                    "inside of the network": round(timed.seconds, 1),
                    "save": round(save_s, 1),
                    "whole": round(read_s + segment_s + save_s, 1),
                    "phases": result.seconds,
                },
                "gigabytes": {
                    "before": round(before, 2),
                    "peak reading": round(read_peak, 2),
                    "peak segmenting": round(segment_peak, 2),
                    "after segmenting": round(after, 2),
                    "peak saving": round(save_peak, 2),
                    "scan in float32": round(volume.array.nbytes / 1e9, 2),
                    "written": round(written / 1e9, 3),
                },
                "network grid": list(part),
                "expected gigabytes at most": {key: round(n / 1e9, 3) for key, n in plan.bytes_of(work).items()},
                "notes": [note for note in result.notes if "fills" not in note],
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
