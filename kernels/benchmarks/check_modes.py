"""Ops under CUDA graphs, `torch.compile`, other streams, autocast and many reruns: equal to eager, bit by bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import check_cases
import device_checks
import mome_kernels as kernels
import torch
from torch import Tensor

# The arguments of an op for a number of tokens (or voxels) and a seed, and the op on them.
Make = Callable[[int, int], list[Any]]
Op = Callable[..., Any]


def _tensors(result: Any) -> list[Tensor]:
    return list(result) if isinstance(result, tuple | list) else [result]


def _leaves(inputs: list[Any]) -> list[Tensor]:
    return [t for t in inputs if torch.is_tensor(t) and t.requires_grad]


def _both(op: Op, inputs: list[Any], grad: Tensor) -> list[Tensor]:
    out = op(*inputs)
    return [out, *torch.autograd.grad(out, _leaves(inputs), grad)]


def _equal(ours: list[Tensor], expected: list[Tensor]) -> dict[str, Any]:
    same = [torch.equal(a, b) for a, b in zip(ours, expected, strict=True)]
    return {"bit_equal": all(same), "ok": all(same), "each": same}


def graph_check(op: Op, make: Make, tokens: int, backward: bool) -> dict[str, Any]:
    """Captures an op, replays it with other inputs in the same memory, and compares with eager runs of these."""
    inputs = make(tokens, 0)
    with torch.no_grad():
        grad = torch.randn_like(op(*inputs)) if backward else None

    def run() -> list[Tensor]:
        if grad is not None:
            return _both(op, inputs, grad)
        with torch.no_grad():
            return _tensors(op(*inputs))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    verdicts = []
    for seed in (1, 2):
        with torch.no_grad():
            for old, new in zip(inputs, make(tokens, seed), strict=True):
                if torch.is_tensor(old):
                    old.copy_(new)
        for tensor in captured:
            tensor.detach().zero_()
        graph.replay()
        torch.cuda.synchronize()
        replayed = [tensor.clone() for tensor in captured]
        verdicts.append(_equal(replayed, run()))
    return {"replays": verdicts, "ok": all(verdict["ok"] for verdict in verdicts)}


def compile_check(op: Op, make: Make, device: str, backward: bool) -> dict[str, Any]:
    """One compiled program for several numbers of tokens, without a break; a recompilation is an error."""
    torch._dynamo.reset()
    backend = "inductor" if device == "cuda" else "aot_eager"
    compiled = torch.compile(op, fullgraph=True, dynamic=True, backend=backend)
    verdicts = []
    for seed, tokens in enumerate((70, 205, 333)):
        inputs = make(tokens, seed)
        with torch._dynamo.config.patch(error_on_recompile=seed > 1):
            if backward:
                with torch.no_grad():
                    grad = torch.randn_like(op(*inputs))
                verdicts.append(_equal(_both(compiled, inputs, grad), _both(op, inputs, grad)))
            else:
                verdicts.append(_equal(_tensors(compiled(*inputs)), _tensors(op(*inputs))))
    return {"sizes": verdicts, "ok": all(verdict["ok"] for verdict in verdicts)}


def stream_check(op: Op, make: Make, tokens: int) -> dict[str, Any]:
    """Eager runs on a stream that waits for a long kernel are equal to those on the default stream."""
    inputs = make(tokens, 0)
    with torch.no_grad():
        grad = torch.randn_like(op(*inputs))
    expected = _both(op, inputs, grad)
    side, busy = torch.cuda.Stream(), torch.randn(4096, 4096, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        for _ in range(20):
            busy = busy @ busy * 1e-2
        # the inputs become right at the end of the stream's work: a launch elsewhere would read zeros
        copies = [t.detach().clone().requires_grad_() if torch.is_tensor(t) and t.requires_grad else t for t in inputs]
        result = _both(op, copies, grad)
    torch.cuda.synchronize()
    return _equal(result, expected)


def rerun_check(op: Op, make: Make, tokens: int, times: int) -> dict[str, Any]:
    """Many reruns are bit-equal, as they are not where programs race."""
    inputs = make(tokens, 0)
    with torch.no_grad():
        grad = torch.randn_like(op(*inputs))
    expected = _both(op, inputs, grad)
    wrong = [i for i in range(times) if not _equal(_both(op, inputs, grad), expected)["ok"]]
    return {"bit_equal": not wrong, "ok": not wrong, "wrong": wrong[:10]}


def autocast_check(device: str, tokens: int) -> dict[str, Any]:
    """`moe_mlp` of float32 arguments under autocast is that of arguments cast to bfloat16."""
    x, ids, weights_TK, *rest = check_cases.mlp_inputs(device, torch.float32, (tokens, 8, 2, 48, 192), "gelu")
    *parameters, activation, gated = rest
    with torch.autocast(device, torch.bfloat16):
        out = kernels.moe_mlp(x, ids, weights_TK, *parameters, activation, gated)
        grads = torch.autograd.grad(out, [x, *parameters], torch.ones_like(out))
    half = [t.detach().bfloat16().requires_grad_() for t in (x, *parameters)]
    want = kernels.moe_mlp(half[0], ids, weights_TK, *half[1:], activation, gated)
    wanted = torch.autograd.grad(want, half, torch.ones_like(want))
    verdict = _equal([out, *grads], [want, *(g.float() for g in wanted)])
    return {**verdict, "ok": verdict["ok"] and out.dtype == torch.bfloat16}


def _ops(device: str) -> dict[str, tuple[Op, Make]]:
    """The differentiable ops with a maker of their arguments."""

    def mlp(dtype: torch.dtype, d: int, f: int, k: int) -> Make:
        def make(tokens: int, seed: int) -> list[Any]:
            inputs = check_cases.mlp_inputs(device, dtype, (tokens, 8, k, d, f), "silu", True)
            torch.manual_seed(seed)
            inputs[0] = torch.randn(tokens, d, device=device).to(dtype).requires_grad_()
            inputs[1] = check_cases.expert_ids(device, tokens, 8, k, "uniform")
            return inputs

        return make

    def linear(tokens: int, seed: int) -> list[Any]:
        return mlp(torch.bfloat16, 96, 64, 2)(tokens, seed)[:4]  # the first matrix of each expert and no bias

    def head(channels: int) -> Make:
        def make(voxels: int, seed: int) -> list[Any]:
            inputs = check_cases.head_inputs(device, (2, 3, 3, channels, voxels), 2, 0.1)
            torch.manual_seed(seed)
            inputs[0] = torch.randn(inputs[0].shape, device=device).requires_grad_()
            return inputs

        return make

    def grouped(rows: int, seed: int) -> list[Any]:
        torch.manual_seed(seed)
        leaf = lambda *shape: device_checks._leaf(device, torch.bfloat16, *shape)  # noqa: E731
        offsets = torch.tensor([0, rows // 3, rows // 3, rows // 2 + seed, rows], device=device)
        return [leaf(rows, 40), leaf(4, 50, 40), offsets, leaf(4, 50), None, "gelu"]

    def combine(tokens: int, seed: int) -> list[Any]:
        torch.manual_seed(seed)
        y = device_checks._leaf(device, torch.bfloat16, 3 * tokens, 100)
        weights_TK = torch.rand(tokens, 3, device=device).requires_grad_()
        return [y, weights_TK, torch.randperm(3 * tokens, device=device)]

    return {
        "mlp fused": (kernels.moe_mlp, mlp(torch.bfloat16, 48, 64, 2)),
        "mlp fused, one expert per token": (kernels.moe_mlp, mlp(torch.bfloat16, 64, 64, 1)),
        "mlp grouped": (kernels.moe_mlp, mlp(torch.float32, 96, 100, 2)),
        "linear": (kernels.moe_linear, linear),
        "grouped_linear": (kernels.grouped_linear, grouped),
        "combine": (kernels.combine, combine),
        "head C=8": (kernels.fusion_head, head(8)),
        "head C=16": (kernels.fusion_head, head(16)),
    }


def checks(device: str, tokens: int) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Names and checks; a CPU has no graphs and no streams."""
    ops = _ops(device)

    def route(ids: Tensor) -> Any:
        return kernels.route(ids, 8)

    def ids(count: int, seed: int) -> list[Any]:
        torch.manual_seed(seed)
        return [torch.randint(0, 8, (count, 2), device=device)]

    for name, (op, make) in ops.items():
        if name not in ("mlp fused, one expert per token", "head C=16"):
            yield f"compile {name}", lambda o=op, m=make: compile_check(o, m, device, True)
    yield "compile route", lambda: compile_check(route, ids, device, False)
    for name, (op, make) in ops.items():
        yield f"rerun {name}", lambda o=op, m=make: rerun_check(o, m, 7 * tokens, 30 if device == "cuda" else 2)
    yield "autocast mlp", lambda: autocast_check(device, tokens)
    if device != "cuda":
        return
    for name, (op, make) in ops.items():
        yield f"graph forward {name}", lambda o=op, m=make: graph_check(o, m, tokens, False)
        yield f"graph forward + backward {name}", lambda o=op, m=make: graph_check(o, m, tokens, True)
        yield f"stream {name}", lambda o=op, m=make: stream_check(o, m, tokens)
    yield "graph route", lambda: graph_check(route, ids, tokens, False)
