"""Finds better tile sizes for the GPU it runs on: `python kernels/benchmarks/tune.py --out DIR --minutes M`.

The script writes two files. DIR/tuning_<device>.json holds every measured candidate; another call with the same folder
continues from it. DIR/<architecture>.json is the shipped table, with the rows for which a faster candidate was found
and confirmed. Nothing is copied into the package. Without a GPU the script prints a line and exits with 2. `--rehearse`
tunes two rows in Triton's interpreter on the CPU, to test the script; its files are marked as a rehearsal.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

if __name__ == "__main__" and "--rehearse" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is imported

import torch

_HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(_HERE), str(_HERE.parent / "torch-ext")]

from mome_kernels.gpu import configs  # noqa: E402
from mome_kernels.gpu.launch import Machine, machine_of  # noqa: E402
from results import Results, minutes, opened  # noqa: E402
from shapes import SHAPES, Shape  # noqa: E402
from tuning_cases import Case, Config, Row, rows  # noqa: E402
from tuning_compile import Compiler  # noqa: E402
from tuning_measure import DeviceLost, OutOfTime, Tuner  # noqa: E402
from tuning_search import dump_table, text_of  # noqa: E402

KERNELS = ("mlp", "mlp_dx", "mlp_dw", "linear", "dw")


def table_with(arch: str, chosen: dict[Row, Config]) -> dict[str, list[dict[str, Any]]]:
    """The shipped table with these configurations; rows, bounds and order stay."""
    table = copy.deepcopy(configs.table(arch))
    for (kernel, index), config in chosen.items():
        table[kernel][index] = {"up_to": table[kernel][index]["up_to"], **config}
    return table


def tiny() -> Iterable[Shape]:
    """A fused layer and one of grouped products for a rehearsal, which runs in float32."""
    yield replace(SHAPES["V1"], T=96, D=16, F=24)
    yield replace(SHAPES["L5"], T=40, D=80, F=32, E=4, K=2)


def _tuner(results: Results, deadline: float, rehearse: bool) -> tuple[Tuner, Compiler | None]:
    if rehearse:
        machine = machine_of(torch.empty(0))
        return Tuner(results, machine, "cpu", torch.float32, deadline, narrow=True), None
    from triton.runtime.driver import driver

    target = driver.active.get_current_target()
    shared = driver.active.utils.get_device_properties(torch.cuda.current_device())["max_shared_mem"]
    compiler = Compiler(min(16, len(os.sched_getaffinity(0))))
    tuner = Tuner(
        results, machine_of(torch.empty(0, device="cuda")), "cuda", torch.bfloat16, deadline, compiler,
        (target.backend, target.arch, target.warp_size), shared,
    )  # fmt: skip
    return tuner, compiler


def _count_late_compilations(counts: dict[str, int]) -> None:
    """Counts launches whose kernel the workers had not compiled, which shows that the keys of the cache differ."""
    from triton import knobs

    def listener(*, cache_hit: bool, **_: Any) -> None:
        counts["found" if cache_hit else "late"] += 1

    knobs.compilation.listener = listener


def run_rows(tuner: Tuner, found: Mapping[Row, list[Case]]) -> tuple[dict[Row, Config], list[str], int]:
    """Returns the chosen configurations, the names of the rows left for another call, and the exit status."""
    chosen: dict[Row, Config] = {}
    left: list[str] = []
    status = 0
    for row, outcome in tuner.tune_all(found).items():
        text = f"{row[0]} {row[1]}"
        if isinstance(outcome, (OutOfTime, DeviceLost)):
            left.append(text)
            if isinstance(outcome, DeviceLost) and not status:
                print(f"{text}: the device is lost ({outcome}); call again to continue", file=sys.stderr)
                status = 1
            continue
        if outcome is not None:
            chosen[row] = outcome
        names = [f"{text} {case.name}" for case in found[row]]
        broken = [name for name in names if "problem" in tuner.results.data["steps"].get(name, {})]
        what = "as shipped" if outcome is None else text_of(outcome)
        print(f"{text}: {what}{'; could not run ' + ', '.join(broken) if broken else ''}", flush=True)
    return chosen, left, status


def rows_to_tune(options: argparse.Namespace, machine: Machine, size: int) -> dict[Row, list[Case]]:
    """The rows of the chosen kernels that the chosen shapes select; two rows in a rehearsal."""
    if options.rehearse:
        return {row: cases for row, cases in rows(tiny(), machine, size).items() if row[0] in ("mlp", "dw")}
    shapes = [shape for name, shape in SHAPES.items() if name in options.shapes]
    return {row: cases for row, cases in rows(shapes, machine, size).items() if row[0] in options.kernels}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--out", type=Path, required=True, help="folder of the JSON; may hold an earlier call's")
    parser.add_argument("--minutes", type=minutes, default=10.0, help="no measurement is begun after this time")
    parser.add_argument("--rehearse", action="store_true", help="two rows in Triton's interpreter, to try the script")
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=KERNELS, help="tune the rows of these only")
    parser.add_argument("--shapes", nargs="+", choices=tuple(SHAPES), default=tuple(SHAPES), help="time these only")
    options = parser.parse_args(arguments)
    deadline = time.monotonic() + 60 * options.minutes
    results = opened("tune.py", options, "tuning_")
    if results is None:
        return 2
    counts = {"found": 0, "late": 0}
    if not options.rehearse:
        _count_late_compilations(counts)
    tuner, compiler = _tuner(results, deadline, options.rehearse)
    try:
        chosen, left, status = run_rows(tuner, rows_to_tune(options, tuner.machine, tuner.dtype.itemsize))
    finally:
        if compiler is not None:
            compiler.close()
    arch = tuner.machine.arch
    path = options.out / f"{arch}{'_rehearsal' if options.rehearse else ''}.json"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(dump_table(table_with(arch, chosen)))
    os.replace(temporary, path)
    print(f"{path}: {len(chosen)} rows changed; left for another call: {', '.join(left) or 'none'}")
    if counts["late"]:
        print(f"compiled in a launch: {counts['late']} of {sum(counts.values())} kernels, the others beforehand")
    return status


if __name__ == "__main__":
    raise SystemExit(main())
