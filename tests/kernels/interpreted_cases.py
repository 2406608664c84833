"""The Triton kernels in Triton's interpreter, against the references in float64; prints one JSON line per case.

A process of its own runs this (`test_kernels_interpreter.py`): the interpreter must be asked for before the kernels
are imported.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

import mome_kernels as kernels  # noqa: E402
from mome_kernels import dispatch, ops, reference  # noqa: E402
from mome_kernels.gpu import experts, grouped  # noqa: E402
from test_kernels_ops import assignments, head_inputs, mlp_inputs  # noqa: E402

Result = dict[str, object]


def worst(ours: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest error over largest value."""
    error = (ours.detach().double() - expected.detach()).abs().max() if expected.numel() else torch.zeros(())
    return float(error / expected.detach().abs().max().clamp(min=1e-9)) if expected.numel() else 0.0


def poison() -> None:
    """Leaves NaN in freed memory, so that what a kernel does not write is seen."""
    for size in (100, 1000, 20000, 300000):
        torch.full((size,), float("nan"))


def compare(fast: Callable, plain: Callable, inputs: list, **options: object) -> Result:
    """Values and gradients against float64, and a second run bit by bit."""
    wide = [t.detach().double().requires_grad_() if torch.is_tensor(t) and t.is_floating_point() else t for t in inputs]
    pairs = [(a, b) for a, b in zip(inputs, wide, strict=True) if torch.is_tensor(a) and a.requires_grad]
    leaves = [a for a, _ in pairs]
    poison()
    out, expected = fast(*inputs, **options), plain(*wide, **options)
    grad = torch.randn_like(out)
    poison()
    got = torch.autograd.grad(out, leaves, grad, retain_graph=True)
    again = torch.autograd.grad(out, leaves, grad)
    want = torch.autograd.grad(expected, [b for _, b in pairs], grad.double(), allow_unused=True)
    errors = [worst(a, torch.zeros_like(a).double() if b is None else b) for a, b in zip(got, want, strict=True)]
    same = torch.equal(out, fast(*inputs, **options)) and all(map(torch.equal, got, again))
    return {"errors": [worst(out, expected), *errors], "bit_equal": same, "dtype": str(out.dtype)}


def leaf(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape) * scale).to(dtype).requires_grad_()


def layer(t: int, e: int, k: int, d: int, f: int, out: int, gated: bool, bias: bool, load: str, dtype=torch.float32):
    """Inputs of `moe_mlp`, scaled so that activations stay near one."""
    torch.manual_seed(0)
    width = 2 * f if gated else f
    return [
        leaf(t, d, dtype=dtype),
        assignments(t, e, k, load),
        torch.rand(t, k).requires_grad_(),
        leaf(e, width, d, dtype=dtype, scale=d**-0.5),
        leaf(e, width, dtype=dtype) if bias else None,
        leaf(e, out, f, dtype=dtype, scale=f**-0.5),
        leaf(e, out, dtype=dtype) if bias else None,
    ]


def mlps() -> Iterator[tuple[str, Result]]:
    for dtype in (torch.float32, torch.float16):
        for gated, activation, load, bias in (
            (False, "gelu", "uniform", True),
            (True, "silu", "zipf", False),
            (True, "relu", "empty", True),
        ):
            inputs = mlp_inputs(gated, bias, load, dtype, 37)
            assert dispatch.experts(inputs[0]) is experts
            case = compare(kernels.moe_mlp, reference.moe_mlp, inputs, activation=activation, gated=gated)
            yield f"mlp {dtype} {gated} {activation} {load}", case
    inputs = mlp_inputs(True, True, "zipf", torch.bfloat16, 37)
    yield "mlp bfloat16", compare(kernels.moe_mlp, reference.moe_mlp, inputs, gated=True)
    for d, f, k, activation, load in ((48, 100, 2, "gelu_tanh", "one"), (37, 50, 1, "none", "zipf")):
        inputs = layer(70, 4, k, d, f, d, False, True, load)
        assert experts.runs_fused(inputs[0], inputs[5], False)
        case = compare(kernels.moe_mlp, reference.moe_mlp, inputs, activation=activation)
        yield f"fused {d} {f} {load}", case
    # too wide to fuse, another output width, and an odd size; the hidden layer made again, then kept
    for d, out, gated in ((300, 300, True), (48, 65, False), (1025, 40, False)):
        inputs = layer(40, 3, 2, d, 70, out, gated, True, "uniform")
        assert not experts.runs_fused(inputs[0], inputs[5], gated)
        yield f"grouped {d} {out}", compare(kernels.moe_mlp, reference.moe_mlp, inputs, gated=gated)
    inputs = layer(40, 3, 2, 300, 70, 300, True, True, "zipf")

    def kept(*tensors, **options):
        out, hidden = ops._moe_mlp(*tensors, "silu", True, True)
        assert hidden.shape == (80, 140)
        return out

    yield "grouped, hidden kept", compare(kept, lambda *t: reference.moe_mlp(*t, "silu", True), inputs)


