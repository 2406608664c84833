"""The memory that one scan may take, read once, and the plans that fit into it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from mome.inference.loaded_scan import LoadedScan
from mome.inference.memory_plan import MemoryPlan, Work, budget, fitting_plan, gpu_bytes
from mome.inference.predictor import Predictor


class ScanMemory:
    """The memory that one scan may take; it is read when the object is made.

    Args:
        ready: The scan.
        predictor: Computes the logits of its tiles.
        prompts: Number of prompts.
        limit: The memory that the process may take; None for no limit.
        chunk: Prompts that are decoded at once where memory allows.
        exact: Keep sums of logits in float32.
        reserved: Bytes that are left free where possible.
        source: The scan's file, in errors.
        disagreement: The disagreement of the routers is drawn, too.
    """

    def __init__(
        self,
        ready: LoadedScan,
        predictor: Predictor,
        prompts: int,
        *,
        limit: int | None,
        chunk: int,
        exact: bool,
        reserved: int,
        source: Path | None,
        disagreement: bool = False,
    ) -> None:
        device, scan = predictor.device, ready.volume
        on_gpu = device.type == "cuda"
        shape, patch = ready.network.shape, predictor.patch_size
        self._work = Work(scan.shape, shape, patch, prompts, on_gpu=on_gpu, disagreement=disagreement)
        self._budget, self._gpu_budget = budget(limit, scan.array.nbytes), gpu_bytes(device)
        self._chunk, self._exact, self._reserved = chunk, exact, reserved
        self._where = None if source is None else str(source)

    def leaves_reserved(self, network_bytes: int = 0) -> bool:
        """Says whether some plan leaves free what is reserved.

        Args:
            network_bytes: As for `plan`.
        """
        work, smallest = replace(self._work, network_bytes=network_bytes), MemoryPlan(1, 1, half_sums=not self._exact)
        return smallest.total(work) <= self._budget - self._reserved

    def plan(self, network_bytes: int = 0, *, in_float32: bool = False) -> MemoryPlan:
        """Returns the fastest plan that fits.

        Args:
            network_bytes: What the network takes for a tile beside its logits.
            in_float32: Keep sums in float32 though `exact` is not set.

        Raises:
            InputError: None fits.
        """
        return fitting_plan(
            replace(self._work, network_bytes=network_bytes),
            self._budget,
            chunk=self._chunk,
            reserved=self._reserved,
            gpu_budget=self._gpu_budget,
            exact=self._exact or in_float32,
            where=self._where,
        )
