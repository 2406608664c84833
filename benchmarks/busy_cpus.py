"""Times one tile of a bundled model with one thread and with one per CPU, on a quiet machine and beside a busy program.

    python benchmarks/busy_cpus.py --out benchmarks/results/busy_cpus.json

Every timing has a process of its own. The busy program is a loop that keeps one CPU at work. `mome/cpu_load.py` leaves
threads out for such CPUs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from processes import commit_of, in_turns, machine, medians, packages_of, probe, write_results

from mome.threads import container_cpus

CHECKOUT = Path(__file__).resolve().parents[1]
MODEL = "mome-ct-tiny"


def tile_seconds(tiles: int) -> float:
    """The median time of a tile with all labels of the model."""
    import torch

    from mome.inference import Segmenter
    from mome.inference.predictor import ModelPredictor

    segmenter = Segmenter(MODEL, precision="fp32")
    predictor, text_PT = ModelPredictor(segmenter.model), torch.randn(7, segmenter.model.config.text_dim)
    tile = torch.rand(1, 1, *segmenter.model.config.patch_size, generator=torch.Generator().manual_seed(0))
    seconds = []
    with torch.inference_mode():
        for _ in range(tiles + 2):  # the first two warm up
            began = time.perf_counter()
            predictor.decode(predictor.encode(tile, (0, 0, 0)), text_PT)
            seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[2:])


@contextlib.contextmanager
def busy_program(running: bool) -> Iterator[None]:
    """Keeps one CPU at work, or does nothing."""
    if not running:
        yield
        return
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as process:
        try:
            yield
        finally:
            process.kill()


def timed(threads: int, busy: bool, tiles: int) -> dict[str, Any]:
    """Runs this file as a probe."""
    with busy_program(busy):
        return probe(
            sys.executable,
            [str(Path(__file__).resolve()), "--probe", str(tiles)],
            packages=packages_of(CHECKOUT),
            threads=threads,
        )


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tiles", type=int, default=10)
    parser.add_argument("--probe", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.probe:
        print(json.dumps({"seconds": tile_seconds(args.probe)}))
        return
    cpus = container_cpus()
    sides = {
        f"{threads} threads, {'busy' if busy else 'quiet'}": partial(timed, threads, busy, args.tiles)
        for busy in (False, True)
        for threads in sorted({1, cpus})
    }
    report = {"commit": commit_of(CHECKOUT), "machine": machine(), "rounds": args.rounds, "tiles": args.tiles}
    found = in_turns(sides, args.rounds)
    report["seconds"] = {name: round(medians(runs)["seconds"], 3) for name, runs in found.items()}
    report["runs"] = {name: [round(run["seconds"], 3) for run in runs] for name, runs in found.items()}
    write_results(args.out, report)
    print(json.dumps(report["seconds"], indent=1))


if __name__ == "__main__":
    main()
