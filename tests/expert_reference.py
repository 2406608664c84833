"""Builders and loops that the tests of the experts share. Everything is in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from mome.experts.base import Experts
from mome.map_context import MapContext
from mome.registry import EXPERTS

slowly_too = pytest.mark.parametrize("fast", [True, pytest.param(False, marks=pytest.mark.wide)])
DIM, TEXT_DIM = 4, 3
SHAPE = (2, 2, 3, 2, DIM)  # two maps of twelve voxels
TOKENS = 24


def build(spec: str, **runtime: int) -> Experts:
    """Experts of width 4 whose parameters are all random."""
    torch.manual_seed(0)
    body: Experts = EXPERTS.build(spec, dim=DIM, **runtime).double()
    for parameter in body.parameters():
        nn.init.normal_(parameter, std=0.5)
    return body


def tokens() -> Tensor:
    return torch.randn(TOKENS, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def assignments(num_experts: int, k: int = 3) -> tuple[Tensor, Tensor]:
    """Random ids and weights (T, K). Ids repeat within a token, and the last expert has no token at all."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(max(1, num_experts - 1), (TOKENS, k), generator=generator)
    return ids, torch.rand(TOKENS, k, dtype=torch.float64, generator=generator)


def one_expert(body: nn.Module, e: int, x_D: Tensor) -> Tensor:
    """The result of one token expert for one token."""
    return body(x_D[None], torch.tensor([[e]]), torch.ones(1, 1, dtype=torch.float64))[0]


def loop(x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, expert: Callable[[int, Tensor], Tensor]) -> Tensor:
    """Σ_k weight · expert(x), token by token."""
    rows = []
    for x_D, ids_K, weights_K in zip(x_TD, ids_TK.tolist(), weights_TK, strict=True):
        rows.append(sum((w * expert(e, x_D) for e, w in zip(ids_K, weights_K, strict=True)), torch.zeros_like(x_D)))
    return torch.stack(rows)


def map_inputs(num_experts: int) -> tuple[Tensor, Tensor, MapContext]:
    """Two maps, each with a prompt of its own, and gates of which about a third are zero."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(SHAPE, dtype=torch.float64, generator=generator)
    gates = torch.rand(*SHAPE[:4], num_experts, dtype=torch.float64, generator=generator)
    text = torch.randn(2, TEXT_DIM, dtype=torch.float64, generator=generator)
    return x, gates * (gates > 0.3), MapContext(text_BT=text)


def assert_gradients(body: Experts, call: Callable[..., Tensor], *inputs: Tensor, fast: bool) -> None:
    """Compares the gradients of the inputs and of all parameters with finite differences.

    Args:
        body: The experts.
        call: Calls them with the inputs.
        inputs: Tensors that have gradients.
        fast: Compare one random projection of the Jacobian instead of every element.
    """
    names = [name for name, _ in body.named_parameters()]

    def run(*values: Tensor) -> Tensor:
        given, parameters = values[: len(inputs)], dict(zip(names, values[len(inputs) :], strict=True))
        return torch.func.functional_call(_Called(body, call), {f"body.{n}": p for n, p in parameters.items()}, given)

    values = [value.detach().clone().requires_grad_() for value in (*inputs, *body.parameters())]
    assert torch.autograd.gradcheck(run, values, fast_mode=fast)


class _Called(nn.Module):
    def __init__(self, body: Experts, call: Callable[..., Tensor]) -> None:
        super().__init__()
        self.body, self.call = body, call

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.call(self.body, *inputs)
