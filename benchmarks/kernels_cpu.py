"""Times the expert ops and the fusion head on the CPU against transformers and grouped convolutions.

    python benchmarks/kernels_cpu.py --out benchmarks/results/kernels_cpu.json

This takes twelve minutes on two idle cores. Every candidate runs in its own process, because the heap that one
candidate leaves behind changes the time of the next by up to a third. Candidates are timed in turn, round after round,
so that a busy machine slows them alike, and medians are compared. `batched_mm` is timed once, because it is by far the
slowest.

Layers are timed with two settings of glibc's allocator: the default, which returns freed memory to the system and pays
for fresh pages, and one that keeps freed memory. Memory is the growth of the process's peak during a second call, with
an allocator that returns every freed block at once. So it counts the tensors that exist at the same time, but not code
and buffers that the first call loads once.

The candidates for layers are the three implementations of experts in transformers (`batched_mm` only if the matrices it
copies fit into memory). `tuned_loop` is a carefully written loop over experts, which is reported separately. For the
head, the candidate is three grouped convolutions, as in the CLIP-Driven Universal Model.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mome_kernels as kernels
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels" / "benchmarks"))
import peers
from shapes import SHAPES, expert_ids

# Swin stages, ViT and the 1×1 convolution, with token counts that take two cores about a second.
LAYERS = {"V1": 32768, "V2": 16384, "V3": 3456, "V4": 432, "V8": 864, "V14": 65536}
ALTERNATIVES = ("eager", "grouped_mm", "batched_mm", "grouped_conv")
COPIES_MIB = 3072
ALLOCATORS = {
    "default": {},
    "keeping": {"MALLOC_MMAP_THRESHOLD_": str(4 << 30), "MALLOC_TRIM_THRESHOLD_": str(8 << 30)},
    "returning": {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"},
}


def serve(function: Callable[[], Any]) -> None:
    """Times one call for every line on stdin and prints its milliseconds; runs in a separate process."""
    for _ in range(3):
        function()
    print("ready", flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        function()
        print(1e3 * (time.perf_counter() - start), flush=True)


def rounds(case: str, counts: dict[str, int], allocator: str, options: argparse.Namespace) -> dict[str, float]:
    """Median milliseconds of every candidate. They run in turn until each has run as often as its count."""
    served = {
        name: subprocess.Popen(
            command("--serve", case, name, options),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            env={**os.environ, **ALLOCATORS[allocator]},
        )
        for name in counts
    }
    times: dict[str, list[float]] = {name: [] for name in counts}
    for name, process in served.items():
        if process.stdout.readline() != "ready\n":
            raise RuntimeError(f"{case}: {name} did not start")
    names = list(served)
    for turn in range(max(counts.values())):
        first = turn % len(names)  # changes which candidate runs before which
        for name in names[first:] + names[:first]:
            if len(times[name]) < counts[name]:
                served[name].stdin.write("\n")
                line = served[name].stdout.readline()
                if not line:
                    raise RuntimeError(f"{case}: {name} ended with {served[name].wait()}")
                times[name].append(float(line))
    for process in served.values():
        process.communicate()
    return {name: statistics.median(values) for name, values in times.items()}


def batched_fits(shape: Any) -> bool:
    """Whether the matrices that transformers' `batched_mm` copies, two per assignment, fit into `COPIES_MIB`."""
    return 2 * shape.T * shape.K * shape.D * shape.F * 4 <= COPIES_MIB << 20


def layer_calls(name: str) -> dict[str, Callable[[], Any]]:
    """For every candidate, a forward and backward pass of one layer in float32."""
    shape = replace(SHAPES[name], T=LAYERS[name])
    torch.manual_seed(0)
    new = lambda *size, scale=1.0: (torch.randn(*size) * scale).requires_grad_()  # noqa: E731
    x, up = new(shape.T, shape.D), new(shape.E, shape.F, shape.D, scale=shape.D**-0.5)
    down = new(shape.E, shape.D, shape.F, scale=shape.F**-0.5)
    ids = expert_ids(shape, "uniform", "cpu")
    gates = torch.rand(shape.T, shape.K).requires_grad_()
    grad = torch.randn(shape.T, shape.D)
    functions: dict[str, Callable[[], Tensor]] = {"mome": lambda: kernels.moe_mlp(x, ids, gates, up, None, down, None)}
    alternatives = {
        "eager": peers.transformers_eager,
        "grouped_mm": peers.transformers_function("grouped_mm"),
        "tuned_loop": peers.eager_loop,
    }
    if batched_fits(shape):
        alternatives["batched_mm"] = peers.transformers_function("batched_mm")
    for alternative, function in alternatives.items():
        functions[alternative] = lambda f=function: f(x, ids, gates, up, down, "gelu", False)
    return {key: lambda f=f: torch.autograd.grad(f(), [x, gates, up, down], grad) for key, f in functions.items()}


def head_calls(side: int, backward: bool) -> dict[str, Callable[[], Any]]:
    """The head for 32 prompts and C = 8: the fused op, and three grouped convolutions over the repeated map."""
    torch.manual_seed(0)
    c, v, prompts = 8, side**3, 32
    leaf = lambda *size: torch.randn(*size).requires_grad_()  # noqa: E731
    f = leaf(1, 1, c, v)
    weights = [leaf(1, prompts, c, c), leaf(1, prompts, c), leaf(1, prompts, c, c), leaf(1, prompts, c)]
    weights += [leaf(1, prompts, c), leaf(1, prompts)]
    none = [torch.zeros(prompts, c), torch.zeros(prompts, 1)]
    grad = torch.randn(1, prompts, v)

    def ours() -> Tensor:
        return kernels.fusion_head(f, *none, *weights)

    def convolutions() -> Tensor:
        return peers.grouped_convolutions([f, *none, *weights], side)

    functions = {"mome": ours, "grouped_conv": convolutions}
    if backward:
        return {key: lambda g=g: torch.autograd.grad(g(), [f, *weights], grad) for key, g in functions.items()}
    return {key: torch.no_grad()(g) for key, g in functions.items()}


