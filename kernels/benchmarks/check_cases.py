"""The checks of `checks.py` by name: those of `device_checks.py` and those that need more settings.

All memory that torch calls uninitialised is filled with NaN, except where a program is compiled or captured.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import check_modes
import device_checks
import kinks
import large_checks
import mome_kernels as kernels
import torch
from mome_kernels.gpu import configs
from torch import Tensor

SINGLE, HALF, BRAIN = torch.float32, torch.float16, torch.bfloat16
# Three tf32 products give float32 accuracy. One rounds its operands to 11 bits, and truncation adds up over layers.
TF32 = {"floor": 1e-2, "most": 2e-2}
LOADS = ("zipf", "empty", "one")
TMA = ("sm_90", "sm_100", "sm_120")  # the tables of devices that have it


@dataclass(frozen=True)
class Check:
    """One check.

    Attributes:
        run: Returns its verdict, with `ok`.
        tf32: Whether products of float32 may be computed as one tf32 product.
        poisoned: Whether uninitialised memory holds NaN.
        lane: Checks of one lane run one after the other, since each needs a large part of the memory.
    """

    run: Callable[[], dict[str, Any]]
    tf32: bool = False
    poisoned: bool = True
    lane: str = ""

    def verdict(self) -> dict[str, Any]:
        """Runs the check under its settings."""
        with settings(self.tf32, self.poisoned):
            return self.run()


@contextlib.contextmanager
def settings(tf32: bool, poisoned: bool) -> Iterator[None]:
    """Sets tf32, and fills the memory of every `torch.empty` with NaN (integers: their largest number)."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = tf32
    if poisoned:
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cuda.matmul.allow_tf32 = before


def expert_ids(device: str, tokens: int, experts: int, per_token: int, load: str) -> Tensor:
    """Ids (T, K): uniform, skewed to the last experts, without the first one, or all of the last one."""
    scores = torch.rand(tokens, experts, device=device)
    if load == "one":
        return torch.full((tokens, per_token), experts - 1, device=device)
    if load == "zipf":
        scores = scores * torch.arange(1, experts + 1, device=device) ** 3
    if load == "empty":
        scores[:, 0] = -1
    return scores.topk(per_token).indices


def mlp_inputs(
    device: str,
    dtype: torch.dtype,
    sizes: tuple[int, ...],
    activation: str = "gelu",
    gated: bool = False,
    load: str = "uniform",
    bias: bool = True,
    out: int | None = None,
) -> list[Any]:
    """Arguments of `moe_mlp` for sizes (T, E, K, D, F)."""
    torch.manual_seed(0)
    t, e, k, d, f = sizes
    width, out = 2 * f if gated else f, out or d
    leaf = lambda *shape, scale=1.0: device_checks._leaf(device, dtype, *shape, scale=scale)  # noqa: E731
    return [
        leaf(t, d), expert_ids(device, t, e, k, load), torch.rand(t, k, device=device).requires_grad_(),
        leaf(e, width, d, scale=d**-0.5), leaf(e, width) if bias else None,
        leaf(e, out, f, scale=f**-0.5), leaf(e, out) if bias else None, activation, gated,
    ]  # fmt: skip


def head_inputs(device: str, sizes: tuple[int, ...], top_k: int = 0, slope: float = 0.0) -> list[Any]:
    """Arguments of `fusion_head` for sizes (B, P, S, C, V)."""
    torch.manual_seed(0)
    b, p, s, c, v = sizes
    leaf = lambda *shape: device_checks._leaf(device, SINGLE, *shape)  # noqa: E731
    return [
        leaf(b, s, c, v), leaf(p, c), leaf(p, s), leaf(b, p, c, c), leaf(b, p, c), leaf(b, p, c, c), leaf(b, p, c),
        leaf(b, p, c), leaf(b, p), top_k, slope,
    ]  # fmt: skip


def _mlp(inputs: Callable[[], list[Any]], **limits: Any) -> dict[str, Any]:
    return device_checks.compare(kernels.moe_mlp, device_checks.plain_mlp, inputs(), **limits)


