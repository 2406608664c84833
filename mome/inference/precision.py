"""The precision that the network computes in.

On a GPU, torch may round the factors of a float32 convolution to TF32 (10 bits);
`torch.backends.cudnn.allow_tf32 = False` switches that off.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

import torch

from mome.errors import InputError, did_you_mean
from mome.module_objects import weights_sha256

PRECISIONS: dict[str, torch.dtype | None] = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
# Models whose masks in bfloat16 were compared with those in float32, by the first digits of the SHA-256 of their
# weights: the Dice coefficient of the structure that agrees least, as a mean over scans, which
# `benchmarks/inference_precision.py` measures. Single masks may differ more.
MEASURED_IN_BFLOAT16 = {
    "c20c895b356cb730": 0.999,  # mome-ct-tiny, the larynx in the 33 validation patients of OpenKBP
}
# How many products oneDNN keeps compiled, in its cache and in that of torch's layer above it.
_COMPILED_PRODUCTS = 64
# `auto` uses bfloat16 for a model of at least this value.
LOWEST_DICE = 0.995


def chosen_precision(precision: str, model: Any, device: torch.device) -> str:
    """Returns `fp32`, `bf16` or `fp16` for what a user asks; `auto` is decided here.

    `auto` is bfloat16 where the processor multiplies it and `MEASURED_IN_BFLOAT16` says that the model's masks stay the
    same, and float32 elsewhere.

    Raises:
        InputError: There is no such precision.
    """
    known = ("auto", *PRECISIONS)
    if precision not in known:
        raise InputError(
            f"precision is one of {', '.join(known)}, got {precision!r}{did_you_mean(str(precision), known)}"
        )
    if precision != "auto":
        return precision
    if device.type != "cpu" or not multiplies_bfloat16() or not MEASURED_IN_BFLOAT16:
        return "fp32"
    dice = MEASURED_IN_BFLOAT16.get(weights_sha256(model)[:16], 0.0)
    return "bf16" if dice >= LOWEST_DICE else "fp32"


def limit_compiled_products() -> None:
    """Lets oneDNN keep few compiled products, unless the user has decided otherwise or it has computed already.

    oneDNN compiles a product of bfloat16 for every new shape and keeps up to 1,024 of them. Sparse layers of an encoder
    get another number of voxels in every tile, and their products are never asked for again; when the experts of
    mome-ct-tiny computed in bfloat16, memory grew by 18 MB per tile. The convolutions' products are: a scan took 6.3 s
    with 8 kept, 5.3 s and 268 MiB with 64, and 5.2 s and 540 MiB with 1,024 (our measurement of that time).
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, str(_COMPILED_PRODUCTS))


@cache
def multiplies_bfloat16() -> bool:
    """Says whether this processor has instructions for products of bfloat16; others emulate them, which is slower."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    flags = next((line for line in text.splitlines() if line.startswith("flags")), "").split()
    return "avx512_bf16" in flags or "amx_bf16" in flags
