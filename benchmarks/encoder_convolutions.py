"""Times the encoders of the bundled models: small convolutions of a tile by oneDNN, and by PyTorch's own code.

    python benchmarks/encoder_convolutions.py --out benchmarks/results/encoder_convolutions.json

Both encode the same tile of random numbers in turn, in one process, float32 on the CPU; see
`mome/inference/onednn_convolutions.py`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from processes import commit_of, machine

from mome.inference import Segmenter
from mome.inference.compiled import CompiledPredictor
from mome.inference.predictor import ModelPredictor

MODELS = ("mome-ct-tiny", "mome-ct-torso-tiny")


class PlainPredictor(ModelPredictor):
    """A predictor that leaves convolutions to PyTorch, as a compiled one does."""

    _convolutions = CompiledPredictor._convolutions


def timed(name: str, rounds: int) -> dict[str, float]:
    """Returns the medians in seconds, and the median ratio of a round."""
    model = Segmenter(name, precision="fp32").model
    tile = torch.rand(1, 1, *model.config.patch_size, generator=torch.Generator().manual_seed(0))
    sides = {"pytorch": PlainPredictor(model), "onednn": ModelPredictor(model)}
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    with torch.inference_mode():
        for number in range(rounds + 2):  # the first two rounds warm up
            for side, predictor in sides.items():
                began = time.perf_counter()
                predictor.encode(tile, (0, 0, 0))
                if number >= 2:
                    seconds[side].append(time.perf_counter() - began)
    ratios = [ours / theirs for ours, theirs in zip(seconds["onednn"], seconds["pytorch"], strict=True)]
    found = {side: round(statistics.median(values), 4) for side, values in seconds.items()}
    return {**found, "ratio": round(statistics.median(ratios), 3)}


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    models = {name: timed(name, args.rounds) for name in MODELS}
    header = {"commit": commit_of(Path(__file__).resolve().parents[1]), "machine": machine(), "rounds": args.rounds}
    args.out.write_text(json.dumps({**header, "threads": torch.get_num_threads(), "models": models}, indent=1) + "\n")
    print(json.dumps(models, indent=1))


if __name__ == "__main__":
    main()
