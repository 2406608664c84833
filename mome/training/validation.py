"""Dice of whole validation volumes on the network grid, during training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor

from mome.data.cache import CaseCache
from mome.data.label_codes import mask_of
from mome.inference.predictor import ModelPredictor
from mome.inference.stream import stream_logits
from mome.metrics import dice
from mome.training.config import RunConfig
from mome.training.spread import free_whole_parameters, is_spread

if TYPE_CHECKING:
    from mome.modeling import MoME


def validate(
    model: MoME, run: RunConfig, caches: Sequence[CaseCache], accelerator: Accelerator | None = None
) -> dict[str, float]:
    """Returns every trained structure's mean Dice over the validation cases that annotate it, and the mean of these.

    Volumes are segmented on the network grid by a sliding window without overlap, which is fast but coarse. Scores to
    report come from `mome evaluate`, on the scans' own grids.

    Args:
        model: The model; its training mode is restored at the end.
        run: Its labels and `train.validate_cases` are used.
        caches: The cases of every validation source, on the network grid.
        accelerator: Its processes share the cases; every process returns the scores of all. Of a model that is spread
            over them, every process has all cases, and returns the scores of the first one.

    Returns:
        `dice/<structure>` for every structure that a case annotates, and `dice/mean`. A structure that no case has and
        that is not found in any, whose Dice is undefined, is left out; empty without a structure that has a Dice.
    """
    was_training = model.training
    model.eval()
    names = list(run.labels)
    text_PT = model.prompt_rows(model.text_bank.rows(names), names)
    predictor = SpreadModelPredictor(model) if is_spread(model) else ModelPredictor(model)
    found: list[tuple[int, int, str, float]] = []  # source, case, structure, Dice
    # All processes of a spread model must make the same forward passes, so that each of them has all cases.
    shares = accelerator is not None and not is_spread(model)
    rank, processes = (accelerator.process_index, accelerator.num_processes) if accelerator and shares else (0, 1)
    for source_number, cache in enumerate(caches):
        count = min(len(cache), run.train.validate_cases or len(cache))
        for i in range(rank, count, processes):
            case = cache[i]
            asked = [number for number, name in enumerate(names) if name in case.annotated]
            if not asked:
                continue
            volume = torch.from_numpy(np.asarray(case.volume, dtype=np.float32) / 255)[None, None]
            # Time and memory grow with the prompts, so only those are asked whose masks can be scored.
            stream = stream_logits(predictor, volume, text_PT[asked], overlap=0.0)
            masks = torch.cat([(logits > 0).cpu() for _, logits in stream], dim=1).numpy()
            labels = np.asarray(case.labels)
            for mask, number in zip(masks, asked, strict=True):
                score = dice(mask, mask_of(labels, case.codes, names[number]))
                found.append((source_number, i, names[number], score))
    free_whole_parameters(model)
    model.train(was_training)
    if processes > 1:
        # Sorted as one process has them, so that sums are rounded alike.
        found = sorted(gather_object(found), key=lambda entry: entry[:2])
    elif accelerator is not None and accelerator.num_processes > 1:
        # GPUs round unalike, and a batch norm has running statistics of its own in every process. All processes must
        # find the same best model, because they save it together.
        (found,) = broadcast_object_list([found])
    scores = {
        name: [score for _, _, scored, score in found if scored == name and math.isfinite(score)] for name in names
    }
    means = {f"dice/{name}": float(np.mean(values)) for name, values in scores.items() if values}
    return {**means, "dice/mean": float(np.mean(list(means.values())))} if means else {}


class SpreadModelPredictor(ModelPredictor):
    """A spread model as a `Predictor`. FSDP2 cannot gather parameters in the inference mode that tiles are run in."""

    def encode(self, tile_B1DHW: Tensor, origin: tuple[int, int, int]) -> Any:
        """Returns the model's features of a tile; see `Predictor.encode`."""
        with torch.inference_mode(False), torch.no_grad():
            return super().encode(tile_B1DHW, origin)

    def decode(self, features: Any, text_PT: Tensor) -> Tensor:
        """Returns the model's logits of a tile in float32; see `Predictor.decode`."""
        with torch.inference_mode(False), torch.no_grad():
            return super().decode(features, text_PT)
