"""The expert ops and the ancestor's head on the CPU, beside transformers and grouped convolutions.

`python benchmarks/kernels_cpu.py --out benchmarks/results/kernels_cpu.json`. All candidates of a shape are timed in
turn, round after round, so that a busy machine slows them alike; medians are compared (`batched_mm`, far behind, is
timed once, alone). Memory is the growth of the process's peak over a second call, each candidate in a process of its
own, whose allocator gives every freed block back to the system: the peak is what lives at once, without code and
buffers that the first call loads for good.

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
import peers  # noqa: E402
from shapes import SHAPES, expert_ids  # noqa: E402

# Swin stages, ViT and the 1×1 convolution; token counts that two cores can turn round in a second.
LAYERS = {"V1": 32768, "V2": 16384, "V3": 3456, "V4": 432, "V8": 864, "V14": 65536}
RIVALS = ("eager", "grouped_mm", "batched_mm", "grouped_conv")
COPIES_MIB = 3072


def rounds(candidates: dict[str, Callable[[], Any]], count: int) -> dict[str, float]:
    """Median milliseconds of each, taken in turn."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(count + 1):
        for name, function in candidates.items():
            start = time.perf_counter()
            function()
            if turn:  # the first round warms up
                times[name].append(1e3 * (time.perf_counter() - start))
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


def memory_mib(case: str, candidate: str, options: argparse.Namespace) -> float:
    command = [sys.executable, "-W", "ignore", __file__, "--threads", str(options.threads), "--side", str(options.side)]
    at_once = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command += ["--measure", case, candidate]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, **at_once})
    return float(done.stdout.split()[-1])


def compare(case: str, options: argparse.Namespace) -> dict[str, Any]:
    """Times, memory, and both as ratios: the best rival's time over ours, our memory over the least rival's.

    `parameter_gradients` is what the gradients of the layer's parameters, which all have to return, are of the latter.
    """
    functions = calls(case, options.side)
    outputs = {key: function() for key, function in functions.items()}
    as_list = lambda value: list(value) if isinstance(value, tuple) else [value]  # noqa: E731
    difference = max(
        float((a - b).abs().max() / b.abs().max())
        for output in outputs.values()
        for a, b in zip(as_list(output), as_list(outputs["mome"]), strict=True)
    )
    del outputs
    count = min(options.rounds, 7) if case.startswith("head") else options.rounds  # seconds each
    alone = {key: functions[key] for key in functions if key == "batched_mm"}  # what it leaves behind slows the next
    times = rounds({key: functions[key] for key in functions if key not in alone}, count) | rounds(alone, 1)
    memory = {key: memory_mib(case, key, options) for key in functions}
    rivals = [key for key in functions if key in RIVALS]
    leanest = min(memory[key] for key in rivals)
    result = {
        "ms": times,
        "memory_mib": memory,
        "speed": min(times[key] for key in rivals) / times["mome"],
        "memory": memory["mome"] / leanest,
        "largest_relative_difference": difference,
    }
    if "tuned_loop" in times:
        shape = SHAPES[case]
        result["speed_to_tuned_loop"] = times["tuned_loop"] / times["mome"]
        result["parameter_gradients"] = 2 * shape.E * shape.D * shape.F * 4 / 2**20 / leanest
    return result


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
    parser.add_argument("--measure", nargs=2, metavar=("CASE", "CANDIDATE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.measure:
        measure(*options.measure, options.side)
        return
    cases: dict[str, Any] = {}
    for case in (*LAYERS, "head", "head_backward"):
        cases[case] = compare(case, options)
        print(case, json.dumps(cases[case]), flush=True)
    geometric_mean = lambda key: math.exp(sum(math.log(cases[case][key]) for case in LAYERS) / len(LAYERS))  # noqa: E731
    mean, to_loop = geometric_mean("speed"), geometric_mean("speed_to_tuned_loop")
    result = {
        "processor": processor(), "torch": torch.__version__, "threads": options.threads, "side": options.side,
        "tokens": LAYERS,
        "geometric_mean_speed_of_layers": mean, "geometric_mean_speed_to_tuned_loop": to_loop, "cases": cases,
    }  # fmt: skip
    print("geometric means", mean, to_loop)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
