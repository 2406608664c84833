"""Runs every kernel under compute-sanitizer: `python kernels/benchmarks/sanitize.py --out DIR --minutes M`.

Each case runs in its own process with tiny shapes, several at a time. memcheck finds accesses outside of tensors,
racecheck races in shared memory. Every tensor gets its own allocation, since memcheck does not see the tensors inside a
block of PyTorch's allocator. Kernels are compiled before, in a run without the tool. `--rehearse` runs the cases on the
CPU without the tool, to test the script. The exit code is 1 where a case is wrong, and 3 where some are left for
another call.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

_HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(_HERE), str(_HERE.parent / "torch-ext")]

import torch  # noqa: E402
from results import minutes, opened  # noqa: E402

TOOLS = {
    "memcheck": ["--tool", "memcheck"],
    "racecheck": ["--tool", "racecheck", "--racecheck-report", "analysis"],
}
ALONE = ["--target-processes", "application-only"]  # not the compilers that a case starts
NO_TOOL = "no tool"
FOUND = 9  # the exit code of the tool where it found an error


def cases(device: str) -> dict[str, Callable[[], Any]]:
    """One small case of each kernel, forward and backward."""
    import check_cases
    import device_checks
    import mome_kernels as kernels

    single, half = torch.float32, torch.bfloat16

    def both(op: Callable[..., torch.Tensor], inputs: list[Any]) -> None:
        out = op(*inputs)
        torch.autograd.grad(out, [t for t in inputs if torch.is_tensor(t) and t.requires_grad], torch.ones_like(out))

    def mlp(dtype: torch.dtype, sizes: tuple[int, ...], *rest: Any) -> Callable[[], None]:
        return lambda: both(kernels.moe_mlp, check_cases.mlp_inputs(device, dtype, sizes, *rest))

    def linear(dtype: torch.dtype) -> None:
        both(kernels.moe_linear, check_cases.mlp_inputs(device, dtype, (70, 5, 2, 37, 50))[:5])

    def grouped() -> None:
        x, weight = (device_checks._leaf(device, half, *shape) for shape in ((60, 40), (4, 48, 40)))
        both(kernels.grouped_linear, [x, weight, torch.tensor([0, 0, 20, 21, 60], device=device)])

    def combine() -> None:
        y = device_checks._leaf(device, half, 150, 37)
        weights_TK = torch.rand(50, 3, device=device).requires_grad_()
        both(kernels.combine, [y, weights_TK, torch.randperm(150, device=device)])

    def head(scales: int, channels: int, top_k: int) -> Callable[[], None]:
        voxels = 2200 if channels == 32 else 301
        return lambda: both(
            kernels.fusion_head, check_cases.head_inputs(device, (1, 2, scales, channels, voxels), top_k, 0.1)
        )

    return {
        "mlp of few numbers": mlp(half, (16, 4, 1, 4, 8), "gelu", False, "empty"),
        "head C=8": head(2, 8, 1),
        "mlp fused": mlp(half, (70, 4, 2, 48, 100), "gelu", True),
        "mlp fused, one expert per token": mlp(half, (301, 3, 1, 37, 50), "silu", False, "empty"),
        "mlp fused float32": mlp(single, (70, 4, 2, 32, 40)),
        "mlp fused, gradients grouped": mlp(half, (70, 4, 2, 192, 80), "gelu", True),
        "mlp grouped": mlp(half, (70, 4, 2, 272, 80), "gelu", True, "zipf"),
        "mlp grouped float32": mlp(single, (70, 4, 2, 100, 37), "relu", False),
        "linear": lambda: linear(half),
        "linear float32": lambda: linear(single),
        "grouped_linear": grouped,
        "combine": combine,
        "route": lambda: kernels.route(torch.randint(0, 300, (70, 2), device=device), 300),
        "head C=16": head(3, 16, 2),
        "head C=32": head(2, 32, 0),
    }


def run_case(name: str, device: str) -> int:
    """Runs one case in this process."""
    torch.manual_seed(0)
    cases(device)[name]()
    if device == "cuda":
        torch.cuda.synchronize()
    return 0


def verdict(command: list[str], seconds: float) -> dict[str, Any] | None:
    """Runs a command; the last lines of what it said are kept where it failed. None where the time was too short."""
    begin = time.monotonic()
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True
    )
    try:
        said, _ = done.communicate(timeout=max(1.0, seconds))
    except subprocess.TimeoutExpired:
        os.killpg(done.pid, signal.SIGKILL)  # the tool's own end would leave the case on the GPU
        done.communicate()
        return None
    result: dict[str, Any] = {"ok": done.returncode == 0, "seconds": round(time.monotonic() - begin, 1)}
    summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", said)
    if summary:
        result["summary"] = summary[-1]
    if done.returncode:
        found = [line for line in said.splitlines() if line.startswith("=========")] or said.splitlines()[-30:]
        result |= {"returncode": done.returncode, "found": done.returncode == FOUND, "said": found[:60]}
    return result


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--out", type=Path, required=True, help="folder of the JSON; may hold an earlier call's")
    parser.add_argument("--minutes", type=minutes, default=3.0, help="no case goes on after this time")
    parser.add_argument("--workers", type=int, default=max(1, min(13, (os.cpu_count() or 4) - 2)))
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=list(TOOLS))
    parser.add_argument("--rehearse", action="store_true", help="on the CPU and without the tool")
    parser.add_argument("--case", help="run one case in this process")
    options = parser.parse_args(arguments)
    device = "cpu" if options.rehearse else "cuda"
    if options.case:
        return run_case(options.case, device)
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not options.rehearse and not Path(program).is_file():
        print("sanitize.py: compute-sanitizer is not in PATH: it belongs to the CUDA toolkit", file=sys.stderr)
        return 2
    results = opened("sanitize.py", options, "sanitizer_")
    if results is None:
        return 2
    deadline = time.monotonic() + 60 * options.minutes
    script = [sys.executable, str(Path(__file__).resolve()), "--out", str(options.out)]
    script += ["--rehearse"] if options.rehearse else []
    left, lock = list[str](), threading.Lock()

    def command(tool: str, name: str) -> list[str]:
        if options.rehearse or tool == NO_TOOL:
            return [*script, "--case", name]
        return [program, *TOOLS[tool], *ALONE, "--error-exitcode", str(FOUND), *script, "--case", name]

    def check(name: str) -> None:
        """Runs one case without a tool, which fills Triton's cache, and then under each tool."""
        for tool in (NO_TOOL, *options.tools):
            step = f"{tool}: {name}"
            if step in results:
                continue
            seconds = deadline - time.monotonic()
            result = verdict(command(tool, name), seconds) if seconds > 1 else None
            if result is None:
                left.append(step)
                if seconds > 1:
                    print(f"{step}: not done after {seconds:.0f} s", flush=True)
                continue
            with lock:
                results.add(step, result)
            said = "ok" if result["ok"] else "WRONG: " + json.dumps(result)
            print(f"{tool}: {name:40} {result.get('seconds', 0):6.1f} s  {said}", flush=True)
            if not result["ok"] and tool == NO_TOOL:
                return

    with ThreadPoolExecutor(options.workers) as pool:
        list(pool.map(check, cases(device)))
    wrong = [name for name, result in results.data["steps"].items() if not result["ok"]]
    print(f"{results.path}: {len(results.data['steps'])} runs, {len(wrong)} wrong, {len(left)} left for another call")
    return 1 if wrong else 3 if left else 0


if __name__ == "__main__":
    raise SystemExit(main())
