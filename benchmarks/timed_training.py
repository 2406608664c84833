"""Trains a recipe for a given time; other processes of this script make its patches.

    python benchmarks/timed_training.py examples/configs/mome_ct_tiny_2.yaml --seconds 130 --workers 12

It differs from `mome train` in that the learning rate and the end follow the time, not the steps, that patches are
rounded to 8 bits, and that no state is kept to resume from. `training.json` tells the steps; `mome train` with
`train.steps` of that number is the same training up to these differences. `model` is what `benchmarks/bundle.py` takes;
it is also saved every 30 seconds on the way. `--cached` and `--texts` are those of `neck_study.py`.
"""

from __future__ import annotations

import argparse
import dataclasses
import subprocess
import sys
import time
from pathlib import Path

import torch
from neck_arms import cached_sources
from stored_patches import StoredPatches
from stored_texts import use_stored_texts
from study_training import Limits, fit, open_dataset

from mome.presets import preset
from mome.training.config import RunConfig
from mome.training.config_file import load_run_config
from mome.training.setup import build_model

SLOTS = 2000  # patches of 64³ voxels in 8 bits and their masks: 1 GB


def run_config(args: argparse.Namespace) -> RunConfig:
    """Returns the settings of the run."""
    run = load_run_config(args.recipe, args.overrides)
    return dataclasses.replace(run, sources=cached_sources(run.sources, args.cached)) if args.cached else run


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--workers", type=int, default=4, help="processes that make patches")
    parser.add_argument("--worker", type=int, help="makes the patches of this worker and ends")
    parser.add_argument("--patches", type=Path, help="folder of patches; train.out/patches by default")
    parser.add_argument("--cached", type=Path, help="folder of the caches of another machine")
    parser.add_argument("--texts", type=Path, help="file of stored_texts.py")
    parser.add_argument("--kernels-file", type=Path, help="torch code runs until this file exists")
    parser.add_argument("--set", dest="overrides", nargs="*", default=[], metavar="KEY=VALUE")
    args = parser.parse_args()
    deadline = time.time() + args.seconds
    if torch.cuda.is_available() or args.worker is not None:
        torch.set_num_threads(1)
    run = run_config(args)
    patches = args.patches or Path(run.train.out) / "patches"
    dataset, _ = open_dataset(run, run.model.get("patch_size", preset(run.preset)["model"]["patch_size"]))
    if args.worker is not None:
        StoredPatches(patches, dataset, SLOTS).write(args.worker, args.workers)
        return
    command = [sys.executable, sys.argv[0], "--patches", str(patches)]
    workers = [subprocess.Popen([*command, "--worker", str(i), *sys.argv[1:]]) for i in range(args.workers)]
    try:
        if args.texts:
            use_stored_texts(args.texts)
        model, processor = build_model(run)
        limits = Limits(deadline=deadline, by_time=True, save_every=30)
        fit(run, model, dataset, processor, patches=patches, limits=limits, slots=SLOTS, kernels_file=args.kernels_file)
    finally:
        for worker in workers:
            worker.terminate()


if __name__ == "__main__":
    main()
