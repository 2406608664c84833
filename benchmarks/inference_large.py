"""Segments a scan of 512 × 512 × 600 voxels for 100 prompts: peak memory, seconds by phase, seconds of writing.

    export MOME_TEST_DATA=…      # the folder that contains torso/
    python benchmarks/inference_large.py --work ../scans --out benchmarks/results/inference_large.json

The scan is LIDC-IDRI-0001 (0.70 × 0.70 mm in plane), continued by its mirror image to 600 planes of 1 mm. Each case has
a process of its own and the default settings of `Segmenter`; it reads the scan, segments it and writes a mask per
prompt. The model is the bundled one with 100 prompts in all cases.

- `bundled`: its own logits. It knows seven structures of the neck, so most masks are empty or small.
- `real`: its logits are replaced by the signed distances of the 89 structures of the scan; 11 of them stand twice.
  The network runs too, so the time is that of a model which knows these structures.
- `worst`: likewise, with the whole body and the table as every mask.

Seconds of the network are those in the model's `encode` and `decode`. Memory is the highest resident memory of the
whole process, with Python, torch and the model. `--planes` makes a smaller scan.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from processes import commit_of, in_turns, machine, medians, packages_of, probe, write_results

CHECKOUT = Path(__file__).resolve().parents[1]
CASES = ("bundled", "real", "worst")
PROMPTS = 100


def run_case(case: str, data: Path, work: Path, planes: int, mode: str) -> dict[str, Any]:
    """Runs one case in this process."""
    import torch
    from inference_scans import long_scan
    from network_time import NetworkTime
    from peak_memory import peak_mib, reset_peak
    from segmenter_modes import MODEL, MODES

    from mome.inference import Segmenter
    from mome.volumes.fast_gzip import deflate_library

    scan = long_scan(data, work, planes)
    segmenter = Segmenter(MODEL, **MODES[mode])
    network = NetworkTime(segmenter.model)
    prepared = known_prompts(segmenter, case, data, work, planes)
    network.reset()
    loaded = reset_peak()
    began = time.perf_counter()
    result = segmenter.segment(scan, prepared)
    segmented = time.perf_counter()
    network_seconds = network.seconds
    with tempfile.TemporaryDirectory(dir=work) as folder:
        written = result.save(folder, "scan")
        finished = time.perf_counter()
        mask_mib = sum(path.stat().st_size for path in written) / 2**20
    voxels = [result.masks.voxels[name] for name in prepared.names]
    peak = peak_mib()
    return {
        "check_dice": None if case == "bundled" else check_dice(segmenter, result, prepared, voxels),
        "seconds": finished - began,
        "segment_seconds": segmented - began,
        "write_seconds": finished - segmented,
        "network_seconds": network_seconds,
        "network_share": network_seconds / (finished - began),
        "peak_mib": peak,
        "loaded_mib": loaded,
        "tiles": network.tiles,
        "masks": len(written),
        "not_empty": sum(count > 0 for count in voxels),
        "positive_voxels": sum(voxels),
        "mask_mib": mask_mib,
        "phases": result.seconds,
        "precision": segmenter.precision,
        "threads": torch.get_num_threads(),
        "gzip": deflate_library()[0].__name__.split(".")[0],
    }


def known_prompts(segmenter: Any, case: str, data: Path, work: Path, planes: int) -> Any:
    """Prepares 100 prompts, and gives the segmenter known logits where the case has them."""
    from inference_scans import body_distances, long_scan, structure_distances
    from known_logits import KnownLogits, with_structures

    from mome.inference import PreparedPrompts
    from mome.volumes import read_volume

    labels = list(segmenter.model.config.labels)
    if case == "bundled":
        return segmenter.prepare(labels[:PROMPTS])
    volume = read_volume(long_scan(data, work, planes))
    if case == "real":
        names, distances = structure_distances(data, work, planes, segmenter.processor)
        others = [label for label in labels if label not in names]
        names = (names + others)[:PROMPTS]
        structures = [index % len(distances.boxes) for index in range(PROMPTS)]
    else:
        names, structures = labels[:PROMPTS], [0] * PROMPTS
        distances = body_distances(volume, segmenter.processor)
    prepared = segmenter.prepare(names)
    scan_11DHW, _ = segmenter.processor.to_network(volume)
    segmenter.predictor = KnownLogits(segmenter.predictor, distances, scan_11DHW[0])
    return PreparedPrompts(prepared.prompts, with_structures(prepared.text_PT, structures))


def check_dice(segmenter: Any, result: Any, prepared: Any, voxels: list[int]) -> float:
    """Dice of the largest mask and of its logits, resampled at once: says that the logits came where they belong."""
    from mome.metrics import dice
    from mome.volumes import resample

    largest = max(range(len(voxels)), key=voxels.__getitem__)
    logits = segmenter.predictor.distances.dense(int(prepared.text_PT[largest, 0]))
    network = segmenter.processor.network_grid(result.grid)
    expected = resample(logits, network, result.grid, fill=-1.0, antialias=False).numpy() > 0
    return dice(result.masks[prepared.names[largest]], expected)


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("MOME_TEST_DATA"), help="contains torso/")
    parser.add_argument("--work", type=Path, required=True, help="folder for the scan")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--mode", choices=("default", "exact"), default="default", help="settings of the segmenter")
    parser.add_argument("--planes", type=int, default=600)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 for torch's choice")
    parser.add_argument("--out", type=Path, help="write the results to this JSON file")
    parser.add_argument("--probe", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.data is None:
        parser.error("--data or MOME_TEST_DATA must name the folder that contains torso/")
    data, work = Path(args.data).resolve(), args.work.resolve()
    if args.probe:
        print(json.dumps(run_case(args.probe, data, work, args.planes, args.mode)))
        return
    from inference_scans import long_scan

    long_scan(data, work, args.planes)
    header = {
        "commit": commit_of(CHECKOUT),
        "machine": machine(),
        "rounds": args.rounds,
        "planes": args.planes,
        "prompts": PROMPTS,
        "mode": args.mode,
    }
    script = [str(Path(__file__).resolve()), "--data", str(data), "--work", str(work), "--planes", str(args.planes)]
    script += ["--mode", args.mode, "--probe"]

    def run(case: str) -> dict[str, Any]:
        result = probe(sys.executable, [*script, case], packages=packages_of(CHECKOUT), threads=args.threads)
        print(
            f"{case:<8} {result['seconds']:7.1f} s (network {result['network_share']:.0%}, writing "
            f"{result['write_seconds']:.1f} s), peak {result['peak_mib'] / 1024:.2f} GiB, {result['not_empty']} masks "
            f"not empty, {result['positive_voxels'] / 1e6:.0f} million voxels, phases {result['phases']}",
            flush=True,
        )
        return result

    def keep(runs: dict[str, list[dict[str, Any]]]) -> None:
        cases = {case: medians(entries) for case, entries in runs.items()}
        write_results(args.out, {**header, "cases": cases, "runs": runs})

    in_turns({case: partial(run, case) for case in args.cases}, args.rounds, keep)


if __name__ == "__main__":
    main()
