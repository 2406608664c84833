"""Tests and times the kernels on one GPU: `python kernels/benchmarks/run.py --out DIR --minutes M`.

It needs no network. The most important measurements come first. Results are written one by one, and another call with
the same folder continues. Without a GPU the script prints a line and exits with 2. `--rehearse` runs some of the steps
on the CPU with tiny shapes, to test the script; its results are marked as a rehearsal.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

_HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(_HERE), str(_HERE.parent / "torch-ext")]

import ceilings  # noqa: E402
import device_checks  # noqa: E402
import mome_kernels as kernels  # noqa: E402
import peers  # noqa: E402
import table  # noqa: E402
from mome_kernels.torch_impl import head as torch_head  # noqa: E402
from mome_kernels.weights import HeadWeights  # noqa: E402
from results import minutes, opened  # noqa: E402
from shapes import (  # noqa: E402
    HEADS,
    LOADS,
    SHAPES,
    Device,
    Shape,
    bounds_ms,
    expert_ids,
    head_bounds_ms,
    head_name,
)

CEILINGS = "ceilings"  # the step whose figures the other steps compare with

# A step fills the dictionary that it is given, so that measurements made before a failure are kept.
Step = tuple[str, Callable[[dict[str, Any]], None]]


@dataclass(frozen=True)
class Setting:
    """The device, the other implementations to time, and the rates of the device once they have been measured."""

    device: str
    peers: Mapping[str, Callable[..., torch.Tensor]]
    limits: Callable[[], Device | None] = lambda: None


def median_ms(function: Callable[[], Any], device: str) -> float:
    """The median time of a call, by CUDA events with an empty L2, or by the clock on a CPU."""
    if device == "cuda":
        from triton.testing import do_bench

        return float(do_bench(function, warmup=15, rep=50, return_mode="median"))
    times = []
    for _ in range(3):
        start = time.perf_counter()
        function()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def peak_mib(function: Callable[[], Any], device: str) -> float | None:
    """Device memory that a call allocates, or None on a CPU."""
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


def graph_ms(function: Callable[[], Any], device: str) -> float | None:
    """The median time of a call replayed from a CUDA graph, which leaves out the launches by Python; None on a CPU."""
    if device != "cuda":
        return None
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = function()
    time = median_ms(graph.replay, device)
    del held
    return time


def _timed(
    function: Callable[..., torch.Tensor], leaves: list[torch.Tensor], device: str, captured: bool = False
) -> dict[str, Any]:
    """Times of a call, and of its replay from a CUDA graph where it can be `captured`."""
    with torch.no_grad():
        forward = median_ms(function, device)
        replayed: dict[str, Any] = {"forward_graph_ms": graph_ms(function, device)} if captured else {}
    out = function()
    grad = torch.randn_like(out)
    del out

    def both() -> Any:
        return torch.autograd.grad(function(), leaves, grad)

    times = {"forward_ms": forward, "both_ms": median_ms(both, device), "peak_mib": peak_mib(both, device)}
    if captured:
        replayed["both_graph_ms"] = graph_ms(both, device)
    return times | {key: time for key, time in replayed.items() if time is not None}


def first_line(problem: BaseException) -> str:
    """The first line of an exception's message."""
    return next(iter(str(problem).splitlines()), "")[:300] or repr(problem)[:300]


def settle(device: str) -> None:
    """Raises if the device is unusable, as after an illegal access, for the rest of the process."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def difference(out: torch.Tensor, expected: torch.Tensor) -> str | None:
    """A message if an output differs too much or is NaN, else None."""
    error = float((out.float() - expected).abs().max() / expected.abs().max())
    return None if error <= 0.05 else f"differs from the loop over experts by {error:.3f} of its largest value"


def layer_step(shape: Shape, load: str, activation: str, setting: Setting, result: dict[str, Any]) -> None:
    """Our layer and the chosen peers, in bfloat16; a peer's failure is recorded as text."""
    torch.manual_seed(0)
    device, limits = setting.device, setting.limits()
    dtype, width = torch.bfloat16, shape.F * (2 if shape.gated else 1)
    new = lambda *size, scale: (torch.randn(*size, device=device) * scale).to(dtype).requires_grad_()  # noqa: E731
    x = new(shape.T, shape.D, scale=1.0)
    up = new(shape.E, width, shape.D, scale=shape.D**-0.5)
    down = new(shape.E, shape.D, shape.F, scale=shape.F**-0.5)
    ids = expert_ids(shape, load, device)
    weights_TK = torch.softmax(torch.randn(shape.T, shape.K, device=device), -1).requires_grad_()
    leaves = [x, weights_TK, up, down]

    def ours() -> torch.Tensor:
        return kernels.moe_mlp(x, ids, weights_TK, up, None, down, None, activation=activation, gated=shape.gated)

    with torch.no_grad():
        expected = peers.eager_loop(x, ids, weights_TK, up, down, activation, shape.gated).float()
        wrong = difference(ours(), expected)
    if wrong:
        result |= {"ok": False, "wrong": True, "problem": wrong}
        return
    result["mome"] = _timed(ours, leaves, device, captured=True)
    if limits is not None:
        at = replace(shape, activation=activation)
        result["bounds_ms"] = {"forward": bounds_ms(at, limits, False), "both": bounds_ms(at, limits, True)}
    one_up, one_down = (t.detach()[:1].clone().requires_grad_() for t in (up, down))
    for name, peer in setting.peers.items():
        weights = (one_up, one_down) if name == "dense" else (up, down)
        wanted = [x, *weights] if name == "dense" else leaves

        def call(peer: Callable = peer, weights: tuple = weights) -> torch.Tensor:
            return peer(x, ids, weights_TK, *weights, activation, shape.gated)

        try:
            with torch.no_grad():
                wrong = difference(call(), expected) if name != "dense" else None
            result[name] = {"problem": wrong} if wrong else _timed(call, wanted, device, name in peers.CAPTURED)
        except Exception as problem:  # our figures are kept when a peer fails
            result[name] = {"problem": first_line(problem), "fatal": True}
            settle(device)
            del result[name]["fatal"]  # the device is still usable
    del expected
    if device == "cuda":
        torch.cuda.empty_cache()


