"""Copies the model of a training run into the package as a bundled checkpoint, in half precision.

    python benchmarks/bundle.py runs/mome_ct_tiny/model --name mome-ct-tiny --overlap 0.25
    python benchmarks/bundle.py runs/mome_ct_torso_tiny/model --name mome-ct-torso-tiny --drop gallbladder --extend 15

`--overlap` is the overlap of tiles that the model needs (`benchmarks/results/tile_overlap.md`), `--extend` how many mm
scans are continued beyond their ends (`benchmarks/results/torso_held_out.md`).
`--drop` takes a structure off the list of those that the weights know: prompts of it are then warned about. A README.md
that lies in the checkpoint's folder is kept.
Half precision halves the size of the file. Loading converts the weights back to float32, so inference runs in float32.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch

import mome
from mome import MoME
from mome.atomic import atomic_write
from mome.processing import MoMEProcessor

LIMIT_MB = 10


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="the folder `model` of a run")
    parser.add_argument("--name", default="mome-ct-tiny")
    parser.add_argument("--drop", nargs="*", default=[], help="trained structures that do not work well enough")
    parser.add_argument("--overlap", type=float, help="of tiles, 0 to 0.9; the run's processor says where not given")
    parser.add_argument("--extend", type=float, help="mm beyond the ends of a scan, 0 to 200; likewise")
    args = parser.parse_args()
    folder = Path(mome.__file__).parent / "checkpoints" / args.name
    model, processor = MoME.from_pretrained(args.model, dtype=torch.float16), MoMEProcessor.from_pretrained(args.model)
    if args.overlap is not None:
        processor.overlap = args.overlap
    if args.extend is not None:
        processor.extend_mm = args.extend
    unknown = set(args.drop) - set(model.config.trained_labels)
    if unknown:
        raise SystemExit(f"--drop {min(unknown)}: the model was not trained on it")
    model.relabel(list(model.config.labels), [n for n in model.config.trained_labels if n not in args.drop])
    with atomic_write(folder, "the checkpoint") as part:
        model.save_pretrained(part)
        processor.save_pretrained(part)
        if (folder / "README.md").is_file():
            shutil.copyfile(folder / "README.md", part / "README.md")
        size = (part / "model.safetensors").stat().st_size / 1e6
        if size > LIMIT_MB:
            raise SystemExit(f"{size:.1f} MB of weights, more than the {LIMIT_MB} MB that the package may carry")
    print(f"{folder}: {size:.1f} MB")


if __name__ == "__main__":
    main()
