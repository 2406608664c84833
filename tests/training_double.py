"""Trains like `examples/train.py`, with weights in float64: `training_double.py RECORDS --config run.yaml …`.

In float64, the losses of one process and of two can be compared closely. RECORDS is a folder in which every process
writes its number in the system, `<rank>.pid`, and a line for every volume that it validates, `<rank>.validated`.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mome.training.loop as loop
import mome.training.validation as validation
from mome.cli.train import main
from mome.inference.stream import stream_logits
from mome.training.setup import build_model_of_init


def build_double(run: Any) -> Any:
    """The model of a run in float64, its processor, and the labels that its first weights know."""
    model, processor, known = build_model_of_init(run)
    return model.double(), processor, known


def recorded(path: Path) -> Any:
    """`stream_logits`, which writes a digest of every volume into a file."""

    def stream(predictor: Any, volume: Any, *arguments: Any, **options: Any) -> Iterator[Any]:
        with path.open("a") as file:
            file.write(hashlib.sha256(volume.numpy().tobytes()).hexdigest() + "\n")
        return stream_logits(predictor, volume, *arguments, **options)

    return stream


if __name__ == "__main__":
    records, rank = Path(sys.argv[1]), os.environ.get("RANK", "0")
    records.mkdir(parents=True, exist_ok=True)
    (records / f"{rank}.pid").write_text(str(os.getpid()))
    loop.build_model_of_init = build_double
    validation.stream_logits = recorded(records / f"{rank}.validated")
    sys.exit(main(sys.argv[2:]))
