"""Times the way to the network grid and back for 512 × 512 × 300 voxels and 32 structures, beside nnU-Net v2.

    export MOME_TEST_DATA=…      # the folder that contains torso/
    pip install --target ../nnunet nnunetv2==2.8.1     # its pins differ from ours, so it gets a folder of its own
    python benchmarks/resampling_nnunet.py --nnunet ../nnunet --work ../scans --rounds 3 --peer-rounds 1 \\
      --out benchmarks/results/resampling_nnunet.json

The scan is LIDC-IDRI-0001, 512 × 512 voxels of 0.70 mm, continued to 300 planes of 1 mm. The network's voxels are a
little below 3.9 × 3.9 × 2.5 mm, so that both grids end at the same faces, as nnU-Net takes for granted. The logits are
the signed distances of 32 structures of the scan on the network grid, saved once and given to both.

- `mome`: `Segmenter.segment` with `exact` settings and a predictor that returns these logits, tiles without overlap.
  It resamples the scan to the network grid, and the logits back to masks at threshold 0; looking for a body or
  computing a network is no part of it.
- `nnunet`: `resample_data_or_seg_to_shape` with the settings of nnU-Net's default plans: the scan at order 3, the
  logits at order 1 (`convert_predicted_logits_to_segmentation_with_correct_shape` uses these for probabilities), no
  separate axis, since no spacing is three times another. Then the masks are the logits above 0, as `sigmoid(x) > 0.5`
  gives them for classes that may overlap. It needs 12 GB.

Each run has a process of its own. Seconds begin with the scan in memory and end with all masks. On two idle cores a run
of nnU-Net takes about two minutes; `--peer-rounds` says how often it runs.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from processes import commit_of, in_turns, machine, medians, packages_of, probe, write_results

CHECKOUT = Path(__file__).resolve().parents[1]


def network_spacing(scan: Any, planes: int) -> list[float]:
    """Voxel size in mm of 92 × 92 × 120 voxels that cover the scan exactly (120 for 300 planes)."""
    sides = (92, 92, max(1, round(planes / 2.5)))
    return [step * count / side for step, count, side in zip(scan.spacing, scan.shape, sides, strict=True)]


def run_mome(data: Path, work: Path, planes: int, prompts: int) -> dict[str, Any]:
    """Runs our side in this process."""
    import numpy as np
    from inference_scans import long_scan, structure_distances
    from known_logits import KnownLogits, with_structures
    from peak_memory import peak_mib, reset_peak
    from segmenter_modes import MODEL, MODES

    from mome.inference import PreparedPrompts, Segmenter
    from mome.processing import MoMEProcessor
    from mome.volumes import read_volume

    volume = read_volume(long_scan(data, work, planes))
    processor = MoMEProcessor.from_pretrained(MODEL, spacing=network_spacing(volume, planes))
    segmenter = Segmenter(MODEL, processor, overlap=0.0, **MODES["exact"])
    names, distances = structure_distances(data, work, planes, processor)
    chosen = largest_structures(distances, prompts)
    prepared = segmenter.prepare([names[index] for index in chosen])
    segmenter.predictor = KnownLogits(None, distances)
    rows = PreparedPrompts(prepared.prompts, with_structures(prepared.text_PT, chosen))
    before = reset_peak()
    began = time.perf_counter()
    masks = segmenter.segment(volume, rows).masks
    seconds, peak = time.perf_counter() - began, peak_mib() - before
    np.savez(work / "mome_resampled.npz", **{name: np.packbits(masks[name].astype(bool)) for name in rows.names})
    return {"seconds": seconds, "memory_mib": peak, "prompts": len(chosen)}


def run_nnunet(work: Path) -> dict[str, Any]:
    """Runs nnU-Net's side in this process, which imports nothing of ours."""
    import numpy as np
    from nnunetv2.preprocessing.resampling.default_resampling import resample_data_or_seg_to_shape
    from peak_memory import peak_mib, reset_peak

    with np.load(work / "resampling_inputs.npz") as stored:
        scan, logits = stored["scan"].astype(np.float32), stored["logits"].astype(np.float32)
        names, spacing, network = stored["names"].tolist(), stored["spacing"].tolist(), stored["network"].tolist()
    before = reset_peak()
    began = time.perf_counter()
    # nnunetv2/experiment_planning/experiment_planners/default_experiment_planner.py, determine_resampling
    settings = {"is_seg": False, "order_z": 0, "force_separate_z": None}
    there = resample_data_or_seg_to_shape(scan[None], logits.shape[1:], spacing, network, order=3, **settings)
    forward = time.perf_counter() - began
    assert there.shape[1:] == logits.shape[1:]
    back = resample_data_or_seg_to_shape(logits, scan.shape, network, spacing, order=1, **settings)
    masks = back > 0
    seconds, peak = time.perf_counter() - began, peak_mib() - before
    packed = {name: np.packbits(mask) for name, mask in zip(names, masks, strict=True)}
    np.savez(work / "nnunet_resampled.npz", **packed)
    return {"seconds": seconds, "to_network_seconds": forward, "memory_mib": peak, "prompts": len(names)}


