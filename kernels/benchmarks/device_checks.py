"""Compares every op on the device with float64, and its errors with those of torch in the same dtype."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import kinks
import mome_kernels as kernels
import torch
from mome_kernels.torch_impl import experts as torch_experts
from mome_kernels.torch_impl import head as torch_head
from mome_kernels.weights import ExpertWeights, HeadWeights
from torch import Tensor

Case = tuple[str, Callable[[], dict[str, Any]]]


def _worst(ours: Tensor, exact: Tensor) -> float:
    error = (ours.detach().double() - exact.detach()).abs().max() / exact.detach().abs().max().clamp(min=1e-9)
    return float(error)


def _run(function: Callable[..., Tensor], inputs: list, grad: Tensor) -> list[Tensor]:
    leaves = [t for t in inputs if torch.is_tensor(t) and t.requires_grad]
    out = function(*inputs)
    return [out, *torch.autograd.grad(out, leaves, grad.to(out.dtype))]


def compare(
    fast: Callable[..., Tensor],
    plain: Callable[..., Tensor],
    inputs: list,
    keep: Tensor | None = None,
    floor: float | None = None,
    most: float = 1.0,
) -> dict[str, Any]:
    """The largest relative error of values and gradients, that of torch, and whether a second run is bit-equal.

    `plain` is the torch implementation; in float64 it is the reference. An error may be three times that of torch in
    the dtype of the inputs, but not above `most`, plus `floor`. `keep` holds 0 where outputs are left out, since a
    rounding error may change them by a jump (`kinks.py`), and 1 elsewhere.
    """
    wide = [
        t.detach().double().requires_grad_(t.requires_grad) if torch.is_tensor(t) and t.is_floating_point() else t
        for t in inputs
    ]
    with torch.no_grad():
        grad = torch.randn_like(fast(*inputs))
        grad = grad if keep is None else grad * keep.to(grad.dtype)
    exact = _run(plain, wide, grad.double())
    ours, again = _run(fast, inputs, grad), _run(fast, inputs, grad)
    torchs = _run(plain, inputs, grad)
    if keep is not None:
        for results in (exact, ours, again, torchs):
            results[0] = results[0].detach() * keep.to(results[0].dtype)
    error = max(_worst(a, b) for a, b in zip(ours, exact, strict=True))
    reference = max(_worst(a, b) for a, b in zip(torchs, exact, strict=True))
    if floor is None:
        floor = 1e-5 if inputs[0].dtype == torch.float32 else 2e-3
    same = all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))
    right = error <= min(3 * reference, most) + floor  # false for NaN
    return {"error": error, "torch_error": reference, "bit_equal": same, "ok": same and right}


class _Differentiable(torch.autograd.Function):
    """The torch implementation as a differentiable function, so that it can serve as the reference on any device."""

    @staticmethod
    def forward(ctx: Any, forward: Callable, backward: Callable, *inputs: Any) -> Tensor:
        ctx.backward, ctx.inputs = backward, inputs
        out = forward(*inputs)
        return out[0] if isinstance(out, tuple) else out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        gradients = iter(ctx.backward(grad.contiguous(), *ctx.inputs))
        picked = []
        for value in ctx.inputs:
            tensor = torch.is_tensor(value) and value.is_floating_point()
            gradient = next(gradients) if tensor or value is None else None
            picked.append(gradient if tensor else None)
        return None, None, *picked


def plain_mlp(*inputs: Any) -> Tensor:
    """`moe_mlp` by the torch implementation."""
    return _Differentiable.apply(
        lambda x, ids, weights, *layer: torch_experts.mlp_forward(x, ids, weights, ExpertWeights(*layer)),
        lambda grad, x, ids, weights, *layer: torch_experts.mlp_backward(grad, x, ids, weights, ExpertWeights(*layer)),
        *inputs,
    )


def plain_linear(*inputs: Any) -> Tensor:
    """`moe_linear` by the torch implementation."""
    return _Differentiable.apply(torch_experts.linear_forward, torch_experts.linear_backward, *inputs)


def plain_head(*inputs: Any) -> Tensor:
    """`fusion_head` by the torch implementation."""
    return _Differentiable.apply(
        lambda features, *head: torch_head.forward(features, HeadWeights(*head)),
        lambda grad, features, *head: torch_head.backward(grad, features, HeadWeights(*head)),
        *inputs,
    )


def _leaf(device: str, dtype: torch.dtype, *shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, device=device) * scale).to(dtype).requires_grad_()


def mlp_case(
    device: str, dtype: torch.dtype, t: int, e: int, k: int, d: int, f: int, gated: bool, act: str, one: bool = False
) -> dict[str, Any]:
    """`moe_mlp` with biases; `one` sends every token to the last expert."""
    torch.manual_seed(0)
    leaf = lambda *shape, scale=1.0: _leaf(device, dtype, *shape, scale=scale)  # noqa: E731
    ids = torch.rand(t, e, device=device).topk(k).indices
    if one:
        ids = torch.full_like(ids, e - 1)
    weights_TK = torch.rand(t, k, device=device).requires_grad_()
    w = 2 * f if gated else f
    up, up_bias = leaf(e, w, d, scale=d**-0.5), leaf(e, w)
    down, down_bias = leaf(e, d, f, scale=f**-0.5), leaf(e, d)
    inputs = [leaf(t, d), ids, weights_TK, up, up_bias, down, down_bias, act, gated]
    return compare(kernels.moe_mlp, plain_mlp, inputs, keep=kinks.smooth_tokens(inputs))


def linear_case(device: str, dtype: torch.dtype, t: int, e: int, k: int, d: int, f: int) -> dict[str, Any]:
    torch.manual_seed(0)
    leaf = lambda *shape, scale=1.0: _leaf(device, dtype, *shape, scale=scale)  # noqa: E731
    ids = torch.rand(t, e, device=device).topk(k).indices
    weights_TK = torch.rand(t, k, device=device).requires_grad_()
    return compare(
        kernels.moe_linear, plain_linear, [leaf(t, d), ids, weights_TK, leaf(e, f, d, scale=d**-0.5), leaf(e, f)]
    )


def head_case(device: str, p: int, s: int, c: int, v: int, top_k: int, slope: float) -> dict[str, Any]:
    torch.manual_seed(0)
    leaf = lambda *shape: _leaf(device, torch.float32, *shape)  # noqa: E731
    inputs = [
        leaf(2, s, c, v), leaf(p, c), leaf(p, s), leaf(2, p, c, c), leaf(2, p, c), leaf(2, p, c, c), leaf(2, p, c),
        leaf(2, p, c), leaf(2, p), top_k, slope,
    ]  # fmt: skip
    return compare(kernels.fusion_head, plain_head, inputs, keep=kinks.smooth_voxels(inputs))


def grouped_case(device: str, dtype: torch.dtype) -> dict[str, Any]:
    """Grouped linear forward, dX and dW with an empty group, odd sizes and a gather."""
    torch.manual_seed(0)
    x, weight = _leaf(device, dtype, 100, 37), _leaf(device, dtype, 4, 50, 37, scale=0.2)
    offsets = torch.tensor([0, 70, 70, 71, 300], device=device)
    index = torch.randint(0, 100, (300,), device=device)

    def plain(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
        rows = x[index].split(offsets.diff().tolist())
        return torch.cat([r @ w.t() for r, w in zip(rows, weight.unbind(0), strict=True)])

    return compare(lambda *t: kernels.grouped_linear(*t, gather_index=index), plain, [x, weight, offsets])


def route_case(device: str, tokens: int, experts: int) -> dict[str, Any]:
    ids = torch.randint(0, experts, (tokens, 2), device=device)
    counts, offsets, permutation, inverse = kernels.route(ids, experts)
    flat = ids.flatten()
    right = [
        torch.equal(permutation, flat.argsort(stable=True)),
        torch.equal(permutation[inverse], torch.arange(flat.numel(), device=device)),
        torch.equal(counts.long(), flat.bincount(minlength=experts)),
        int(offsets[-1]) == flat.numel(),
    ]
    return {"error": 0.0, "torch_error": 0.0, "bit_equal": True, "ok": all(right)}


def combine_case(device: str, dtype: torch.dtype) -> dict[str, Any]:
    torch.manual_seed(0)
    ids = torch.rand(500, 7, device=device).topk(3).indices
    inverse = kernels.route(ids, 7)[3]
    weights_TK = torch.rand(500, 3, device=device).requires_grad_()

    def plain(y: Tensor, weights_TK: Tensor) -> Tensor:
        return (y[inverse].view(500, 3, -1) * weights_TK[..., None].to(y.dtype)).sum(1)

    fast = lambda y, weights_TK: kernels.combine(y, weights_TK, inverse)  # noqa: E731
    return compare(fast, plain, [_leaf(device, dtype, 1500, 100), weights_TK])


def _large(device: str, rows: int) -> str | None:
    """The reason to skip a check of `rows` rows on a device, or None."""
    if rows < 2**24:
        return None  # small enough to test the check itself on any device
    if device != "cuda":
        return "a CPU would take minutes"
    gib = torch.cuda.get_device_properties(device).total_memory / 2**30
    return None if gib >= 30 else f"the device has {gib:.0f} GiB, the check needs 30"


def _beyond(pairs: list[tuple[Tensor, Tensor]]) -> dict[str, Any]:
    """Compares bfloat16 results with float64 on a few rows."""
    error = max(_worst(ours, exact) for ours, exact in pairs)
    return {"error": error, "ok": error <= 2e-2}


def large_combine_case(device: str, rows: int = 2**24 + 64) -> dict[str, Any]:
    """`combine` and its gradients with more than 2³¹ elements, where 32-bit offsets wrap; compares the last 64 rows."""
    if why := _large(device, rows):
        return {"ok": True, "skipped": why}
    torch.manual_seed(0)
    y = _rows(device, rows)
    weights_TK = torch.rand(rows, 1, device=device).requires_grad_()
    out = kernels.combine(y, weights_TK, torch.arange(rows, device=device))
    d_y, d_weights = torch.autograd.grad(out, [y, weights_TK], y.detach())
    last_y, last_weights = y[-64:].detach().double(), weights_TK[-64:].detach().double()
    want = last_y * last_weights
    return _beyond([(out[-64:], want), (d_y[-64:], want), (d_weights[-64:], last_y.square().sum(1, keepdim=True))])


def large_linear_case(device: str, rows: int = 2**24 + 64) -> dict[str, Any]:
    """`moe_linear` and its gradients with more than 2³¹ elements; compares the last 64 rows."""
    if why := _large(device, rows):
        return {"ok": True, "skipped": why}
    torch.manual_seed(0)
    x, weight = _rows(device, rows), _leaf(device, torch.bfloat16, 4, 128, 128, scale=128**-0.5)
    ids = (torch.arange(rows, device=device) % 4)[:, None]
    weights_TK = torch.rand(rows, 1, device=device)
    out = kernels.moe_linear(x, ids, weights_TK, weight)
    (d_x,) = torch.autograd.grad(out, x, x.detach())
    last_x, last_weights = x[-64:].detach().double(), weights_TK[-64:].double()
    matrices = weight.detach().double()[ids[-64:, 0]]
    want = torch.einsum("td,tfd->tf", last_x, matrices) * last_weights
    return _beyond([(out[-64:], want), (d_x[-64:], torch.einsum("tf,tfd->td", last_x, matrices) * last_weights)])


def _rows(device: str, rows: int) -> Tensor:
    """Random rows (rows, 128), made in bfloat16 to avoid a float32 copy."""
    return torch.randn(rows, 128, device=device, dtype=torch.bfloat16).requires_grad_()


FIRST = 6  # this many checks run before the first timing: five vision widths and a head


def cases(device: str, tokens: int = 3000) -> Iterator[Case]:
    """All checks, the most important first. `tokens` scales their size."""
    half, single = torch.bfloat16, torch.float32
    vision = (
        (48, 192, 1, False, "gelu"), (96, 384, 2, False, "gelu_tanh"), (64, 64, 2, False, "relu"),
        (32, 128, 2, False, "silu"), (64, 256, 1, True, "silu"),
    )  # fmt: skip
    others = (
        (192, 512, 1, True, "silu"), (37, 50, 2, True, "gelu"), (256, 512, 2, False, "gelu"),
        (1025, 100, 2, False, "gelu"), (512, 512, 2, True, "silu"), (768, 3072, 2, False, "gelu"),
    )  # fmt: skip
    heads = ((5, 8, 0, 0.0), (5, 8, 0, 0.1), (1, 8, 0, 0.0), (5, 8, 2, 0.0), (4, 16, 0, 0.1), (3, 32, 0, 0.1))

    def mlp(dtype: torch.dtype, d: int, f: int, k: int, gated: bool, act: str) -> Case:
        name = f"mlp D={d} F={f} K={k} {'gated ' if gated else ''}{act} {str(dtype)[6:]}"
        return name, lambda: mlp_case(device, dtype, tokens, 8, k, d, f, gated, act)

    def head(s: int, c: int, top_k: int, slope: float) -> Case:
        name = f"head S={s} C={c} top_k={top_k} slope={slope}"
        return name, lambda: head_case(device, 7, s, c, tokens + 1, top_k, slope)

    for widths in vision:
        yield mlp(half, *widths)
    yield head(*heads[0])
    for widths in vision:
        yield mlp(single, *widths)
    for widths in others:
        yield mlp(half, *widths)
        yield mlp(single, *widths)
    yield "mlp all to one", lambda: mlp_case(device, half, tokens, 8, 1, 48, 192, False, "gelu", True)
    yield "mlp one token", lambda: mlp_case(device, half, 1, 8, 2, 48, 192, False, "gelu")
    yield "mlp float64", lambda: mlp_case(device, torch.float64, 64, 4, 2, 16, 32, True, "silu")
    for experts in (1, 8, 128, 300):
        yield f"route E={experts}", lambda e=experts: route_case(device, 10 * tokens, e)
    for dtype in (half, torch.float16, single):
        yield f"linear {str(dtype)[6:]}", lambda dt=dtype: linear_case(device, dt, tokens, 8, 2, 96, 64)
        yield f"grouped_linear {str(dtype)[6:]}", lambda dt=dtype: grouped_case(device, dt)
        yield f"combine {str(dtype)[6:]}", lambda dt=dtype: combine_case(device, dt)
    for sizes in heads[1:]:
        yield head(*sizes)
    yield "combine beyond 2³¹ elements", lambda: large_combine_case(device)
    yield "linear beyond 2³¹ elements", lambda: large_linear_case(device)
