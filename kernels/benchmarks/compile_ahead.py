"""Compiles what `run.py` and `tune.py` will launch, without a GPU: `python compile_ahead.py --arch sm_90`.

The kernels go into Triton's cache (TRITON_CACHE_DIR). A lent GPU then measures instead of compiling, if the cache is
carried there and both machines have the same build of Triton. Only CUDA architectures that have a table are accepted.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

_HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(_HERE), str(_HERE.parent / "torch-ext")]

from mome_kernels.gpu import configs  # noqa: E402
from mome_kernels.gpu.launch import Machine  # noqa: E402
from shapes import SHAPES  # noqa: E402
from tune import KERNELS  # noqa: E402
from tuning_cases import config_of, rows  # noqa: E402
from tuning_compile import Compiler, Job  # noqa: E402
from tuning_search import neighbours  # noqa: E402


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    tables = sorted(path.stem for path in configs._FOLDER.glob("sm_*.json"))
    parser.add_argument("--arch", choices=tables, default="sm_90")
    parser.add_argument("--processors", type=int, default=132, help="multiprocessors of the device")
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=KERNELS)
    parser.add_argument("--shapes", nargs="+", choices=tuple(SHAPES), default=tuple(SHAPES))
    parser.add_argument("--shipped-only", action="store_true", help="leave out the first candidates of a search")
    options = parser.parse_args(arguments)
    machine = Machine(options.arch, options.processors)
    target = ("cuda", int(options.arch.removeprefix("sm_")), 32)
    shapes = [shape for name, shape in SHAPES.items() if name in options.shapes]
    jobs = []
    for (kernel, index), cases in rows(shapes, machine, 2).items():
        if kernel in options.kernels:
            shipped = config_of(configs.table(machine.arch)[kernel][index])
            more = [] if options.shipped_only else neighbours(kernel, shipped)
            jobs += [Job(machine, target, (kernel, index), config, tuple(cases)) for config in [shipped, *more]]
    compiler = Compiler(len(os.sched_getaffinity(0)))
    started = time.monotonic()
    try:
        for first in range(0, len(jobs), 16):  # a part at a time, so that the progress is seen
            done = compiler(jobs[first : first + 16])
            failed = [result["problem"] for result in done if "problem" in result]
            spent = time.monotonic() - started
            print(f"{first + len(done)} of {len(jobs)} in {spent:.0f} s", *failed[:1], sep="; ", flush=True)
    finally:
        compiler.close()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
