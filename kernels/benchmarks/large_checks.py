"""Checks of layers and heads with more than 2³¹ elements, where 32-bit offsets wrap around. They compare the last rows.

They need up to 25 GB each, so that they run in two lanes, one after the other in each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import device_checks
import mome_kernels as kernels
import torch
from mome_kernels import reference

_LAST = 64


def mlp_check(device: str, rows: int, d: int, f: int) -> dict[str, Any]:
    """`moe_mlp` in bfloat16, one expert per token, with its gradients; compares the last rows."""
    if why := device_checks._large(device, rows * max(d, f) // 128):
        return {"ok": True, "skipped": why}
    torch.manual_seed(0)
    half = {"device": device, "dtype": torch.bfloat16}
    x = torch.randn(rows, d, **half).requires_grad_()
    up = (torch.randn(4, f, d, **half) * d**-0.5).requires_grad_()
    down = (torch.randn(4, d, f, **half) * f**-0.5).requires_grad_()
    ids = (torch.arange(rows, device=device) % 4)[:, None]
    weights_TK = torch.rand(rows, 1, device=device).requires_grad_()
    out = kernels.moe_mlp(x, ids, weights_TK, up, None, down, None, activation="silu")
    d_x, d_weights, d_up, d_down = torch.autograd.grad(out, [x, weights_TK, up, down], x.detach())
    few = [t.detach().double().requires_grad_() for t in (x[-_LAST:], weights_TK[-_LAST:])]
    owner = ids[-_LAST:, 0]
    hidden = torch.nn.functional.silu(torch.einsum("td,tfd->tf", few[0], up.detach().double()[owner]))
    want = torch.einsum("tf,tdf->td", hidden, down.detach().double()[owner]) * few[1]
    wanted = torch.autograd.grad(want, few, few[0].detach())
    verdict = device_checks._beyond([(out[-_LAST:], want), (d_x[-_LAST:], wanted[0]), (d_weights[-_LAST:], wanted[1])])
    finite = bool(d_up.isfinite().all()) and bool(d_down.isfinite().all())
    return {**verdict, "ok": verdict["ok"] and finite}


def head_check(device: str, prompts: int, scales: int, channels: int, voxels: int, backward: bool) -> dict[str, Any]:
    """`fusion_head` of one batch; compares the last voxels of values and, with `backward`, of their gradients."""
    if why := device_checks._large(device, voxels):
        return {"ok": True, "skipped": why}
    torch.manual_seed(0)
    new = lambda *shape: torch.randn(*shape, device=device)  # noqa: E731
    p, c = prompts, channels
    features = new(1, scales, c, voxels).requires_grad_(backward)
    head = [new(p, c), new(p, scales), new(1, p, c, c), new(1, p, c), new(1, p, c, c), new(1, p, c), new(1, p, c),
            new(1, p)]  # fmt: skip
    out = kernels.fusion_head(features, *head, negative_slope=0.5)
    few = features[..., -_LAST:].detach().double().requires_grad_()
    want = reference.fusion_head(few, *(t.double() for t in head), negative_slope=0.5)
    pairs = [(out[..., -_LAST:], want)]
    if backward:
        grad = torch.ones(1, 1, 1, device=device).expand_as(out)
        (d_features,) = torch.autograd.grad(out, features, grad)
        (wanted,) = torch.autograd.grad(want, few, torch.ones_like(want))
        pairs.append((d_features[..., -_LAST:], wanted))
    return device_checks._beyond(pairs)


def checks(device: str) -> Iterator[tuple[str, Callable[[], dict[str, Any]], str]]:
    """Names, checks and lanes; small ones on a CPU, to try the checks themselves."""
    cuda = device == "cuda"
    rows = 2**24 + _LAST if cuda else 300
    yield "linear beyond 2³¹ elements", lambda: device_checks.large_linear_case(device, rows), "A"
    yield "combine beyond 2³¹ elements", lambda: device_checks.large_combine_case(device, rows), "B"
    fused = (2**25 + _LAST if cuda else 200, 64, 64)
    yield "mlp beyond 2³¹ elements", lambda: mlp_check(device, *fused), "A"
    wide = (2**21 + _LAST if cuda else 200, 320, 1024 if cuda else 40)
    yield "mlp of a hidden layer beyond 2³¹ elements", lambda: mlp_check(device, *wide), "B"
    for channels, lane in ((8, "A"), (16, "B")):
        scales = 40 // channels + 1
        voxels = 2**31 // (scales * channels) + 128 if cuda else 300
        name = f"head of features beyond 2³¹ elements, C={channels}"
        yield name, lambda s=scales, c=channels, v=voxels: head_check(device, 2, s, c, v, True), lane
        many = 2**31 // 32 + 128 if cuda else 300
        name = f"head of logits beyond 2³¹ elements, C={channels}"
        yield name, lambda c=channels, v=many: head_check(device, 32, 1, c, v, False), lane
