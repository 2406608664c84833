"""Offline compilation of the Triton kernels for real devices: what the interpreter cannot see.

Shared memory must fit the smallest device of each generation, registers must not spill beyond a listed allowance,
and on Hopper the GEMM kernels must use its tensor-core instruction.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="triton is not installed")
from mome_kernels import triton_experts, triton_head  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

# Bytes of shared memory a block may ask for: A100, H100, B200, consumer Blackwell.
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
# Bytes of spill stores and loads allowed: (kernel, width, element size) → bytes. One register, once, in float32.
ALLOWED_SPILLS = {("token_grad", 48, 4): 16}


def build(kernel, constants: dict, floats: str, capability: int, options: dict):
    """Compiles with pointers of the given float type; names ending in these are int32 pointers."""
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name in ("slot_ptr",):
            signature[name] = "*i64"
        elif name in ("expert_ptr", "row_ptr", "end_ptr", "offset_ptr"):
            signature[name] = "*i32"
        elif name in ("y_ptr", "dx_ptr", "dgate_ptr", "gate_ptr") or name.startswith(("dup", "dub", "ddown", "ddb")):
            signature[name] = "*fp32"
        elif name.endswith("_ptr"):
            signature[name] = f"*{floats}"
        else:
            signature[name] = "i32"
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def spills(compiled, capability: int, tmp_path: Path) -> int:
    """Bytes that ptxas spills."""
    ptx = tmp_path / "kernel.ptx"
    ptx.write_text(compiled.asm["ptx"])
    ptxas = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    blackwell = ptxas.with_name("ptxas-blackwell")
    tool = blackwell if capability >= 100 and blackwell.is_file() else ptxas
    target = re.search(r"\.target\s+(\w+)", compiled.asm["ptx"]).group(1)
    done = subprocess.run(
        [str(tool), "-v", f"--gpu-name={target}", str(ptx), "-o", "/dev/null"],
        capture_output=True,
        text=True,
        check=True,
    )
    return sum(map(int, re.findall(r"(\d+) bytes spill", done.stderr)))


KERNELS = {
    "forward": triton_experts._forward_kernel,
    "token_grad": triton_experts._token_grad_kernel,
    "weight_grad": triton_experts._weight_grad_kernel,
}
DEVICES = (80, 90, 100, 120)
EXPERT_CASES = [
    *[(name, width, 2, capability) for name in KERNELS for width in (16, 48) for capability in DEVICES],
    *[("forward", 96, 2, capability) for capability in DEVICES],
    *[(name, 48, 4, 90) for name in KERNELS],
]


@pytest.mark.parametrize(("name", "width", "element", "capability"), EXPERT_CASES)
def test_expert_kernels(name: str, width: int, element: int, capability: int, tmp_path: Path) -> None:
    """The most demanding variant: gated, erf-GELU, biases."""
    kernel = KERNELS[name]
    chosen = triton_experts.blocks(name, width, width, element, hopper=capability in (90, 100))
    options = {key: chosen.pop(key) for key in ("num_warps", "num_stages")}
    constants = {"ACT": 3, "GATED": True, "UP_BIAS": True, "DOWN_BIAS": True, "PRECISION": "ieee", **chosen}
    constants = {key: value for key, value in constants.items() if key in kernel.arg_names}
    compiled = build(kernel, constants, "bf16" if element == 2 else "fp32", capability, options)
    assert compiled.metadata.shared <= SHARED[capability]
    assert spills(compiled, capability, tmp_path) <= ALLOWED_SPILLS.get((name, width, element), 0)
    if capability == 90 and element == 2:
        assert "wgmma" in compiled.asm["ptx"]


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize(("channels", "capability"), [(8, 80), (8, 90), (8, 120), (16, 90), (32, 90)])
def test_head_kernels(direction: str, channels: int, capability: int, tmp_path: Path) -> None:
    kernel = getattr(triton_head, f"_{direction}_kernel")
    block, warps = triton_head.tile(channels, backward=direction == "backward")
    constants = {"S": 8, "C": channels, "BLOCK": block, "TOP_K": 0}
    compiled = build(kernel, constants, "fp32", capability, {"num_warps": warps})
    assert compiled.metadata.shared <= SHARED[capability]
    assert spills(compiled, capability, tmp_path) == 0
