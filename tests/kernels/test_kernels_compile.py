"""Offline compilation of the Triton kernels for real devices.

Every shipped configuration must fit the device's shared memory and its registers, and on Hopper and Blackwell the
matrix kernels must use the tensor-core instruction. The quick tier compiles one row of every kernel for Hopper, the
tier `wide` everything for Hopper, and the tier `long` everything for the other devices. Each launch is compiled once;
Triton keeps the results on disk, where the processes of pytest-xdist and later runs find them.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Collection
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
import triton
from compile_cases import (
    every_row,
    fused_launch,
    head_launches,
    linear_launch,
    linear_variants,
    narrow_launches,
    row_launch,
    small_launches,
    tma,
    tma_launches,
)
from mome_kernels import checks
from mome_kernels.gpu import configs
from mome_kernels.gpu.launch import Launch, Machine
from products_in_flight import listing, uses_in_flight
from triton.backends.compiler import GPUTarget

# Bytes of shared memory a block may ask for: A100, H100, B200, consumer Blackwell, MI300.
SHARED = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "sm_120": 99, "gfx942": 64}
# Bytes of stack (spilled registers) per thread that are allowed. The gated 128 × 128 tile spills in its epilogue, once
# per tile and outside the loop over K. The others are two registers, which are read back at most twice in loops of more
# than 800 instructions.
ALLOWED = {
    ("sm_90", "linear"): 64, ("sm_120", "mlp_dw between"): 8, ("sm_80", "head backward_features"): 8,
    ("sm_120", "head backward_features"): 8, ("sm_100", "head backward_weights"): 8,
    # at D = 96 with biases; without them nothing spills, and an H100 is a quarter faster than with tiles that never do
    ("sm_90", "mlp 96"): 24, ("sm_90", "mlp_dx 96"): 88,
}  # fmt: skip
TMA = {"sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma"}  # devices with TMA, and their tensor-core instruction
ROWS = [(arch, kernel, index) for arch in SHARED for kernel, index in every_row(arch)]


def tiered(cases: list[tuple], quick: Collection[tuple] = ()) -> list:
    """Parameters of a test whose first one is the architecture, marked by tier."""
    marks = lambda case: () if case in quick else (pytest.mark.wide if case[0] == "sm_90" else pytest.mark.long)  # noqa: E731
    return [pytest.param(*case, marks=marks(case)) for case in cases]


def target(arch: str) -> GPUTarget:
    return GPUTarget("hip", arch, 64) if arch.startswith("gfx") else GPUTarget("cuda", int(arch[3:]), 32)


def stack(compiled, arch: str, tmp_path: Path) -> int:
    """Bytes of registers that a thread spills."""
    if arch.startswith("gfx"):
        return 4 * sum(map(int, re.findall(r"vgpr_spill_count:\s+(\d+)", compiled.asm["amdgcn"])))
    path = tmp_path / "kernel.cubin"
    path.write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    report = subprocess.run([str(tool), "-res-usage", str(path)], capture_output=True, text=True, check=True).stdout
    return int(re.search(r"STACK:(\d+)", report).group(1))


def check(launch: Launch, arch: str, kernel: str, tmp_path: Path):
    compiled = launch.compile(target(arch))
    assert compiled.metadata.shared <= SHARED[arch] * 1024
    assert stack(compiled, arch, tmp_path) <= ALLOWED.get((arch, kernel), 0)
    if arch == "sm_90":
        assert uses_in_flight(listing(compiled.asm["cubin"], tmp_path)) == []
    return compiled


FIRST_ROWS = [("sm_90", kernel, 0) for kernel in ("mlp", "mlp_dx", "mlp_dw", "linear", "dw")]


@pytest.mark.parametrize(("arch", "kernel", "index"), tiered(ROWS, quick=FIRST_ROWS))
def test_every_shipped_configuration(arch: str, kernel: str, index: int, tmp_path: Path) -> None:
    row = configs.table(arch)[kernel][index]
    label = f"{kernel} {row['up_to'].get('d')}" if not row["up_to"].get("gated", 1) else kernel
    compiled = check(row_launch(Machine(arch, 132), kernel, row), arch, label, tmp_path)
    height = row.get("BM", row.get("BN"))  # of the product; four warps share an instruction of 64 rows
    if arch == "sm_90" and height >= max(64, 16 * row["num_warps"]):
        assert "wgmma.mma_async" in compiled.asm["ptx"]
    if arch == "sm_100" and kernel == "linear" and row["up_to"].get("odd") == 0 and row["up_to"]["bytes"] == 2:
        assert "tcgen05.mma" in compiled.asm["ptx"]


@pytest.mark.parametrize("arch", tiered([(arch,) for arch in SHARED]))
def test_widths_between_the_bounds(arch: str, tmp_path: Path) -> None:
    for launch in narrow_launches(Machine(arch, 132)):
        check(launch, arch, "mlp_dw between", tmp_path)


# Token width, hidden width, gated: hidden widths that no block divides, at which kernels for Hopper had read
# accumulators too early, and neighbours of them.
ODD = [
    (4, 8, False), (8, 24, False), (37, 50, False), (48, 8, False), (64, 40, False), (96, 40, False),
    (128, 24, False), (8, 8, True), (64, 40, True),
]  # fmt: skip
ODD_CASES = [("sm_90", kernel, *widths) for widths in ODD for kernel in ("mlp", "mlp_dx", "mlp_dw")]


@pytest.mark.parametrize(
    ("arch", "kernel", "d", "f", "gated"), tiered(ODD_CASES, quick=[("sm_90", "mlp_dw", 4, 8, False)])
)
def test_odd_widths(arch: str, kernel: str, d: int, f: int, gated: bool, tmp_path: Path) -> None:
    launch = fused_launch(Machine(arch, 132), kernel, d, f, gated, torch.bfloat16)
    text = listing(launch.compile(target(arch)).asm["cubin"], tmp_path)
    assert gated or "HGMMA" in text
    assert uses_in_flight(text) == []


LISTING = """
        /*0010*/                   WARPGROUP.ARRIVE ;
        /*0020*/                   HGMMA.64x16x16.F32.BF16 R24, R48, gdesc[UR32].tnspB, R24 ;
        /*0030*/                   LDSM.16.M88.4 R{operand}, [R56+0x10] ;
        /*0040*/                   HGMMA.64x16x16.F32.BF16 R24, R52, gdesc[UR16].tnspB, R24, gsb0 ;
        /*0050*/              @!P3 MOV R{target}, R{source} ;
        /*0060*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0070*/                   STG.E desc[UR4][R2.64], R31 ;