def largest_structures(distances: Any, count: int) -> list[int]:
    """The numbers of the structures with the most positive voxels; all of them have voxels."""
    sizes = [int((values > 0).sum()) for values in distances.values]
    order = sorted(range(len(sizes)), key=sizes.__getitem__, reverse=True)
    return [index for index in order if sizes[index]][:count]


def save_inputs(data: Path, work: Path, planes: int, prompts: int) -> None:
    """Writes the scan, the logits and the spacings for nnU-Net's side, which cannot import our readers."""
    import numpy as np
    from inference_scans import long_scan, structure_distances

    from mome.processing import MoMEProcessor
    from mome.volumes import read_volume

    volume = read_volume(long_scan(data, work, planes))
    processor = MoMEProcessor(spacing=network_spacing(volume, planes))
    names, distances = structure_distances(data, work, planes, processor)
    chosen = largest_structures(distances, prompts)
    network = processor.network_grid(volume.grid)
    # Our network grid runs to R, A and S; nnU-Net keeps the axes of the file.
    flips = tuple(
        axis
        for axis, (here, there) in enumerate(zip(volume.grid.orientation, network.orientation, strict=True))
        if here != there
    )
    logits = np.stack([np.flip(distances.dense(index), flips) for index in chosen]).astype(np.float16)
    np.savez(
        work / "resampling_inputs.npz",
        scan=volume.array.astype(np.int16),
        logits=logits,
        names=np.array([names[index] for index in chosen]),
        spacing=np.array(volume.spacing),
        network=np.array(processor.spacing),
    )


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("MOME_TEST_DATA"), help="contains torso/")
    parser.add_argument("--work", type=Path, required=True, help="folder for the scan, the logits and the masks")
    parser.add_argument("--nnunet", type=Path, help="folder of packages that contains nnunetv2")
    parser.add_argument("--planes", type=int, default=300)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer-rounds", type=int, default=1, help="runs of nnU-Net")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 for the libraries' choice")
    parser.add_argument("--out", type=Path, help="write the results to this JSON file")
    parser.add_argument("--probe", help=argparse.SUPPRESS)
    args = parser.parse_args()
    work = args.work.resolve()
    if args.probe == "nnunet":
        print(json.dumps(run_nnunet(work)))
        return
    if args.data is None:
        parser.error("--data or MOME_TEST_DATA must name the folder that contains torso/")
    data = Path(args.data).resolve()
    if args.probe == "inputs":
        save_inputs(data, work, args.planes, args.prompts)
        print("{}")
        return
    if args.probe:
        print(json.dumps(run_mome(data, work, args.planes, args.prompts)))
        return
    if args.nnunet is None:
        parser.error("--nnunet must name the folder of packages that contains nnunetv2")
    from inference_peers import agreement

    header = {"commit": commit_of(CHECKOUT), "machine": machine(), "planes": args.planes, "prompts": args.prompts}
    script = [str(Path(__file__).resolve()), "--data", str(data), "--work", str(work)]
    script += ["--planes", str(args.planes), "--prompts", str(args.prompts), "--probe"]

    def run(side: str) -> dict[str, Any]:
        packages = [args.nnunet.resolve()] if side == "nnunet" else packages_of(CHECKOUT)
        result = probe(sys.executable, [*script, side], packages=packages, threads=args.threads)
        if result:
            print(f"{side:<7} {result['seconds']:.2f} s, {result['memory_mib']:.0f} MiB", flush=True)
        return result

    def keep(runs: dict[str, list[dict[str, Any]]]) -> None:
        if len(runs) < 2:
            return
        sides = {side: medians(entries) for side, entries in runs.items()}
        ratio = sides["mome"]["seconds"] / sides["nnunet"]["seconds"]
        dice = agreement(work / "mome_resampled.npz", work / "nnunet_resampled.npz")
        print(f"{ratio:.3f} times the time of nnU-Net; lowest Dice {dice['lowest']:.4f} ({dice['lowest_of']})")
        write_results(args.out, {**header, "sides": sides, "ratio": ratio, "dice": dice, "runs": runs})

    run("inputs")
    rounds = {"mome": args.rounds, "nnunet": args.peer_rounds}
    in_turns({side: partial(run, side) for side in rounds}, rounds, keep)


if __name__ == "__main__":
    main()