def _through_tma(run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Runs a check with TMA in every row of `linear`, which no shipped row has."""
    rows = [row for arch in TMA for row in configs.table(arch)["linear"]]
    before = [dict(row) for row in rows]
    for row in rows:
        row["tma"] = 1
    try:
        return run()
    finally:
        for row, values in zip(rows, before, strict=True):
            row.clear()
            row.update(values)


def _head(inputs: Callable[[], list[Any]], tf32: bool = False) -> dict[str, Any]:
    arguments = inputs()
    keep = kinks.smooth_voxels(arguments, 1e-2 if tf32 else kinks.MARGIN)
    limits = TF32 if tf32 else {}
    verdict = device_checks.compare(kernels.fusion_head, device_checks.plain_head, arguments, keep=keep, **limits)
    return {**verdict, "kept": float(keep.mean())}


def _tied_head(device: str, voxels: int) -> dict[str, Any]:
    """Equal scores everywhere, of which the earlier scales are kept."""
    inputs = head_inputs(device, (2, 3, 4, 8, voxels), 2, 0.1)
    for tensor in inputs[1:3]:
        tensor.data.zero_()
    first_two = [inputs[0][:, :2], inputs[1], inputs[2][:, :2], *inputs[3:9], 0, inputs[10]]
    keep = kinks.smooth_voxels(first_two)  # of all scales the ties would leave out every voxel
    return device_checks.compare(kernels.fusion_head, device_checks.plain_head, inputs, keep=keep)


def route_check(device: str, tokens: int, experts: int, dtype: torch.dtype) -> dict[str, Any]:
    """`route` of ids with gaps in memory, beside a stable sort."""
    torch.manual_seed(0)
    ids = torch.randint(0, experts, (tokens, 4), device=device).to(dtype)[:, ::2]
    first, again = kernels.route(ids, experts), kernels.route(ids, experts)
    counts, offsets, permutation, inverse = first
    flat = ids.flatten().long()
    right = [
        torch.equal(permutation, flat.argsort(stable=True)),
        torch.equal(permutation[inverse], torch.arange(flat.numel(), device=device)),
        torch.equal(counts.long(), flat.bincount(minlength=experts)),
        torch.equal(offsets.long(), torch.nn.functional.pad(counts.long().cumsum(0), (1, 0))),
    ]
    same = all(map(torch.equal, first, again))
    return {"bit_equal": same, "ok": all(right) and same}


def refusal_check(device: str) -> dict[str, Any]:
    """An id out of range ends a process by a device-side assertion; on a CPU it raises an error."""
    paths = [str(Path(__file__).resolve().parent.parent / "torch-ext")]
    code = (
        f"import sys; sys.path[:0] = {paths!r}\n"
        "import torch, mome_kernels\n"
        f"mome_kernels.route(torch.tensor([[0], [6]], device={device!r}), 6)\n"
        f"torch.cuda.synchronize() if {device == 'cuda'} else None\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    said = "device-side assert" in done.stderr or "ids_TK has ids" in done.stderr
    return {"ok": done.returncode != 0 and said, "said": done.stderr.strip()[-200:]}


def checks(device: str, tokens: int = 3000) -> dict[str, Check]:
    """All checks by name. Those that take longest come first."""
    found: dict[str, Check] = {}
    t, voxels = tokens, 20_011 if tokens >= 3000 else 8 * tokens + 1

    def add(name: str, run: Callable[[], dict[str, Any]], **options: Any) -> None:
        assert name not in found, name
        found[name] = Check(run, **options)

    def mlp(name: str, dtype: torch.dtype, sizes: tuple[int, ...], *rest: Any, tf32: bool = False, **more: Any) -> None:
        limits = TF32 if tf32 else {"most": {SINGLE: 1e-3, HALF: 2e-2, BRAIN: 1e-1}[dtype]}
        title = f"mlp {name} {'tf32' if tf32 else str(dtype)[6:]}"
        add(title, lambda: _mlp(lambda: mlp_inputs(device, dtype, sizes, *rest, **more), **limits), tf32=tf32)

    def head(name: str, sizes: tuple[int, ...], *rest: Any, tf32: bool = False) -> None:
        run = lambda: _head(lambda: head_inputs(device, sizes, *rest), tf32)  # noqa: E731
        add(f"head {name}{' tf32' if tf32 else ''}", run, tf32=tf32)

    # first, since ptxas of CUDA 12.8 miscompiled `mlp_dw` at hidden widths that no block divides: layers inside small
    # encoders had gradients that were not finite on an H100 (see tests/kernels/products_in_flight.py)
    for d, f, k in ((8, 24, 1), (37, 50, 2), (48, 8, 1), (64, 40, 2)):
        mlp(f"{d}-{f}", BRAIN, (t, 8, k, d, f))
    for k in (1, 2):
        for tiny in (2, 16, 250):
            for load in ("uniform", "empty"):
                mlp(f"4-8 K={k} T={tiny} {load}", BRAIN, (tiny, 4, k, 4, 8), "gelu", False, load)
        mlp(f"8-8 K={k}", BRAIN, (250, 4, k, 8, 8))
    for load in ("uniform", "zipf"):  # the forward pass is fused on Hopper, the gradients are grouped products
        mlp(f"192-768 {load}", BRAIN, (t, 8, 2, 192, 768), "gelu", False, load)
    for d, f, *rest in ((1024, 512, "silu", True, "zipf"), (512, 1040, "gelu", False, "empty")):
        wide = lambda sizes=(t, 5, 2, d, f), rest=rest: mlp_inputs(device, BRAIN, sizes, *rest)  # noqa: E731
        add(f"mlp {d}-{f} through TMA", lambda wide=wide: _through_tma(lambda: _mlp(wide, most=1e-1)))
    for name, run, lane in large_checks.checks(device):
        add(name, run, poisoned=False, lane=lane)
    # several tiles per program, in which the sums of the backward pass go on
    head("C=8 S=8 top_k=3, many tiles", (2, 7, 8, 8, voxels), 3, 0.1)
    head("C=8 S=5, many tiles", (2, 7, 5, 8, voxels), 0, 0.1)
    add("head of equal scores", lambda: _tied_head(device, t + 1))
    head("of one voxel, prompt and batch", (1, 1, 2, 8, 1))
    for c in (16, 32):
        for tf32 in (False, True):
            head(f"C={c} S=5, many tiles", (2, 3, 5, c, voxels), 0, 0.1, tf32=tf32)
        head(f"C={c} top_k=2", (2, 3, 5, c, t + 1), 2, 0.0)
        head(f"C={c} of one voxel, prompt, scale and batch", (1, 1, 1, c, 1))
    for name, run in check_modes.checks(device, t):
        add(name, run, poisoned=False)
    for name, run in device_checks.cases(device, t):
        if "beyond" not in name:
            add(name, run)
    shapes = (
        ("48-192", (t, 8, 1, 48, 192), "gelu", False), ("64-256 gated", (t, 8, 1, 64, 256), "silu", True),
        ("37-50 gated", (517, 5, 3, 37, 50), "gelu", True), ("1025-100", (t, 8, 2, 1025, 100), "gelu_tanh", False),
        ("320-200 gated", (t, 8, 2, 320, 200), "silu", True),
    )  # fmt: skip
    for name, sizes, activation, gated in shapes:
        mlp(name, SINGLE, sizes, activation, gated, tf32=True)
        mlp(name, HALF, sizes, activation, gated)
    for dtype in (BRAIN, SINGLE):
        for load in LOADS:
            mlp(f"48-192 {load}", dtype, (t, 8, 2, 48, 192), "gelu", False, load)
        mlp("320-200 empty", dtype, (t, 8, 2, 320, 200), "silu", True, "empty")
        mlp("without biases", dtype, (t, 8, 2, 96, 100), "gelu", True, "zipf", False)
        mlp("to another width", dtype, (t, 8, 2, 48, 64), "gelu", False, "uniform", True, 65)
        # Triton compiles arguments that are 1 into the kernel
        mlp("of sizes one", dtype, (1, 1, 1, 1, 1))
        mlp("of widths one to another width", dtype, (t, 3, 2, 1, 1), "gelu", True, "uniform", True, 2)
        mlp("of 300 experts", dtype, (t, 300, 4, 32, 16))
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64):
        experts = 100 if dtype in (torch.uint8, torch.int8) else 1500
        name = f"route {str(dtype)[6:]} E={experts}"
        add(name, lambda e=experts, d=dtype: route_check(device, 10 * t, e, d))
    add("route of one assignment", lambda: route_check(device, 1, 1, torch.int64))
    for dtype in (SINGLE, BRAIN):
        one = lambda d=dtype: device_checks.linear_case(device, d, 1, 1, 1, 1, 1)  # noqa: E731
        add(f"linear of sizes one {str(dtype)[6:]}", one)
    single = lambda run: {**run, "ok": run["bit_equal"] and run["error"] <= 1e-2}  # noqa: E731
    add("linear tf32", lambda: single(device_checks.linear_case(device, SINGLE, t, 8, 2, 96, 64)), tf32=True)
    add("grouped_linear tf32", lambda: single(device_checks.grouped_case(device, SINGLE)), tf32=True)
    add("route refuses an id out of range", lambda: refusal_check(device), poisoned=False)
    return found
