"""The expert ops and the ancestor's head on the CPU, beside transformers and grouped convolutions.

`python benchmarks/kernels_cpu.py --out benchmarks/results/kernels_cpu.json`, twelve minutes on two quiet cores. Every
candidate runs in a process of its own, as it would for a user: what one leaves behind in the heap decides how many
fresh pages the next one meets, which is worth up to a third of a call. They are timed in turn, round after round, so
that a busy machine slows them alike; medians are compared (`batched_mm`, far behind, is timed once).

Layers are timed under two allocators: glibc's as it is, which gives freed memory back to the system and is charged for
fresh pages, and the same told to keep it. Memory is the growth of the process's peak over a second call, with an
allocator that gives every freed block back at once: the peak is what lives at once, without code and buffers that the
first call loads for good.

The layers' rivals are what a user of transformers has: its three implementations of experts, `batched_mm` where the
matrices it copies fit. `tuned_loop` is a loop over experts written with care; it is compared apart.
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

# Swin stages, ViT and the 1×1 convolution; token counts that two cores can turn round in a second.
LAYERS = {"V1": 32768, "V2": 16384, "V3": 3456, "V4": 432, "V8": 864, "V14": 65536}
RIVALS = ("eager", "grouped_mm", "batched_mm", "grouped_conv")
COPIES_MIB = 3072
ALLOCATORS = {
    "default": {},
    "keeping": {"MALLOC_MMAP_THRESHOLD_": str(4 << 30), "MALLOC_TRIM_THRESHOLD_": str(8 << 30)},
    "returning": {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"},
}


def serve(function: Callable[[], Any]) -> None:
    """Times a call for every line that arrives; run in a process of its own."""
    for _ in range(3):
        function()
    print("ready", flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        function()
        print(1e3 * (time.perf_counter() - start), flush=True)


def rounds(case: str, counts: dict[str, int], allocator: str, options: argparse.Namespace) -> dict[str, float]:
    """Median milliseconds of each candidate, taken in turn until each has had its count."""
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
        first = turn % len(names)  # nobody always follows the same one
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
    """Whether the matrices that transformers' `batched_mm` copies, two per assignment, are few enough to be run."""
    return 2 * shape.T * shape.K * shape.D * shape.F * 4 <= COPIES_MIB << 20


def layer_calls(name: str) -> dict[str, Callable[[], Any]]:
    """Forward + backward of one shape in float32, per candidate."""
    shape = replace(SHAPES[name], T=LAYERS[name])
    torch.manual_seed(0)
    new = lambda *size, scale=1.0: (torch.randn(*size) * scale).requires_grad_()  # noqa: E731
    x, up = new(shape.T, shape.D), new(shape.E, shape.F, shape.D, scale=shape.D**-0.5)
    down = new(shape.E, shape.D, shape.F, scale=shape.F**-0.5)
    ids = expert_ids(shape, "uniform", "cpu")
    gates = torch.rand(shape.T, shape.K).requires_grad_()
    grad = torch.randn(shape.T, shape.D)
    functions: dict[str, Callable[[], Tensor]] = {"mome": lambda: kernels.moe_mlp(x, ids, gates, up, None, down, None)}
    rivals = {
        "eager": peers.transformers_eager,
        "grouped_mm": peers.transformers_function("grouped_mm"),
        "tuned_loop": peers.eager_loop,
    }
    if batched_fits(shape):
        rivals["batched_mm"] = peers.transformers_function("batched_mm")
    for rival, function in rivals.items():
        functions[rival] = lambda f=function: f(x, ids, gates, up, down, "gelu", False)
    return {key: lambda f=f: torch.autograd.grad(f(), [x, gates, up, down], grad) for key, f in functions.items()}


def head_calls(side: int, backward: bool) -> dict[str, Callable[[], Any]]:
    """The ancestor's head, 32 prompts, C = 8: fused, and as three grouped convolutions over the repeated map."""
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
    """Candidates of `head`, `head_backward` or a shape."""
    return head_calls(side, case == "head_backward") if case.startswith("head") else layer_calls(case)


def peak_kib() -> int:
    """The process's peak resident memory since it was last cleared."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])


def measure(case: str, candidate: str, side: int) -> None:
    """Prints how far one call raises the process's resident memory, in MiB; run in a process of its own."""
    function = calls(case, side)[candidate]
    function()  # libraries' code and the matrix library's own buffers stay; all else is given back
    Path("/proc/self/clear_refs").write_text("5")
    before = peak_kib()
    function()
    print((peak_kib() - before) / 1024)


def command(*arguments: Any) -> list[str]:
    """This script for one candidate, with the options that make the case."""
    *words, options = arguments
    given = ["--threads", str(options.threads), "--side", str(options.side)]
    return [sys.executable, "-W", "ignore", __file__, *given, *words]


def memory_mib(case: str, candidate: str, options: argparse.Namespace) -> float:
    environment = {**os.environ, **ALLOCATORS["returning"]}
    words = command("--measure", case, candidate, options)
    done = subprocess.run(words, capture_output=True, text=True, check=True, env=environment)
    return float(done.stdout.split()[-1])


def largest_difference(functions: dict[str, Callable[[], Any]]) -> float:
    """Between any candidate's outputs and ours, over the largest value of ours."""
    outputs = {key: function() for key, function in functions.items()}
    as_list = lambda value: list(value) if isinstance(value, tuple) else [value]  # noqa: E731
    return max(
        float((a - b).abs().max() / b.abs().max())
        for output in outputs.values()
        for a, b in zip(as_list(output), as_list(outputs["mome"]), strict=True)
    )


def compare(case: str, options: argparse.Namespace) -> dict[str, Any]:
    """Times, memory, and both as ratios: the best rival's time over ours, our memory over the least rival's.

    `parameter_gradients` is what the gradients of the layer's parameters, which all have to return, are of the latter.
    """
    functions = calls(case, options.side)
    names, difference = list(functions), largest_difference(functions)
    del functions
    most = min(options.rounds, 7) if case.startswith("head") else options.rounds  # seconds each
    counts = {name: 1 if name == "batched_mm" else most for name in names}
    memory = {name: memory_mib(case, name, options) for name in names}
    rivals = [name for name in names if name in RIVALS]
    leanest = min(memory[name] for name in rivals)
    result: dict[str, Any] = {"memory_mib": memory, "memory": memory["mome"] / leanest}
    for allocator in ("default", "keeping")[: 1 if case.startswith("head") else 2]:
        times = rounds(case, counts, allocator, options)
        result[allocator] = {"ms": times, "speed": min(times[name] for name in rivals) / times["mome"]}
        if "tuned_loop" in times:
            result[allocator]["speed_to_tuned_loop"] = times["tuned_loop"] / times["mome"]
    if case in SHAPES:
        shape = SHAPES[case]
        result["parameter_gradients"] = 2 * shape.E * shape.D * shape.F * 4 / 2**20 / leanest
    return result | {"largest_relative_difference": difference}


def processor() -> str:
    """The CPU's name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=31, help="of the layers; of the head at most 7")
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
        if options.out:  # beside it, until all of it is there
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
