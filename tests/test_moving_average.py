"""The moving average of the weights of a short run, and of a long one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mome.training.moving_average import growing_average
from mome.training.weight_average import start_average


@pytest.mark.parametrize(("steps", "first"), [(20, 1e-3), (3_000, 1e-6)])
def test_a_short_run_forgets_its_first_weights(steps: int, first: float) -> None:
    model = nn.Linear(1, 1, bias=False)
    average = start_average(model, 0.995, torch.device("cpu"))
    with torch.no_grad():
        model.weight.fill_(1.0)
        average.update_parameters(model)
        model.weight.zero_()
        for _ in range(steps):
            average.update_parameters(model)
    assert average.module.weight.item() < first  # of a constant decay, 0.9 after 20 steps


def test_the_decay_grows_to_the_one_that_was_asked() -> None:
    update = growing_average(0.9)
    for number, decay in ((1, 2 / 11), (5, 0.4), (1_000, 0.9)):
        average = [torch.ones(2)]
        update(average, [torch.zeros(2)], torch.tensor(number))
        torch.testing.assert_close(average[0], torch.full((2,), decay))
