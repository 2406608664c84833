"""Predicts masks within a memory plan, and with a smaller plan where memory was not enough after all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mome.errors import InputError, lacks_memory
from mome.inference.first_tile import AnotherPlan, FirstTile
from mome.inference.masks import NotFinite, predict_masks
from mome.inference.memory_plan import MemoryPlan
from mome.inference.packed import PackedMasks
from mome.inference.phases import Phases
from mome.inference.predictor import Predictor
from mome.inference.prepared import PreparedPrompts
from mome.inference.probabilities import ProbabilityMaps
from mome.volumes import Grid

_FEWER_PROMPTS = "memory was not enough at first: the scan was segmented again with fewer prompts at once"
_LARGE_LOGITS = (
    "logits are too large for sums in float16: the scan was segmented again with sums in float32, as exact=True "
    "(--exact) does at once"
)


def predict_within_memory(
    predictor: Predictor,
    volume: Tensor,
    network: Grid,
    output: Grid,
    prompts: PreparedPrompts,
    plan: MemoryPlan,
    *,
    asked: Sequence[str] = (),
    progress: Callable[[int, int], None] | None = None,
    phases: Phases | None = None,
    first_tile: FirstTile | None = None,
    in_float32: Callable[[], MemoryPlan] | None = None,
    **options: Any,
) -> tuple[PackedMasks, ProbabilityMaps | None, list[str]]:
    """Returns the masks of all prompts, the probabilities that are asked, and notes on why the scan was begun again.

    Where memory is not enough, the scan is begun again with a smaller plan. Where float16 does not hold the sums of
    logits, it is begun again with float32.

    Args:
        predictor, volume, network, output, prompts, progress, phases, options: See `predict_masks`.
        plan: The plan that is tried first.
        asked: Names of the prompts whose probabilities are returned.
        first_tile: Measures the network with the first tile; it may choose another plan, once.
        in_float32: Returns the plan with sums in float32 that fits into memory; where None, that of as many prompts.

    Raises:
        NotFinite: The logits are not finite.
        InputError: Memory is not enough for one prompt at a time.
    """
    notes: dict[str, None] = {}  # each once, in order
    while True:
        try:
            masks, maps = _predict(
                predictor, volume, network, output, prompts, plan, asked, progress, phases, first_tile, options
            )
        except AnotherPlan as other:
            plan = other.plan
        except NotFinite:
            if not plan.half_sums:
                raise
            larger = plan if in_float32 is None else in_float32()
            # Not more prompts than before, because memory may have been short meanwhile.
            plan = MemoryPlan(min(plan.group, larger.group), min(plan.chunk, larger.chunk))
            notes[_LARGE_LOGITS] = None
        except (MemoryError, RuntimeError) as error:
            smaller = plan.smaller()
            if not lacks_memory(error):
                raise
            if smaller is None:
                raise InputError(
                    f"the memory of {predictor.device.type} is not enough for this scan, one prompt at a time",
                    hint="a machine with more memory, or a part of the scan",
                ) from error
            plan = smaller
            notes[_FEWER_PROMPTS] = None
        else:
            return masks, maps, list(notes)
        first_tile = None
        # Outside of the handler, so that its traceback does not hold the tensors of the failed attempt.
        if predictor.device.type == "cuda":
            torch.cuda.empty_cache()


def _predict(
    predictor: Predictor,
    volume: Tensor,
    network: Grid,
    output: Grid,
    prompts: PreparedPrompts,
    plan: MemoryPlan,
    asked: Sequence[str],
    progress: Callable[[int, int], None] | None,
    phases: Phases | None,
    first_tile: FirstTile | None,
    options: dict[str, Any],
) -> tuple[PackedMasks, ProbabilityMaps | None]:
    """Runs one pass over the tiles for every group of prompts."""
    maps = ProbabilityMaps(list(asked), output.shape) if asked else None
    masks: PackedMasks | None = None
    firsts = range(0, len(prompts.names), plan.group)
    for number, first in enumerate(firsts):
        group = slice(first, first + plan.group)
        part = predict_masks(
            predictor,
            volume,
            network,
            output,
            PreparedPrompts(prompts.prompts[group], prompts.text_PT[group]),
            prompt_chunk=plan.chunk,
            dtype=torch.float16 if plan.half_sums else torch.float32,
            probabilities=maps,
            progress=None if progress is None else _of_all_passes(progress, number, len(firsts)),
            phases=phases,
            first_tile=first_tile if number == 0 else None,
            **options,
        )
        if masks is None:
            masks = part if len(firsts) == 1 else PackedMasks(prompts.names, output.shape, part.axis)
        if masks is not part:
            masks.take(part)
    assert masks is not None
    return masks, maps


def _of_all_passes(progress: Callable[[int, int], None], number: int, passes: int) -> Callable[[int, int], None]:
    """Returns a progress function of one pass that reports the tiles of all passes."""
    return lambda done, total: progress(number * total + done, passes * total)