def bias_step(shape: Shape, device: str, result: dict[str, Any]) -> None:
    """Our layer with biases, which is the default of `mome`; the peers' layers have none."""
    torch.manual_seed(0)
    width = shape.F * (2 if shape.gated else 1)
    new = lambda *size: (0.1 * torch.randn(*size, device=device)).bfloat16().requires_grad_()  # noqa: E731
    x, up, down = new(shape.T, shape.D), new(shape.E, width, shape.D), new(shape.E, shape.D, shape.F)
    up_bias, down_bias, ids = new(shape.E, width), new(shape.E, shape.D), expert_ids(shape, shape.load, device)
    weights_TK = torch.softmax(torch.randn(shape.T, shape.K, device=device), -1).requires_grad_()
    leaves = [x, weights_TK, up, up_bias, down, down_bias]

    def ours() -> torch.Tensor:
        return kernels.moe_mlp(x, ids, weights_TK, up, up_bias, down, down_bias, gated=shape.gated)

    result["mome"] = _timed(ours, leaves, device, captured=True)


def head_step(prompts: int, scales: int, channels: int, side: int, setting: Setting, result: dict[str, Any]) -> None:
    """The fusion head and its torch implementation, in float32."""
    torch.manual_seed(0)
    device, limits = setting.device, setting.limits()
    leaf = lambda *size: torch.randn(*size, device=device).requires_grad_()  # noqa: E731
    p, c, v = prompts, channels, side**3
    inputs = [
        leaf(1, scales, c, v), leaf(p, c), leaf(p, scales), leaf(1, p, c, c), leaf(1, p, c), leaf(1, p, c, c),
        leaf(1, p, c), leaf(1, p, c), leaf(1, p),
    ]  # fmt: skip
    # with one scale there is no fusion, and the grouped convolutions have neither query nor bias
    leaves = inputs if scales > 1 else [inputs[0], *inputs[3:]]
    result["mome"] = _timed(lambda: kernels.fusion_head(*inputs), leaves, device, captured=True)
    if limits is not None:
        sizes = (prompts, scales, channels, v, limits)
        result["bounds_ms"] = {"forward": head_bounds_ms(*sizes, False), "both": head_bounds_ms(*sizes, True)}
    usual, head = torch_head._TILE_BYTES, HeadWeights(*inputs[1:], 0, 0.0)
    try:
        torch_head._TILE_BYTES = 256 << 20 if device == "cuda" else usual  # few launches on a GPU
        with torch.no_grad():
            result["chunked_torch"] = {"forward_ms": median_ms(lambda: torch_head.forward(inputs[0], head), device)}
    finally:
        torch_head._TILE_BYTES = usual
    if scales == 1:
        try:
            result["grouped_conv"] = _timed(lambda: peers.grouped_convolutions(inputs, side), leaves, device)
        except torch.OutOfMemoryError as problem:
            result["grouped_conv"] = {"problem": first_line(problem)}


def ceilings_step(device: str, result: dict[str, Any]) -> None:
    """The rates that the rooflines are drawn with; a CPU has none."""
    if device == "cuda":
        processors = torch.cuda.get_device_properties(device).multi_processor_count
        result.update(ceilings.measure(lambda function: median_ms(function, device), processors))


def steps(setting: Setting, rehearse: bool) -> Iterator[Step]:
    """All steps, the most important first; a rehearsal has every twelfth of them."""
    if rehearse:
        everything = list(_steps(setting, True))
        yield from everything[::12]
    else:
        yield from _steps(setting, False)


