"""Machine code of sm_90 that uses registers of matrix products that are still running.

On Hopper a product of a warp group (HGMMA) runs beside the instructions that follow it. Until the next
`WARPGROUP.DEPBAR`, which waits for it, its accumulator must not be read or written, and the registers of its left
operand must not be written. ptxas has to keep to that. The one of CUDA 12.8, which is part of Triton 3.6, does not
where it copies accumulators, and gives no warning.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import triton

_PRODUCT = re.compile(r"HGMMA\.\d+x(\d+)x\d+\.F32\S* (R\d+), (\S+),")
_REGISTER = re.compile(r"(?<![A-Z])R(\d+)")
_NO_TARGET = ("ST", "RED", "BAR", "BRA", "LDGSTS")  # their first operand is no register that they write


def _width(operation: str) -> int:
    """The number of registers that an instruction writes."""
    if ".128" in operation or operation.endswith("88.4"):
        return 4
    return 2 if ".64" in operation or ".WIDE" in operation or operation.endswith("88.2") else 1


def uses_in_flight(listing: str) -> list[str]:
    """The instructions of a listing by nvdisasm that use registers of running products in a way that is not allowed."""
    accumulators: set[int] = set()
    operands: set[int] = set()
    found = []
    for line in listing.splitlines():
        code = re.sub(r"/\*.*?\*/", "", line).strip()
        code = re.sub(r"^@!?U?P\w+ +", "", code)
        operation, _, rest = code.partition(" ")
        if product := _PRODUCT.match(code):
            first = int(product[2][1:])
            accumulators.update(range(first, first + int(product[1]) // 2))
            if left := _REGISTER.fullmatch(product[3]):
                operands.update(range(int(left[1]), int(left[1]) + 4))
        elif operation.startswith("WARPGROUP.DEPBAR"):
            accumulators.clear()
            operands.clear()
        elif code.endswith(";"):
            target = _REGISTER.match(rest.strip()) if not operation.startswith(_NO_TARGET) else None
            written = set(range(int(target[1]), int(target[1]) + _width(operation))) if target else set()
            used = {int(register) for register in _REGISTER.findall(rest)}
            if used & accumulators or written & (accumulators | operands):
                found.append(code)
    return found


def listing(cubin: bytes, folder: Path) -> str:
    """The machine code of a compiled kernel, by the disassembler that Triton brings."""
    path = folder / "listed.cubin"
    path.write_bytes(cubin)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    return subprocess.run([str(tool), "-c", str(path)], capture_output=True, text=True, check=True).stdout
