"""The segmentation loss and the learning rate."""

from __future__ import annotations

import torch

from mome.losses.bce_dice import masked_bce_dice
from mome.training.optimizer import learning_rate


def test_unsupervised_structures_contribute_nothing() -> None:
    logits = torch.randn(2, 3, 4, 4, 4, requires_grad=True)
    targets = (torch.rand(2, 3, 4, 4, 4) > 0.5).float()
    supervised = torch.tensor([[True, False, True], [True, False, False]])
    loss = masked_bce_dice(logits, targets, supervised)
    loss.backward()
    assert not logits.grad[:, 1].any() and not logits.grad[1, 2].any() and logits.grad[0, 2].any()
    changed = targets.clone()
    changed[:, 1] = 1 - changed[:, 1]
    assert torch.equal(masked_bce_dice(logits, changed, supervised), loss)
    nothing = masked_bce_dice(logits, targets, torch.zeros(2, 3, dtype=torch.bool))
    assert nothing == 0


def test_loss_against_the_formula() -> None:
    logits, targets = torch.randn(1, 1, 3, 3, 3), (torch.rand(1, 1, 3, 3, 3) > 0.5).float()
    p = logits.sigmoid()
    bce = -(targets * p.log() + (1 - targets) * (1 - p).log()).mean()
    dice = 1 - (2 * (p * targets).sum() + 1) / (p.sum() + targets.sum() + 1)
    torch.testing.assert_close(masked_bce_dice(logits, targets), bce + dice)


def test_learning_rate_is_warm_up_then_cosine() -> None:
    rates = [learning_rate(step, 100, 1.0, 0.1) for step in range(100)]
    assert rates[0] == 0.1 and max(rates) == rates[9] == rates[10] == 1.0 and rates[-1] < 0.001
    assert all(a >= b for a, b in zip(rates[10:], rates[11:], strict=False))
