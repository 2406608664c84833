"""The fusion head as one compiled loop: the values of the reference, and which heads it takes."""

from __future__ import annotations

import mome_kernels as kernels
import pytest
import torch
from mome_kernels import dispatch, reference, torch_impl
from mome_kernels.torch_impl import head_compiled
from mome_kernels.weights import HeadWeights
from op_inputs import head_inputs


def values(inputs: list[torch.Tensor], **options: float) -> torch.Tensor:
    with torch.inference_mode(), dispatch.compiled_head():
        return kernels.fusion_head(*inputs, **options)


def inputs_of(*args: int) -> list[torch.Tensor]:
    return [tensor.detach().float() for tensor in head_inputs(*args)]


@pytest.mark.parametrize("scales", [1, 4])
@pytest.mark.parametrize("prompts", [1, 3])
@pytest.mark.parametrize("voxels", [1, 700, 4096, 9000])
@pytest.mark.parametrize("slope", [0.0, 0.1])
def test_values_are_those_of_the_reference(scales, prompts, voxels, slope, monkeypatch) -> None:
    monkeypatch.setattr(head_compiled, "BACKEND", "eager")
    inputs = inputs_of(scales, 2, prompts, 4, voxels)
    found = values(inputs, negative_slope=slope)
    torch.testing.assert_close(found, reference.fusion_head(*inputs, negative_slope=slope), atol=1e-5, rtol=1e-5)


@pytest.mark.wide
def test_values_of_the_compiler(monkeypatch) -> None:
    calls = []
    monkeypatch.setattr(torch_impl.head, "forward", lambda *_: calls.append("not compiled"))
    for prompts in (1, 2, 5):
        inputs = inputs_of(2, 1, prompts, 3, 5000)
        expected = reference.fusion_head(*inputs, negative_slope=0.1)
        torch.testing.assert_close(values(inputs, negative_slope=0.1), expected, atol=1e-5, rtol=1e-5)
    assert not calls


def test_one_compilation_serves_all_numbers_of_prompts(monkeypatch) -> None:
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    torch.compiler.reset()
    monkeypatch.setattr(head_compiled, "BACKEND", backend)
    for prompts in (5, 2, 1, 7):
        values(inputs_of(2, 1, prompts, 4, 300 * prompts))
    assert len(graphs) == 1


@pytest.mark.parametrize(
    ("channels", "top_k", "dtype", "taken"),
    [
        (8, 0, torch.float32, True),
        (8, 3, torch.float32, True),
        (8, 2, torch.float32, False),
        (16, 0, torch.float32, False),
        (8, 0, torch.float64, False),
    ],
)
def test_heads_that_are_taken(channels, top_k, dtype, taken) -> None:
    inputs = [tensor.detach().to(dtype) for tensor in head_inputs(3, 1, 2, channels, 10)]
    weights = HeadWeights(*inputs[1:], top_k, 0.1)
    assert dispatch.head(inputs[0], weights) is torch_impl.head
    with dispatch.compiled_head():
        assert (dispatch.head(inputs[0], weights) is head_compiled) == taken
    assert dispatch.head(inputs[0], weights) is torch_impl.head
