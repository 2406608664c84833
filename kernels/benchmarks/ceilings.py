"""The rates that a device reaches, measured beside the kernels: the ceilings of the rooflines.

Three programs that do nothing else give them: a copy of 2 GiB, a bfloat16 product of 8192³ by cuBLAS, and chains of
float32 multiply-adds on the vector units.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from shapes import Device

_SIDE, _COPIED = 8192, 1 << 30
_CHAINS, _STEPS, _BLOCK = 16, 512, 128


@triton.jit
def _multiply_adds(out, STEPS: tl.constexpr, CHAINS: tl.constexpr, BLOCK: tl.constexpr):
    """Each thread runs CHAINS independent chains of STEPS multiply-adds."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(out + place)
    chains = a[:, None] + tl.arange(0, CHAINS)[None, :].to(tl.float32)
    factor = a[:, None] * 1.0001
    for _ in range(STEPS // 8):
        for _ in tl.static_range(8):  # eight steps per turn, so that the loop itself costs little
            chains = chains * factor + 0.5
    tl.store(out + place, tl.sum(chains, axis=1))


def measure(time_ms: Callable[[Callable[[], Any]], float], processors: int) -> dict[str, float]:
    """FLOP/s of bfloat16 products, bytes/s read and written, and vector instructions/s of the current device."""
    torch.manual_seed(0)
    source = torch.randint(0, 255, (_COPIED,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    bandwidth = 2 * _COPIED / (1e-3 * time_ms(lambda: target.copy_(source)))
    a, b = (torch.randn(_SIDE, _SIDE, device="cuda").bfloat16() for _ in range(2))
    flops = 2 * _SIDE**3 / (1e-3 * time_ms(lambda: a @ b))
    programs = processors * 64
    out = torch.rand(programs * _BLOCK, device="cuda")

    def chains() -> None:
        _multiply_adds[(programs,)](out, _STEPS, _CHAINS, _BLOCK, num_warps=_BLOCK // 32)

    instructions = programs * _BLOCK * _CHAINS * _STEPS / (1e-3 * time_ms(chains))
    return {"flops": flops, "bandwidth": bandwidth, "instructions": instructions}


def limits(step: dict[str, Any]) -> Device | None:
    """The limits that a finished measurement gives, or None where it failed."""
    names = ("flops", "bandwidth", "instructions")
    return Device(*(step[name] for name in names)) if all(name in step for name in names) else None
