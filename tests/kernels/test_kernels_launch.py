"""Kernels that are launched again without Triton's lookup: the key tells apart what Triton compiles apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
import triton
from mome_kernels.gpu import launch, routing
from mome_kernels.gpu.launch import Launch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature


@triton.jit(do_not_specialize=["m"])
def _kernel(x, n, m, scale, bias, WIDTH: triton.language.constexpr):
    pass


BASE = torch.zeros(64)
ARGUMENTS = {"x": BASE, "n": 32, "m": 32, "scale": 0.5, "bias": None, "WIDTH": 4}
CHANGES: list[dict[str, Any]] = [
    {}, {"x": BASE[1:]}, {"x": BASE.half()}, {"x": BASE[16:]}, {"n": 1}, {"n": 2}, {"n": 48}, {"n": 2**31},
    {"n": 2**31 + 16}, {"n": 2**31 + 1}, {"m": 1}, {"m": 7}, {"m": 2**31}, {"scale": 2.0}, {"bias": BASE},
    {"WIDTH": 8}, {"n": 33}, {"n": -32}, {"n": -(2**31) - 16},
]  # fmt: skip


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The device that is current for the launches."""
    current = [0]
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(launch, "interpreting", lambda: False)
    monkeypatch.setattr(launch, "_COMPILED", {})
    return current


def test_keys_differ_where_triton_compiles_again(device: list[int]) -> None:
    bind = create_function_from_signature(_kernel.signature, _kernel.params, make_backend(GPUTarget("cuda", 90, 32)))
    found = []
    for change in CHANGES:
        arguments = {**ARGUMENTS, **change}
        found.append((Launch(_kernel, (1,), arguments)._key(), str(bind(**arguments)[1])))
    for ours, theirs in found:
        for other, other_theirs in found:
            assert theirs == other_theirs or ours != other
    assert found[0][0] == found[3][0] == found[6][0] == found[11][0] == found[13][0], "no more keys than needed"


def test_a_second_launch_takes_the_compiled_kernel(device: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[Any, ...]] = []
    ran: list[tuple[Any, ...]] = []

    class Compiled:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *arguments: ran.append((grid, *arguments))

    class Kernel:
        params = _kernel.params

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda **arguments: made.append((grid, arguments)) or Compiled()

    kernel = Kernel()
    Launch(kernel, (3, 2), ARGUMENTS).run()
    Launch(kernel, (5,), {**ARGUMENTS, "n": 64, "scale": 1.0}).run()
    assert len(made) == 1 and ran == [((5, 1, 1), BASE, 64, 32, 1.0, None, 4)]
    Launch(kernel, (5,), ARGUMENTS, num_warps=8).run()
    device[0] = 1
    Launch(kernel, (5,), ARGUMENTS).run()
    assert len(made) == 3 and len(ran) == 1
    Launch(kernel, (0,), ARGUMENTS).run()
    assert len(made) == 3 and len(ran) == 1


def test_descriptors_and_rocm_keep_the_lookup_of_triton(device: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    assert Launch(_kernel, (1,), {**ARGUMENTS, "x": object()})._key() is None
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert Launch(_kernel, (1,), ARGUMENTS)._key() is None


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 7, 9])
def test_keys_of_routing_do_not_depend_on_the_number_of_tokens(tokens: int) -> None:
    ids = torch.zeros(tokens, 1, dtype=torch.int64)
    _, order, _ = routing.plan_route(ids, 3, torch.int32)
    parts = (order.permutation, order.inverse, order.offsets)
    assert [part.shape[0] for part in parts] == [tokens, tokens, 4]
    assert all(part.data_ptr() % 16 == 0 for part in parts)
