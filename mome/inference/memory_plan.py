"""Chooses prompts at once and number types so that a scan fits into memory, before anything is allocated.

The bytes of every part are a formula. What a network needs for a tile is measured: by `plan.py` before a run, and by
`first_tile.py` in a run, which plans again if need be.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

import torch

from mome.errors import InputError
from mome.inference.planes import shortest_buffer_axis
from mome.memory import as_text, available_bytes, process_bytes

# Prompts whose planes are resampled at once; more need more memory and are not faster.
PROMPTS_AT_ONCE = 8
# Fewer prompts at once slow the network down.
USUAL_CHUNK = 8
_FLOAT32 = 4
# Bytes of a packed and compressed mask per voxel of the scan: those of masks that fill the body (our measurement).
_MASK_BYTES = 1 / 250
# Resampling and writing work in blocks; their buffers do not grow with the scan.
_BLOCK_BYTES = 150_000_000


@dataclass(frozen=True)
class Work:
    """What decides the memory of a segmentation.

    Attributes:
        scan: Voxels of the scan (i, j, k).
        network: Voxels of the part of the network grid that tiles are laid over.
        patch: Voxels of a tile.
        prompts: Number of prompts.
        network_bytes: What the network takes for a tile beside its logits; 0 where it was not measured.
        on_gpu: Whether network and logits are on a GPU.
        disagreement: Whether the disagreement of the routers is summed and drawn, too.
    """

    scan: tuple[int, int, int]
    network: tuple[int, int, int]
    patch: tuple[int, int, int]
    prompts: int
    network_bytes: int = 0
    on_gpu: bool = False
    disagreement: bool = False


@dataclass(frozen=True)
class MemoryPlan:
    """How a scan is segmented within a budget.

    Attributes:
        group: Prompts that share one pass over the tiles; where it is smaller than their number, tiles are encoded
            once for every group.
        chunk: Prompts that are decoded at once.
        half_sums: Whether sums of logits are kept in float16.
    """

    group: int
    chunk: int
    half_sums: bool = False

    def smaller(self) -> MemoryPlan | None:
        """Returns the next plan that needs less memory, None where there is none."""
        if self.chunk > USUAL_CHUNK:
            return replace(self, chunk=self.chunk // 2)
        if self.group > 1:
            group = -(-self.group // 2)
            return replace(self, group=group, chunk=min(self.chunk, group))
        return None

    def bytes_of(self, work: Work) -> dict[str, int]:
        """Returns the bytes of every part, by its name, that are held at the same time at most."""
        axis = shortest_buffer_axis(work.network, work.patch)
        padded = [max(side, p) for side, p in zip(work.network, work.patch, strict=True)]
        plane = prod(side for a, side in enumerate(padded) if a != axis)
        group, ring = min(self.group, work.prompts), work.patch[axis] * plane
        at_once = min(PROMPTS_AT_ONCE, group)
        parts = {
            "scan": prod(work.scan) * _FLOAT32,
            "network grid": 2 * prod(padded) * _FLOAT32,
            # On a GPU, the planes of the scan that these tiles read are beside the sums.
            "sums of logits": ring * (group * (2 if self.half_sums else _FLOAT32) + _FLOAT32 * (1 + work.on_gpu)),
            # Mean logits of the planes that are finished, joined to the planes that were held.
            "planes of logits": (2 * at_once * ring // 2 + group * 2 * plane) * _FLOAT32,
            "logits of a tile": 2 * min(self.chunk, group) * prod(work.patch) * _FLOAT32,
            "network": work.network_bytes,
            # One mask is unpacked, or as much is read of the scan for the coarse mask of the patient and for notes.
            "masks": int(prod(work.scan) * (1 + work.prompts * _MASK_BYTES)),
            "blocks": _BLOCK_BYTES,
        }
        if work.disagreement:  # sums, weights and their mean on the network grid, then the map on the scan's
            parts["disagreement"] = 3 * prod(padded) * _FLOAT32 + prod(work.scan)
        return parts

    def total(self, work: Work, *, gpu: bool = False) -> int:
        """Returns the bytes of all parts, those of the machine or those of the GPU."""
        on_gpu = {"sums of logits", "planes of logits", "logits of a tile", "network"} if work.on_gpu else set()
        return sum(size for name, size in self.bytes_of(work).items() if (name in on_gpu) == gpu)


def fitting_plan(
    work: Work,
    budget: float,
    *,
    chunk: int,
    reserved: float = 0.0,
    gpu_budget: float = 0.0,
    exact: bool = False,
    where: str | None = None,
) -> MemoryPlan:
    """Returns the fastest plan that fits.

    Args:
        work: What is to be done.
        budget: Bytes of the machine for all that is listed in `MemoryPlan.bytes_of`.
        chunk: Prompts that are decoded at once where memory allows.
        reserved: Bytes of the budget that are left free; where no plan leaves them, the smallest is taken.
        gpu_budget: Bytes of the GPU, where the network is on one.
        exact: Keep sums in float32; else they are kept in float16.
        where: The scan, in the error.

    Raises:
        InputError: No plan fits. The message gives the bytes that are needed.
    """
    plan: MemoryPlan | None = MemoryPlan(work.prompts, min(chunk, work.prompts), half_sums=not exact)
    smallest = MemoryPlan(1, 1, half_sums=not exact)
    last_that_fits: MemoryPlan | None = None
    while plan is not None:
        if plan.total(work) <= budget and (not work.on_gpu or plan.total(work, gpu=True) <= gpu_budget):
            if plan.total(work) <= budget - reserved:
                return plan
            last_that_fits = plan
        plan = plan.smaller()
    if last_that_fits is not None:
        return last_that_fits
    needed, given = smallest.total(work), budget
    if work.on_gpu and needed <= budget:
        needed, given = smallest.total(work, gpu=True), gpu_budget
    sides, left = " × ".join(map(str, work.scan)), as_text(max(0, given))
    raise InputError(
        f"the scan of {sides} voxels needs {as_text(needed)} of memory, one prompt at a time; {left} are left",
        where=where,
        hint=f"a larger --memory (this process holds {as_text(process_bytes())} already), a machine with more memory, "
        "or a part of the scan",
    )


def budget(limit: int | None, scan_bytes: int) -> float:
    """Returns the bytes for all parts of a plan: what is free, or less where the user set a limit.

    Args:
        limit: The memory that the process may take; None for no limit.
        scan_bytes: Bytes of the scan, which is in memory already and is one of the parts.
    """
    free = available_bytes() + scan_bytes
    return free if limit is None else min(free, limit - process_bytes() + scan_bytes)


def gpu_bytes(device: torch.device) -> float:
    """Returns the free bytes of a GPU; 0 for other devices."""
    if device.type != "cuda":
        return 0.0
    free, _ = torch.cuda.mem_get_info(device)
    # What torch has reserved and does not use is free for it, too.
    return float(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