def calls(case: str, side: int) -> dict[str, Callable[[], Any]]:
    """The candidates for `head`, `head_backward` or the name of a layer's shape."""
    return head_calls(side, case == "head_backward") if case.startswith("head") else layer_calls(case)


def peak_kib() -> int:
    """Peak resident memory of this process in KiB since the peak was last reset."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])


def measure(case: str, candidate: str, side: int) -> None:
    """Prints by how many MiB one call raises the peak resident memory of its process, which is a separate one."""
    function = calls(case, side)[candidate]
    function()  # loads code and buffers of libraries, which stay in memory
    Path("/proc/self/clear_refs").write_text("5")
    before = peak_kib()
    function()
    print((peak_kib() - before) / 1024)


def command(*arguments: Any) -> list[str]:
    """The command line that runs this script for one candidate; the last argument holds the options."""
    *words, options = arguments
    given = ["--threads", str(options.threads), "--side", str(options.side)]
    return [sys.executable, "-W", "ignore", __file__, *given, *words]


def memory_mib(case: str, candidate: str, options: argparse.Namespace) -> float:
    """Peak memory of one candidate in MiB, measured in a separate process."""
    environment = {**os.environ, **ALLOCATORS["returning"]}
    words = command("--measure", case, candidate, options)
    done = subprocess.run(words, capture_output=True, text=True, check=True, env=environment)
    return float(done.stdout.split()[-1])


def largest_difference(functions: dict[str, Callable[[], Any]]) -> float:
    """The largest difference of any candidate's outputs from those of mome, relative to the largest of the latter."""
    outputs = {key: function() for key, function in functions.items()}
    as_list = lambda value: list(value) if isinstance(value, tuple) else [value]  # noqa: E731
    return max(
        float((a - b).abs().max() / b.abs().max())
        for output in outputs.values()
        for a, b in zip(as_list(output), as_list(outputs["mome"]), strict=True)
    )


def compare(case: str, options: argparse.Namespace) -> dict[str, Any]:
    """Times and memory of all candidates of one case.

    Returns:
        `speed` is the time of the fastest alternative divided by that of mome. `memory` is the memory of mome divided
        by that of the leanest alternative. `parameter_gradients` is the size of the parameters' gradients, which every
        candidate must hold, divided by the same.
    """
    functions = calls(case, options.side)
    names, difference = list(functions), largest_difference(functions)
    del functions
    most = min(options.rounds, 7) if case.startswith("head") else options.rounds  # a call of the head takes seconds
    counts = {name: 1 if name == "batched_mm" else most for name in names}
    memory = {name: memory_mib(case, name, options) for name in names}
    alternatives = [name for name in names if name in ALTERNATIVES]
    leanest = min(memory[name] for name in alternatives)
    result: dict[str, Any] = {"memory_mib": memory, "memory": memory["mome"] / leanest}
    for allocator in ("default", "keeping")[: 1 if case.startswith("head") else 2]:
        times = rounds(case, counts, allocator, options)
        result[allocator] = {"ms": times, "speed": min(times[name] for name in alternatives) / times["mome"]}
        if "tuned_loop" in times:
            result[allocator]["speed_to_tuned_loop"] = times["tuned_loop"] / times["mome"]
    if case in SHAPES:
        shape = SHAPES[case]
        result["parameter_gradients"] = 2 * shape.E * shape.D * shape.F * 4 / 2**20 / leanest
    return result | {"largest_relative_difference": difference}


def processor() -> str:
    """The name of the CPU."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=31, help="timed calls of a layer; of the head at most 7")
    parser.add_argument("--side", type=int, default=96, help="voxels along an edge of the head's map")
    for hidden in ("--measure", "--serve"):
        parser.add_argument(hidden, nargs=2, metavar=("CASE", "CANDIDATE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.measure:
        measure(*options.measure, options.side)
        return
    if options.serve:
        case, candidate = options.serve
        serve(calls(case, options.side)[candidate])
        return
    given = {
        "processor": processor(), "torch": torch.__version__, "threads": options.threads, "side": options.side,
        "tokens": LAYERS,
    }  # fmt: skip
    cases: dict[str, Any] = {}
    for case in (*LAYERS, "head", "head_backward"):
        cases[case] = compare(case, options)
        print(case, json.dumps(cases[case]), flush=True)
        if options.out:  # a partial file, so that an interrupted run keeps its results
            partial = options.out.with_name(options.out.name + ".partial")
            partial.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(json.dumps({**given, "cases": cases}, indent=1) + "\n")
    means = {
        allocator: {
            key: math.exp(sum(math.log(cases[case][allocator][key]) for case in LAYERS) / len(LAYERS))
            for key in ("speed", "speed_to_tuned_loop")
        }
        for allocator in ("default", "keeping")
    }
    print("geometric means", json.dumps(means))
    if options.out:
        partial.write_text(json.dumps({**given, "geometric_means_of_layers": means, "cases": cases}, indent=1) + "\n")
        os.replace(partial, options.out)


if __name__ == "__main__":
    main()
