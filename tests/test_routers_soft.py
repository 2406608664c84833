"""Soft MoE: slots and results against loops over tokens and slots, and the memory that 64³ voxels take."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import torch
from test_routers_groups import build, group_lists, layer
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mome.map_context import DEFAULT_CONTEXT
from mome.routers import slot_attention


@pytest.mark.parametrize("window", [0, 2])
def test_soft_is_what_the_paper_says(window: int) -> None:
    """Three experts with two slots each; logits of normalised tokens, slots of the tokens as they are."""
    mixture = layer("linear(n=3)", f"soft(slots=2, window={window})")
    router, x = mixture.router, torch.randn(2, 4, 2, 4, 4) * 3
    y, routing = mixture(x, DEFAULT_CONTEXT)
    rows, want = x.reshape(64, 4), torch.zeros(64, 4)
    weight, bias = mixture.experts.weight_EDD, mixture.experts.bias_ED
    groups = group_lists(2, (4, 2, 4), window)
    for members in groups:
        tokens = rows[members]
        logits = torch.zeros(len(members), 6)
        for m, token in enumerate(tokens):
            for s, slot in enumerate(router.slots_SC):
                logits[m, s] = router.scale * (token / token.norm()) @ (slot / slot.norm())
        dispatch, combine = logits.softmax(dim=0), logits.softmax(dim=1)
        results = []
        for s in range(6):
            slot = sum(dispatch[m, s] * tokens[m] for m in range(len(members)))
            results.append(weight[s // 2] @ slot + bias[s // 2])
        for m, member in enumerate(members):
            want[member] = sum(combine[m, s] * results[s] for s in range(6))
    torch.testing.assert_close(y.reshape(64, 4), want, rtol=1e-4, atol=1e-4)
    assert routing.counts_E.tolist() == [2 * len(groups)] * 3


def test_slots_are_made_of_raw_tokens() -> None:
    """Longer tokens change the slots in proportion, and no logit."""
    router, x = build("soft(slots=2)"), torch.randn(1, 2, 2, 2, 4)
    near, far = router(x, DEFAULT_CONTEXT), router(5 * x, DEFAULT_CONTEXT)
    for a, b in zip(near.matrices(), far.matrices(), strict=True):
        torch.testing.assert_close(a, b)
    slots = near.dispatch(x.view(8, 4))
    torch.testing.assert_close(far.dispatch(5 * x.view(8, 4)), 5 * slots)
    torch.testing.assert_close(slots, near.matrices()[0].transpose(1, 2) @ x.view(1, 8, 4))


@pytest.mark.parametrize("piece", [2**21, 100])
def test_gradients_are_those_of_the_matrices(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in several pieces, of which the last one is shorter."""
    monkeypatch.setattr(slot_attention, "_PIECE_ELEMENTS", piece)
    mixture, x = layer("mlp(n=2, hidden=5)", "soft(slots=3)"), torch.randn(2, 4, 4, 4, 4, requires_grad=True)
    wanted = [x, *mixture.parameters()]
    got = torch.autograd.grad(mixture(x, DEFAULT_CONTEXT)[0].square().sum(), wanted)
    dispatch, combine = mixture.router(x, DEFAULT_CONTEXT).matrices()
    slots = (dispatch.transpose(1, 2) @ x.reshape(2, 64, 4)).flatten(0, 1)
    ids = torch.tensor([0, 0, 0, 1, 1, 1] * 2)[:, None]
    results = mixture.experts(slots, ids, torch.ones(12, 1)).view(2, 6, 4)
    literal = torch.autograd.grad((combine @ results).square().sum(), wanted)
    for a, b in zip(got, literal, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_a_token_of_zeros_has_a_bounded_gradient() -> None:
    """Background voxels of a new model are exactly zero."""
    mixture, x = layer("mlp(n=2, hidden=5)", "soft(slots=3)"), torch.randn(1, 4, 4, 4, 4)
    x[0, 0] = 0
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(mixture(x, DEFAULT_CONTEXT)[0].square().sum(), x)
    assert 0 < gradient[0, 0].abs().max() < 1e5


def test_backward_inside_autocast_is_float32() -> None:
    keys, x, queries = torch.randn(1, 64, 4), torch.randn(1, 64, 4), torch.randn(6, 4)
    grads = []
    for enabled in (False, True):
        given = [value.clone().requires_grad_() for value in (queries, keys, x)]
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            slot_attention.slots_of_tokens(*given).square().sum().backward()
        grads.append([value.grad for value in given])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


class _Largest(TorchDispatchMode):
    """Notes the elements of the largest tensor that an operation returns."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.largest = max([self.largest, *sizes])
        return result


def test_no_operation_makes_the_matrix_of_tokens_and_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slot_attention, "_PIECE_ELEMENTS", 2**15)  # 16 pieces
    mixture = layer("mlp(n=8, hidden=16)", "soft(slots=16)", dim=16)
    x = torch.randn(1, 16, 16, 16, 16, requires_grad=True)
    with _Largest() as seen:
        mixture(x, DEFAULT_CONTEXT)[0].square().sum().backward()
    assert x.numel() <= seen.largest <= 2 * x.numel() < 16**3 * 128


@pytest.mark.wide
def test_a_patch_of_64_voxels_fits_into_the_stated_memory() -> None:
    """The increase of this process's resident memory, sampled: forward and backward, 8 experts with 16 slots each."""
    mixture = layer("mlp(n=8, hidden=64)", "soft(slots=16)", dim=16)
    x = torch.randn(1, 64, 64, 64, 16, requires_grad=True)
    statm, peak, stop = Path("/proc/self/statm"), 0, threading.Event()
    if not statm.exists():
        pytest.skip("resident memory is read from /proc")

    def resident() -> int:
        return int(statm.read_text().split()[1]) * 4096

    def watch() -> None:
        nonlocal peak
        while not stop.is_set():
            peak = max(peak, resident())
            time.sleep(0.002)

    before = resident()
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        mixture(x, DEFAULT_CONTEXT)[0].square().sum().backward()
    finally:
        stop.set()
        watcher.join()
    assert peak - before < 300e6