def _steps(setting: Setting, rehearse: bool) -> Iterator[Step]:
    shrink = (lambda s: replace(s, T=96, D=min(s.D, 40), F=min(s.F, 24), E=min(s.E, 8))) if rehearse else (lambda s: s)
    side, tokens = (8, 40) if rehearse else (96, 3000)
    device = setting.device
    checks: list[Step] = [
        (f"check {name}", lambda result, check=check: result.update(check()))
        for name, check in device_checks.cases(device, tokens)
    ]

    def layer(shape: Shape, load: str, activation: str | None = None) -> Step:
        act = activation or shape.activation
        name = f"layer {shape.name} {load} {act}"
        return name, lambda result: layer_step(shrink(shape), load, act, setting, result)

    def head(p: int, s: int, c: int) -> Step:
        return head_name(p, s, c), lambda result: head_step(p, s, c, side, setting, result)

    names = list(SHAPES)
    yield from checks[: device_checks.FIRST]
    yield CEILINGS, lambda result: ceilings_step(device, result)
    for name in names[:7]:
        yield layer(SHAPES[name], "uniform")
    yield head(*HEADS[0])
    for name in names[7:11]:
        yield layer(SHAPES[name], SHAPES[name].load)
    for name in names[11:]:
        yield layer(SHAPES[name], SHAPES[name].load)
    for sizes in HEADS[1:]:
        yield head(*sizes)
    yield from checks[device_checks.FIRST :]
    for name in ("V1", "V2", "V5", "V7"):
        yield f"biases {name}", lambda result, name=name: bias_step(shrink(SHAPES[name]), device, result)
    for name in names[:7]:
        for activation in ("gelu_tanh", "silu"):
            yield layer(SHAPES[name], "uniform", activation)
    for load in LOADS[1:]:
        for name in names:
            if SHAPES[name].load == "uniform":
                yield layer(SHAPES[name], load)


def broken(name: str, step: dict[str, Any]) -> bool:
    """Whether a kernel of ours is wrong or could not run. A skipped check does not count as broken."""
    if name == CEILINGS:
        return "problem" in step
    return not step.get("ok") if name.startswith("check") else table.state(step) is not None


def summary(data: dict[str, Any]) -> str:
    """A table of all results: the verdict of a check, and the columns of `table.py` for the others."""
    lines = [f"{'':48} {' | '.join(table.COLUMNS)}"]
    for name, step in data["steps"].items():
        if name.startswith("check"):
            verdict = f"skipped: {step['skipped']}" if "skipped" in step else "ok"
            lines.append(f"{name:48} {verdict if step.get('ok') else 'WRONG: ' + json.dumps(step)}")
            continue
        if name == CEILINGS:
            lines.append(f"{name:48} {json.dumps(step)}")
            continue
        why = table.state(step)
        lines.append(f"{name:48} {why + ': ' + json.dumps(step) if why else ' | '.join(table.figures(step))}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--out", type=Path, required=True, help="folder of the JSON; may hold an earlier call's")
    parser.add_argument("--minutes", type=minutes, default=10.0, help="no step is begun after this time")
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes on the CPU, to try the script itself")
    parser.add_argument("--peers", nargs="*", choices=tuple(peers.PEERS), default=list(peers.PEERS), help="time these")
    parser.add_argument("--steps", nargs="+", default=[""], metavar="START", help="only steps whose name starts so")
    options = parser.parse_args(arguments)
    device = "cpu" if options.rehearse else "cuda"
    results = opened("run.py", options)
    if results is None:
        return 2
    deadline, left = time.monotonic() + 60 * options.minutes, 0
    usable = {n: peers.PEERS[n] for n in options.peers if peers.found(n) and n not in results.killers()}
    setting = Setting(device, usable, lambda: ceilings.limits(results.data["steps"].get(CEILINGS, {})))
    for name, step in steps(setting, options.rehearse):
        if name in results or not name.startswith(tuple(options.steps)):
            continue
        if time.monotonic() > deadline:
            left += 1
            continue
        result: dict[str, Any] = {}
        try:
            step(result)
        except Exception as problem:  # the other measurements go on when a kernel is broken
            result |= {"ok": False, "problem": first_line(problem)}
            try:
                settle(device)
            except Exception as dead:
                results.add(name, {**result, "fatal": True})
                print(f"{name}: the device is lost ({first_line(dead)}); call again to continue", file=sys.stderr)
                return 1
        results.add(name, result)
        print(name, flush=True)
    print(summary(results.data))
    wrong = [name for name, step in results.data["steps"].items() if broken(name, step)]
    print(f"{results.path}: {len(results.data['steps'])} measurements, {left} left for another call")
    if wrong:
        print(f"{len(wrong)} of them wrong or failed: {', '.join(wrong)}")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
