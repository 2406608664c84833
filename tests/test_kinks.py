"""Noise as small as rounding errors changes gradients by percents where a hidden value is at a kink.

A kink is that of an activation. `test_gpu_zoo.py` compares gradients within one percent, so the volumes of
`SMOOTH_SEEDS` must be away from kinks, and the usual ones are not. Float64 on the CPU: the changes are the noise's, not
rounding errors of their own.
"""

from __future__ import annotations

import copy

import pytest
import torch
from test_gpu_zoo import MODELS, SMOOTH_SEEDS, difference, given_to, run
from tiny_parts import inputs, make_model
from torch import Tensor

from mome.modeling import MoME


def largest_change(model: MoME, given: dict[str, Tensor], size: float) -> float:
    """The largest change of the gradients by six draws of noise on the volume."""
    _, wanted = run(copy.deepcopy(model), given)
    changes = []
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(given["volume"].shape, generator=generator, dtype=torch.float64)
        _, gradients = run(copy.deepcopy(model), {**given, "volume": given["volume"].double() + size * noise})
        changes.append(difference(gradients, wanted))
    return max(changes)


@pytest.mark.parametrize("name", SMOOTH_SEEDS)
def test_volumes_of_chosen_seeds_are_away_from_kinks_and_usual_ones_are_not(name: str, one_thread: None) -> None:
    single = make_model(**MODELS[name])
    usual, smooth = inputs(single, batch=2), given_to(name, single)
    model = single.double()
    assert largest_change(model, usual, 3e-6) > 0.01
    assert largest_change(model, smooth, 1e-5) < 0.001
