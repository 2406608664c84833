"""Measures what the network takes for the first tile of a scan, before anything large is allocated."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mome.inference.memory_plan import MemoryPlan
from mome.inference.predictor import Predictor
from mome.memory import give_back_freed, process_bytes

_SAMPLE_EVERY_S = 0.005


class AnotherPlan(Exception):
    """The network takes more than the plan has counted, and another plan fits.

    Attributes:
        plan: The other plan.
    """

    def __init__(self, plan: MemoryPlan) -> None:
        super().__init__(plan)
        self.plan = plan


class FirstTile:
    """Computes the first tile, measures its memory, and asks for another plan where the first one does not fit.

    The tile is computed anyway, so that this costs no time where the plan stays.

    Args:
        plan: The plan of the run, which counts nothing for the network.
        plan_for: Gets the bytes that the network takes beside its logits, and returns the plan that fits.
        of_others: Bytes that other threads may take meanwhile, as for a scan that is read ahead; they are not counted.
    """

    def __init__(self, plan: MemoryPlan, plan_for: Callable[[int], MemoryPlan], of_others: int = 0) -> None:
        self._plan, self._plan_for, self._of_others = plan, plan_for, of_others

    def compute(
        self, predictor: Predictor, tile_B1DHW: Tensor, origin: tuple[int, int, int], text_PT: Tensor
    ) -> tuple[Any, Tensor]:
        """Returns the features of the tile, and the logits (1, P, D, H, W) of some prompts.

        Args:
            predictor, tile_B1DHW, origin: See `Predictor.encode`.
            text_PT: One row for each of these prompts.

        Raises:
            AnotherPlan: Another plan fits, and this one does not.
            InputError: No plan fits.
        """
        if not self._of_others:
            give_back_freed()  # else the network would take what was freed before, and seem to take less
        before = device_bytes(predictor.device)
        with HighestMemory(predictor.device) as encoding:
            features = predictor.encode(tile_B1DHW, origin)
        with HighestMemory(predictor.device) as decoding:
            logits = predictor.decode(features, text_PT)
        highest = max(encoding.bytes, decoding.bytes - logits.nbytes)
        plan = self._plan_for(max(0, highest - before - self._of_others))
        if plan != self._plan:
            raise AnotherPlan(plan)
        return features, logits


class HighestMemory:
    """Looks at the memory of a device every few milliseconds while a block runs.

    The system's own count of the highest memory would have to be reset, and others read it.

    Args:
        device: A GPU, whose allocated memory is read; for other devices, the resident memory of the process.

    Attributes:
        bytes: The highest memory that was seen; 0 where the system does not say.
    """

    def __init__(self, device: torch.device) -> None:
        self.bytes = 0
        self._device, self._ended = device, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> HighestMemory:
        self._look()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()
        self._look()

    def _watch(self) -> None:
        while not self._ended.wait(_SAMPLE_EVERY_S):
            self._look()

    def _look(self) -> None:
        self.bytes = max(self.bytes, device_bytes(self._device))


def device_bytes(device: torch.device) -> int:
    """Returns the memory that is taken now: allocated on a GPU, else resident in the process; 0 where unknown."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else process_bytes()
