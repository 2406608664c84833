"""Tests and times the kernels on one GPU: `python kernels/benchmarks/run.py --out DIR --minutes M`.

Needs nothing outside the repository and no network. The most telling measurements come first; results are written as
they come, and another call with the same folder goes on where this one stopped. Without a GPU it says so and exits
with 2. `--rehearse` walks the whole script on the CPU with tiny shapes; its numbers mean nothing and are marked so.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

_HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(_HERE), str(_HERE.parent / "torch-ext")]

import device_checks  # noqa: E402
import mome_kernels as kernels  # noqa: E402
import peers  # noqa: E402
from mome_kernels import cpu_head  # noqa: E402
from shapes import LOADS, SHAPES, Shape, device_limits, expert_ids, roofline_ms  # noqa: E402

Step = tuple[str, Callable[[], dict[str, Any]]]


class Results:
    """A JSON file that grows: one entry per measurement, each written at once."""

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        self.path = path
        self.data: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {**header, "steps": {}}

    def __contains__(self, name: str) -> bool:
        return name in self.data["steps"]

    def add(self, name: str, value: dict[str, Any]) -> None:
        """Keeps a measurement; the file is replaced in one move."""
        self.data["steps"][name] = value
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.data, indent=1))
        os.replace(temporary, self.path)


def median_ms(function: Callable[[], Any], device: str) -> float:
    """The median time of a call: CUDA events with a flushed L2, or the clock on a CPU."""
    if device == "cuda":
        from triton.testing import do_bench

        return float(do_bench(function, warmup=20, rep=80, return_mode="median"))
    times = []
    for _ in range(3):
        start = time.perf_counter()
        function()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def peak_mib(function: Callable[[], Any], device: str) -> float | None:
    """Device memory that a call needs beyond what is there."""
    if device != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = function()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    del result
    return peak / 2**20


def _timed(function: Callable[..., torch.Tensor], leaves: list[torch.Tensor], device: str) -> dict[str, Any]:
    with torch.no_grad():
        forward = median_ms(function, device)
    out = function()
    grad = torch.randn_like(out)
    del out

    def both() -> Any:
        return torch.autograd.grad(function(), leaves, grad)

    return {"forward_ms": forward, "both_ms": median_ms(both, device), "peak_mib": peak_mib(both, device)}


def layer_step(shape: Shape, load: str, device: str, activation: str) -> dict[str, Any]:
    """Our layer and every peer at one shape and load, in bfloat16; errors of a peer are kept as text."""
    torch.manual_seed(0)
    dtype, width = torch.bfloat16, shape.F * (2 if shape.gated else 1)
    new = lambda *size, scale: (torch.randn(*size, device=device) * scale).to(dtype).requires_grad_()  # noqa: E731
    x = new(shape.T, shape.D, scale=1.0)
    up = new(shape.E, width, shape.D, scale=shape.D**-0.5)
    down = new(shape.E, shape.D, shape.F, scale=shape.F**-0.5)
    ids = expert_ids(shape, load, device)
    gates = torch.softmax(torch.randn(shape.T, shape.K, device=device), -1).requires_grad_()
    leaves = [x, gates, up, down]

    def ours() -> torch.Tensor:
        return kernels.moe_mlp(x, ids, gates, up, None, down, None, activation=activation, gated=shape.gated)

    result: dict[str, Any] = {"mome": _timed(ours, leaves, device)}
    with torch.no_grad():
        expected = ours().float()
    limits = device_limits(torch.cuda.get_device_name()) if device == "cuda" else None
    if limits is not None:
        at = replace(shape, activation=activation)
        result["roofline_ms"] = {
            "forward": roofline_ms(at, limits, False),
            "both": roofline_ms(at, limits, False) + roofline_ms(at, limits, True),
        }
    for name, peer in peers.available().items():
        wanted = [x, up, down] if name == "dense" else leaves

        def call(peer: Callable = peer) -> torch.Tensor:
            return peer(x, ids, gates, up, down, activation, shape.gated)

        try:
            if name != "dense":
                with torch.no_grad():
                    error = (call().float() - expected).abs().max() / expected.abs().max()
                if error > 0.05:
                    raise AssertionError(f"differs from ours by {float(error):.3f}")
            result[name] = _timed(call, wanted, device)
        except (RuntimeError, NotImplementedError, AssertionError, AttributeError, TypeError, ImportError) as problem:
            result[name] = {"error": str(problem).splitlines()[0][:200] if str(problem) else repr(problem)}
    del expected
    if device == "cuda":
        torch.cuda.empty_cache()
    return result


def head_step(prompts: int, scales: int, channels: int, side: int, device: str) -> dict[str, Any]:
    """The fusion head beside the chunked torch form, float32."""
    torch.manual_seed(0)
    leaf = lambda *size: torch.randn(*size, device=device).requires_grad_()  # noqa: E731
    p, c, v = prompts, channels, side**3
    inputs = [
        leaf(1, scales, c, v), leaf(p, c), leaf(p, scales), leaf(1, p, c, c), leaf(1, p, c), leaf(1, p, c, c),
        leaf(1, p, c), leaf(1, p, c), leaf(1, p),
    ]  # fmt: skip
    result = {"mome": _timed(lambda: kernels.fusion_head(*inputs), inputs, device)}
    with torch.no_grad():
        chunked = median_ms(lambda: cpu_head.forward(*inputs, 0, 0.0), device)
    result["chunked_torch"] = {"forward_ms": chunked}
    return result


def steps(device: str, rehearse: bool) -> Iterator[Step]:
    """Everything to do, the most telling first; of each kind a few where rehearsed."""
    if rehearse:
        everything = list(_steps(device, True))
        yield from everything[::12]
    else:
        yield from _steps(device, False)


def _steps(device: str, rehearse: bool) -> Iterator[Step]:
    shrink = (lambda s: replace(s, T=96, D=min(s.D, 40), F=min(s.F, 24), E=min(s.E, 8))) if rehearse else (lambda s: s)
    side, tokens = (8, 40) if rehearse else (96, 3000)
    for name, check in device_checks.cases(device, tokens):
        yield f"check {name}", check

    def layer(shape: Shape, load: str, activation: str | None = None) -> Step:
        act = activation or shape.activation
        return f"layer {shape.name} {load} {act}", lambda: layer_step(shrink(shape), load, device, act)

    names = list(SHAPES)
    for name in names[:7]:
        yield layer(SHAPES[name], "uniform")
    yield "head P=32 S=5 C=8", lambda: head_step(32, 5, 8, side, device)
    for name in names[7:11]:
        yield layer(SHAPES[name], SHAPES[name].load)
    for name in names[:7]:
        for activation in ("gelu_tanh", "silu"):
            yield layer(SHAPES[name], "uniform", activation)
    for s, c in ((1, 8), (5, 16), (5, 32)):
        yield f"head P=32 S={s} C={c}", lambda s=s, c=c: head_step(32, s, c, side, device)
    for name in names[11:]:
        yield layer(SHAPES[name], SHAPES[name].load)
    for load in LOADS[1:]:
        for name in names:
            if SHAPES[name].load == "uniform":
                yield layer(SHAPES[name], load)


def header(device: str, rehearse: bool) -> dict[str, Any]:
    """What the numbers were taken on."""
    import importlib.metadata

    versions = {"torch": torch.__version__, "cuda": torch.version.cuda}
    for package in ("triton", "transformers"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    return {"device": name, "versions": versions, "rehearsal": rehearse}


def summary(data: dict[str, Any]) -> str:
    """A table of what is there: times in ms, the fraction of the roofline, and the best peer over ours."""
    lines = []
    for name, step in data["steps"].items():
        if name.startswith("check"):
            lines.append(f"{name:48} {'ok' if step.get('ok') else 'WRONG: ' + json.dumps(step)}")
            continue
        ours = step.get("mome", {})
        if "forward_ms" not in ours:
            lines.append(f"{name:48} {step}")
            continue
        rivals = {k: v for k, v in step.items() if k not in ("mome", "roofline_ms", "dense") and "forward_ms" in v}
        parts = [f"{name:48} {ours['forward_ms']:9.3f} {ours['both_ms']:9.3f} ms"]
        if "roofline_ms" in step:
            parts.append(f"roofline {step['roofline_ms']['forward'] / ours['forward_ms']:5.1%}")
        for key in ("forward_ms", "both_ms"):
            known = [v[key] for v in rivals.values() if key in v]
            if known:
                parts.append(f"{key[:-3]} ×{min(known) / ours[key]:.2f}")
        lines.append("  ".join(parts))
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the JSON; may hold an earlier call's")
    parser.add_argument("--minutes", type=float, default=10.0, help="no step is begun after this time")
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes on the CPU, to try the script itself")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available() and not options.rehearse:
        print("run.py: no CUDA device here; nothing was measured", file=sys.stderr)
        return 2
    device = "cpu" if options.rehearse else "cuda"
    options.out.mkdir(parents=True, exist_ok=True)
    head = header(device, options.rehearse)
    results = Results(options.out / f"{head['device'].replace(' ', '_').replace('/', '_')}.json", head)
    deadline, left = time.monotonic() + 60 * options.minutes, 0
    for name, step in steps(device, options.rehearse):
        if name in results:
            continue
        if time.monotonic() > deadline:
            left += 1
            continue
        try:
            results.add(name, step())
        except torch.OutOfMemoryError as problem:
            results.add(name, {"error": str(problem).splitlines()[0]})
        except (RuntimeError, ValueError) as problem:  # one broken kernel must not cost the other measurements
            results.add(name, {"ok": False, "error": str(problem).splitlines()[0][:300]})
        print(name, flush=True)
    print(summary(results.data))
    print(f"{results.path}: {len(results.data['steps'])} measurements, {left} left for another call")
    wrong = [name for name, step in results.data["steps"].items() if name.startswith("check") and not step.get("ok")]
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
