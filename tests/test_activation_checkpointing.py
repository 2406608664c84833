"""Activation checkpointing runs forward passes twice; running statistics move once."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import pytest
import torch
from small_models import small
from torch import nn

from mome.errors import InputError

SEGRESNET = "segresnet(filters=4, blocks_down=[1, 1], norm='batch')"
MONAI = "monai(network='UNet', arguments={'channels': [4, 8], 'strides': [2], 'norm': 'batch'})"


def trained(spec: str, options: dict[str, Any] | None) -> nn.Module:
    """A model after one forward and one backward pass."""
    model = small(encoder=spec, patch_size=[8, 8, 8]).train()
    if options is not None:
        model.gradient_checkpointing_enable(options)
    given = torch.rand(2, 1, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    model(given, torch.ones(2, 12)).logits.square().mean().backward()
    return model


@pytest.mark.parametrize("spec", [SEGRESNET, MONAI], ids=["segresnet", "monai"])
def test_running_statistics_move_once(spec: str) -> None:
    plain, repeated = trained(spec, None), trained(spec, {})
    counts = [buffer for name, buffer in plain.named_buffers() if name.endswith("num_batches_tracked")]
    assert counts and all(int(count) == 1 for count in counts)
    for (name, want), got in zip(plain.named_buffers(), repeated.buffers(), strict=True):
        assert torch.equal(got, want), name
    for (name, parameter), other in zip(plain.named_parameters(), repeated.parameters(), strict=True):
        assert (parameter.grad is None) == (other.grad is None), name
        if parameter.grad is not None:
            torch.testing.assert_close(other.grad, parameter.grad, msg=name)
    assert all(norm.momentum == 0.1 for norm in repeated.modules() if isinstance(norm, nn.BatchNorm3d))


def test_the_contexts_of_the_user_are_entered_too() -> None:
    entered = []

    @contextmanager
    def noting(name: str):
        entered.append(name)
        yield

    model = trained(SEGRESNET, {"context_fn": lambda: (noting("first"), noting("again"))})
    assert set(entered) == {"first", "again"}
    counts = [buffer for name, buffer in model.named_buffers() if name.endswith("num_batches_tracked")]
    assert all(int(count) == 1 for count in counts)


def test_two_backward_passes_go_through_one_graph() -> None:
    model = small(encoder=SEGRESNET, patch_size=[8, 8, 8], experts="swiglu(n=2)", router="topk(k=1)").train()
    model.gradient_checkpointing_enable()
    given = torch.rand(2, 1, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    output = model(given, torch.ones(2, 12), targets=torch.ones(2, 2, 8, 8, 8))
    output.segmentation_loss.backward(retain_graph=True)
    output.aux_loss.backward()
    got = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    counts = [buffer for name, buffer in model.named_buffers() if name.endswith("num_batches_tracked")]
    assert counts and all(int(count) == 1 for count in counts)
    model.zero_grad()
    model(given, torch.ones(2, 12), targets=torch.ones(2, 2, 8, 8, 8)).loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(got[name], parameter.grad, msg=name)


def test_a_number_of_layers_that_would_be_ignored_is_refused() -> None:
    model = small(patch_size=[8, 8, 8])
    # `activation_checkpointing_enable` of transformers 5.24 gives the argument to this method
    with pytest.raises(InputError, match="each scale, so every_n_layers=2 has no meaning"):
        model._set_gradient_checkpointing(every_n_layers=2)
    assert not model.gradient_checkpointing
    model._set_gradient_checkpointing(every_n_layers=1)
    assert model.gradient_checkpointing
