"""Segments one scan with Segmenter, MONAI's sliding window and KonfAI: time, memory, agreement of the masks.

    export MOME_TEST_DATA=…      # the folder that contains torso/
    pip install --target ../konfai --no-deps konfai==1.8.7 ruamel.yaml
    python benchmarks/inference_peers.py --konfai ../konfai --work ../scans --rounds 5 \\
      --out benchmarks/results/inference_peers.json

The scan is `torso/ts_example_ct` at 2 mm, the network the bundled model with 32 prompts. All sides use the same
network, windows of 64³ voxels, an overlap of one half and Gaussian weights, and give masks on the scan's grid. As many
windows begin in even steps on our side, and half a window apart with a shorter last step on MONAI's. Each run has a
process of its own, and the sides run in turn.

- `exact`: `Segmenter` in float32, every tile computed.
- `default`: `Segmenter` with its default settings, which is bfloat16 where the processor has it.
- `default_fp32`: these with float32 in the network.
- `compiled`: the default settings with `--compile`; compilation is not in the seconds. Only where `--sides` names it.
- `monai`: `monai.inferers.sliding_window_inference` with one window at a time (`--windows`), then trilinear
  interpolation of all logits by torch and a threshold. MONAI's `SpatialResample` gives the same in twice the time.
- `konfai`: KonfAI's prediction workflow; see `konfai_side.py`. Without `--konfai` it is left out.
- `konfai_streamed`: the same under a memory budget of 1 GiB, below which KonfAI streams this scan plane by plane.

Seconds begin with the scan in memory (KonfAI: with an uncompressed file) and end with all masks (KonfAI: in a file).
Seconds outside the network are those not spent in the model's `encode` and `decode`. Memory is the highest resident
memory of the run above that of the process with the loaded model, after one tile has gone through the network.
A run takes about 10 s on two idle cores, besides 10 s of loading.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from processes import commit_of, in_turns, machine, medians, packages_of, probe, ratios, write_results

CHECKOUT = Path(__file__).resolve().parents[1]
PROMPTS = 32
OVERLAP = 0.5
OURS = ("exact", "default", "default_fp32", "compiled")
KONFAI = {"konfai": None, "konfai_streamed": "1GiB"}  # memory budget


def tile_logits(segmenter: Any, text_PT: Any) -> Any:
    """A function from tiles (B, 1, D, H, W) to logits (B, P, D, H, W) of the segmenter's network.

    It calls the network itself: what our predictor does on top, such as oneDNN for small convolutions, is ours.
    """
    import torch

    predictor = segmenter.predictor
    model, kind = predictor.model, predictor.device.type

    def logits(tiles: Any) -> Any:
        with torch.autocast(kind, predictor.autocast, enabled=predictor.autocast is not None):
            return model.decode(model.encode(tiles), text_PT).float()

    return logits


def monai_masks(segmenter: Any, prepared: Any, volume: Any, windows: int) -> dict[str, Any]:
    """Masks (bool tensors on the CPU) of MONAI's sliding window over the segmenter's network, on its device.

    Args:
        segmenter: The Segmenter whose network, processor and tile size are used.
        prepared: What its `prepare` returned.
        volume: The scan.
        windows: Windows that are computed at once.
    """
    import torch
    from monai.inferers import sliding_window_inference

    predictor = segmenter.predictor
    logits = tile_logits(segmenter, prepared.text_PT.to(predictor.device))
    tensor, grid = segmenter.processor.to_network(volume)
    stitched = sliding_window_inference(
        tensor.to(predictor.device), predictor.patch_size, windows, logits, overlap=OVERLAP, mode="gaussian"
    )
    # Both grids begin at the same outer face, and the network's reaches beyond the scan's by less than a voxel.
    factors = tuple(a / b for a, b in zip(grid.spacing, volume.spacing, strict=True))
    back = torch.nn.functional.interpolate(
        stitched, scale_factor=factors, mode="trilinear", recompute_scale_factor=False
    )
    i, j, k = volume.shape
    return dict(zip(prepared.names, (back[0, :, :i, :j, :k] > 0).cpu(), strict=True))


def run_side(side: str, scan: Path, masks: Path, windows: int) -> dict[str, Any]:
    """Runs one side in this process and writes its masks, packed, to a file."""
    import numpy as np
    import torch
    from network_time import NetworkTime
    from peak_memory import peak_mib, reset_peak
    from segmenter_modes import MODEL, MODES

    from mome.inference import Segmenter
    from mome.volumes import read_volume

    volume = read_volume(scan)
    segmenter = Segmenter(MODEL, overlap=OVERLAP, **MODES[side if side in OURS else "exact"])
    prepared = segmenter.prepare(list(segmenter.model.config.labels[:PROMPTS]))
    patch, text_PT, processor = segmenter.predictor.patch_size, prepared.text_PT, segmenter.processor
    network = NetworkTime(segmenter.predictor.model)

    logits = tile_logits(segmenter, text_PT)

    def ours() -> Any:
        return segmenter.segment(volume, prepared).masks

    def monai() -> Any:
        return monai_masks(segmenter, prepared, volume, windows)

    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        if side in KONFAI:
            import konfai_side

            konfai_network = konfai_side.OneOutput(segmenter.model, logits, processor)
            weights = konfai_side.prepare(Path(folder), volume, konfai_network)
            call = partial(
                konfai_side.segment,
                Path(folder),
                weights,
                patch,
                processor.spacing,
                overlap=int(OVERLAP * min(patch)),
                memory_budget=KONFAI[side],
            )
        else:
            call = ours if side in OURS else monai
            if side == "monai":
                import monai.inferers  # noqa: F401  # loading it is no part of the run
        empty = torch.zeros(1, 1, *patch)
        if side in OURS:  # with what our predictor adds to the network, such as a compiled head
            segmenter.predictor.decode(segmenter.predictor.encode(empty, (0, 0, 0)), text_PT)
        else:
            logits(empty)
        network.reset()
        before = reset_peak()
        began = time.perf_counter()
        result = call()
        seconds = time.perf_counter() - began
        peak = peak_mib() - before
        found = konfai_side.read_masks(result, prepared.names) if side in KONFAI else result
        np.savez(masks, **{name: np.packbits(np.asarray(found[name], dtype=bool)) for name in prepared.names})
    return {
        "seconds": seconds,
        "network_seconds": network.seconds,
        "outside_seconds": seconds - network.seconds,
        "memory_mib": peak,
        "tiles": network.tiles,
        "model_mib": before,
        "precision": segmenter.precision,
        "threads": torch.get_num_threads(),
    }


def agreement(masks: Path, reference: Path) -> dict[str, Any]:
    """The lowest and the mean Dice of two sides over the prompts where one of both masks is not empty."""
    import numpy as np

    from mome.metrics import dice

    with np.load(masks) as ours, np.load(reference) as theirs:
        scores = {name: dice(np.unpackbits(ours[name]), np.unpackbits(theirs[name])) for name in theirs}
    defined = {name: value for name, value in scores.items() if not math.isnan(value)}
    if not defined:
        return {"not_empty": 0}
    worst = min(defined, key=defined.__getitem__)
    return {
        "lowest": defined[worst],
        "lowest_of": worst,
        "mean": sum(defined.values()) / len(defined),
        "not_empty": len(defined),
    }


def compare(runs: dict[str, list[dict[str, Any]]], work: Path) -> dict[str, Any]:
    """Medians of each side, its ratios to MONAI in the same round, and the Dice of its masks with the exact ones."""
    report: dict[str, Any] = {}
    for side, entries in runs.items():
        report[side] = {**medians(entries), "precision": entries[0]["precision"]}
        if side != "exact" and "exact" in runs:
            report[side]["dice_with_exact"] = agreement(work / f"{side}.npz", work / "exact.npz")
        if side != "monai" and "monai" in runs:
            report[side]["ratio_to_monai"] = {
                key: ratios([run[key] for run in entries], [run[key] for run in runs["monai"]])
                for key in ("seconds", "outside_seconds", "memory_mib")
            }
    return report


def show(report: dict[str, Any]) -> None:
    """Prints one line per side."""
    print(f"{'':<16}{'s':>8}{'outside s':>11}{'MiB':>8}   ratios to MONAI (median of rounds)   Dice with exact")
    for side, row in report.items():
        line = f"{side:<16}{row['seconds']:>8.2f}{row['outside_seconds']:>11.2f}{row['memory_mib']:>8.0f}"
        for key, name in (("seconds", "time"), ("outside_seconds", "outside"), ("memory_mib", "memory")):
            if "ratio_to_monai" in row:
                line += f"   {name} {row['ratio_to_monai'][key]['median']:.2f}"
        found = row.get("dice_with_exact", {})
        if found.get("not_empty"):
            line += f"   lowest {found['lowest']:.4f} mean {found['mean']:.4f} ({found['not_empty']} prompts)"
        print(line)


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("MOME_TEST_DATA"), help="contains torso/")
    parser.add_argument("--work", type=Path, required=True, help="folder for the scan and the masks")
    parser.add_argument("--sides", nargs="+", choices=[*OURS, "monai", *KONFAI], help="default: all that can run")
    parser.add_argument("--konfai", type=Path, help="folder of packages that contains KonfAI")
    parser.add_argument("--windows", type=int, default=1, help="windows that MONAI computes at once")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peer-rounds", type=int, help="rounds in which KonfAI takes part; default all")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 for torch's choice")
    parser.add_argument("--out", type=Path, help="write the results to this JSON file")
    parser.add_argument("--probe", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.probe:
        scan = args.work / "torso_2mm.nii.gz"
        print(json.dumps(run_side(args.probe, scan, args.work / f"{args.probe}.npz", args.windows)))
        return
    if args.data is None:
        parser.error("--data or MOME_TEST_DATA must name the folder that contains torso/")
    from inference_scans import torso_at_2_mm

    work = args.work.resolve()
    torso_at_2_mm(Path(args.data), work)
    sides = args.sides or [*OURS[:-1], "monai", *(KONFAI if args.konfai else [])]
    header = {"commit": commit_of(CHECKOUT), "machine": machine(), "rounds": args.rounds, "windows": args.windows}
    script = [str(Path(__file__).resolve()), "--work", str(work), "--windows", str(args.windows), "--probe"]

    def run(side: str) -> dict[str, Any]:
        packages = [*packages_of(CHECKOUT), *([args.konfai.resolve()] if side in KONFAI else [])]
        result = probe(sys.executable, [*script, side], packages=packages, threads=args.threads)
        print(f"{side:<16}{result['seconds']:>8.2f} s, {result['memory_mib']:.0f} MiB", flush=True)
        return result

    def keep(runs: dict[str, list[dict[str, Any]]]) -> None:
        write_results(args.out, {**header, "sides": compare(runs, work), "runs": runs})

    peer_rounds = args.rounds if args.peer_rounds is None else args.peer_rounds
    rounds = {side: peer_rounds if side in KONFAI else args.rounds for side in sides}
    show(compare(in_turns({side: partial(run, side) for side in sides}, rounds, keep), work))


if __name__ == "__main__":
    main()