def linears() -> Iterator[tuple[str, Result]]:
    for load, k in (("uniform", 2), ("one", 1), ("empty", 2)):
        x, ids, gates, weight, bias, *_ = layer(70, 5, k, 37, 50, 37, False, True, load)
        yield f"linear {load}", compare(kernels.moe_linear, reference.moe_linear, [x, ids, gates, weight, bias])
    # more rows than one share of dW: partial sums over tokens
    x, ids, gates, weight, bias, *_ = layer(700, 3, 1, 16, 16, 16, False, True, "empty")
    assert grouped.rows_per_share(experts.machine_of(x), 700, 1) == 256
    yield "linear in shares", compare(kernels.moe_linear, reference.moe_linear, [x, ids, gates, weight, bias])
    for activation, indexed in (("gelu", True), ("none", False), ("silu", False)):
        x, weight, bias = leaf(33, 37), leaf(4, 50, 37, scale=0.2), leaf(4, 50)
        index = torch.randint(0, 33, (60,)) if indexed else None
        offsets = torch.tensor([0, 0, 20, 21, 60 if indexed else 33])
        inputs = [x, weight, offsets, bias, index]
        yield (
            f"grouped_linear {activation}",
            compare(kernels.grouped_linear, reference.grouped_linear, inputs, activation=activation),
        )
    ids = assignments(50, 6, 3, "zipf")
    inverse = kernels.route(ids, 6)[3]
    inputs = [leaf(150, 37), torch.rand(50, 3).requires_grad_(), inverse]
    yield "combine", compare(kernels.combine, reference.combine, inputs)


def routes() -> Iterator[tuple[str, Result]]:
    for num_experts, load in ((1, "uniform"), (6, "zipf"), (6, "one"), (300, "uniform")):
        ids = assignments(1100, num_experts, 1, load)
        counts, offsets, permutation, inverse = kernels.route(ids, num_experts)
        flat = ids.flatten()
        right = [
            torch.equal(permutation, flat.argsort(stable=True)),
            torch.equal(permutation[inverse], torch.arange(1100)),
            torch.equal(counts, torch.bincount(flat, minlength=num_experts).int()),
            offsets.tolist() == [0, *counts.cumsum(0).tolist()],
        ]
        yield f"route {num_experts} {load}", {"errors": [0.0 if all(right) else 1.0], "bit_equal": True, "dtype": ""}
    for bad in (-1, 6):
        try:
            kernels.route(torch.tensor([[0, bad]]), 6)
            refused = False
        except ValueError:
            refused = True
        yield f"route refuses {bad}", {"errors": [0.0 if refused else 1.0], "bit_equal": True, "dtype": ""}


def heads() -> Iterator[tuple[str, Result]]:
    for scales, top_k, channels, slope in ((1, 0, 8, 0.0), (5, 0, 8, 0.1), (3, 2, 8, 0.0), (4, 0, 16, 0.1)):
        inputs = head_inputs(scales, 2, 3, channels, 150, torch.float32)
        assert dispatch.head(inputs[0]).__name__ != "mome_kernels.cpu_head"
        case = compare(kernels.fusion_head, reference.fusion_head, inputs, top_k=top_k, negative_slope=slope)
        yield f"head {scales} {top_k} {channels}", case


if __name__ == "__main__":
    for group in (mlps, linears, routes, heads):
        for name, result in group():
            print(json.dumps({"name": name, **result}), flush=True)
