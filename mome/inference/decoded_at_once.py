"""How many prompts are decoded at once where memory does not decide it."""

from __future__ import annotations

from typing import Any

import torch

from mome.inference.memory_plan import USUAL_CHUNK
from mome.routers.fusion.base import Fusion


def decoded_at_once(asked: int, model: Any, device: torch.device) -> int:
    """Returns how many prompts are decoded at once: on a CPU, fewer than asked where that takes no longer.

    The logits of 32 prompts in a tile of 64³ voxels are 34 MB. Decoding 8, 16 or 32 of them at once takes the same time
    on a CPU (our measurement), unless prompts share a part of the work.

    Args:
        asked: The largest number.
        model: The model.
        device: Where it computes.
    """
    return asked if device.type != "cpu" or _share_work(model) else min(asked, USUAL_CHUNK)


def _share_work(model: Any) -> bool:
    """Says whether prompts that are decoded together may share passes of the experts or a summary of the map.

    Of a model with parts of another kind nothing is known, so it is taken for one.
    """
    experts, fusion = getattr(model, "scale_experts", None), getattr(model, "fusion", None)
    if experts is None or not isinstance(fusion, Fusion):
        return True
    reads_map = type(fusion).summarise is not Fusion.summarise
    return reads_map or any(getattr(expert, "reads_prompts", True) for expert in experts)
