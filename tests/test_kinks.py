"""Noise as small as rounding errors changes gradients by percents where a hidden value is at a kink.

The kink is that of an activation. So `test_gpu_zoo.py` allows more there. Float64 on the CPU: the changes are the
noise's, not rounding errors of their own.
"""

from __future__ import annotations

import copy

import pytest
import torch
from test_gpu_zoo import AT_A_KINK, MODELS, difference, run
from tiny_parts import inputs, make_model


@pytest.mark.parametrize("name", AT_A_KINK)
def test_noise_as_small_as_rounding_changes_gradients_by_percents(name: str, one_thread: None) -> None:
    exact = make_model(**MODELS[name])
    given = inputs(exact, batch=2)
    exact = exact.double()
    expected, wanted = run(copy.deepcopy(exact), given)
    changes = []
    for seed in range(6):
        noise = torch.randn(given["volume"].shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        logits, gradients = run(copy.deepcopy(exact), {**given, "volume": given["volume"].double() + 3e-6 * noise})
        assert (logits - expected).abs().max() <= 2e-5 * expected.abs().max()
        changes.append(difference(gradients, wanted))
    assert 0.01 < max(changes) < 0.1  # more than the bound of other models, less than the one of these