"""


def test_registers_of_running_products_are_found() -> None:
    cases = ((60, 8, 9, 0), (60, 8, 31, 1), (60, 24, 9, 1), (46, 8, 9, 1), (40, 53, 31, 1))
    for operand, target, source, found in cases:
        text = LISTING.format(operand=operand, target=target, source=source)
        assert len(uses_in_flight(text)) == found, (operand, target, source)


@pytest.mark.parametrize(
    ("arch", "index"), tiered([(arch, index) for arch, kernel, index in ROWS if kernel == "linear"])
)
def test_linear_variants(arch: str, index: int, tmp_path: Path) -> None:
    machine = Machine(arch, 132)
    for launch in linear_variants(machine, configs.table(arch)["linear"][index]):
        check(launch, arch, "linear", tmp_path)


@pytest.mark.parametrize(
    ("arch", "index"), tiered([(arch, index) for arch, kernel, index in ROWS if kernel == "linear" and arch in TMA])
)
def test_linear_through_tma(arch: str, index: int, tmp_path: Path) -> None:
    row = configs.table(arch)["linear"][index]
    for launch in tma_launches(Machine(arch, 132), row):
        assert launch.args["W_TMA"] and launch.args["A_TMA"] != launch.args["GATHER"]
        compiled = check(launch, arch, "linear", tmp_path)
        ptx, ttgir = compiled.asm["ptx"], compiled.asm["ttgir"]
        assert "cp.async.bulk.tensor.3d" in ptx
        assert ("cp.async.bulk.tensor.2d" in ptx) == launch.args["A_TMA"]
        assert row["BM"] < 64 or TMA[arch] in ptx
        if row["up_to"].get("bytes") == 2:  # the product reads shared memory, where TMA wrote, not registers
            assert "ttg.local_load" not in ttgir
            assert launch.args["GATHER"] or not re.search(r"ttg\.local_(alloc|store) %", ttgir)


def test_pointers_where_tma_cannot_read() -> None:
    for arch, lengths in (("sm_89", (64, 64)), ("gfx942", (64, 64)), ("sm_90", (64, 61)), ("sm_120", (64, 64))):
        with tma(*configs.table(arch)["linear"]):
            launch = linear_launch(Machine(arch, 132), *lengths, False, False, torch.bfloat16, gather=False)
        assert launch.args["W_TMA"] == launch.args["A_TMA"] == (arch == "sm_120")


@pytest.mark.parametrize("arch", tiered([(arch,) for arch in SHARED], quick=[("sm_90",)]))
def test_small_kernels(arch: str, tmp_path: Path) -> None:
    for name, launch in small_launches(Machine(arch, 132)).items():
        check(launch, arch, name, tmp_path)


def test_no_block_reaches_past_the_numbers_of_rows() -> None:
    for arch in SHARED:
        for rows in configs.table(arch).values():
            assert all(row.get(block, 0) <= checks.LARGEST_BLOCK for row in rows for block in ("BM", "BT"))
        launches = small_launches(Machine(arch, 132)).values()
        assert all(launch.args.get("BT", 0) <= checks.LARGEST_BLOCK for launch in launches)
    assert checks.MAX_ROWS + checks.LARGEST_BLOCK == 2**31


def test_a_device_without_a_table_takes_the_nearest() -> None:
    assert configs.table("sm_89") == configs.table("sm_120") == configs.table("sm_75")
    assert configs.table("sm_103") == configs.table("sm_100")


# one shape per device with eight channels, since it takes many seconds to compile
HEADS = [("sm_90", 8, 1), ("sm_80", 8, 5), ("sm_90", 8, 5), ("sm_100", 8, 5), ("sm_120", 8, 5), ("gfx942", 8, 1)]
HEADS += [(arch, *shape) for arch in SHARED for shape in ((16, 5), (32, 8))]


HEAVY = ("sm_90", 8, 5)  # as long as all other heads of Hopper together


@pytest.mark.parametrize(
    ("arch", "channels", "scales"),
    [
        *tiered([case for case in HEADS if case != HEAVY], quick=[("sm_90", 16, 5)]),
        pytest.param(*HEAVY, marks=pytest.mark.long),
    ],
)
def test_head_kernels(arch: str, channels: int, scales: int, tmp_path: Path) -> None:
    for launch in head_launches(Machine(arch, 132), channels, scales):
        compiled = check(launch, arch, f"head {launch.kernel.__name__}", tmp_path)
        if (
            launch.args.get("PRECISION") is None
        ):  # the compiler must not turn the sums into products, which would round to tf32
            assert "tt.dot" not in compiled.asm["ttir"]
