"""A run counts what the network takes: it is measured with the first tile, before anything large is allocated."""

from __future__ import annotations

import mmap
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from stand_in_models import Contrast

from mome import create_model
from mome.errors import InputError
from mome.inference import Segmenter, scan_memory
from mome.inference import within_memory as within
from mome.inference.decoded_at_once import decoded_at_once
from mome.inference.first_tile import AnotherPlan, FirstTile, HighestMemory
from mome.inference.memory_plan import MemoryPlan, Work
from mome.memory import process_bytes
from mome.processing import MoMEProcessor
from mome.volumes import Volume

NAMES = ["liver", "spleen", "pancreas", "stomach", "aorta"]
CPU = torch.device("cpu")
TAKEN = 80_000_000


class Heavy(Contrast):
    """A network that takes 80 MB while it encodes."""

    def encode(self, volume_B1DHW: torch.Tensor, origin_B3: torch.Tensor | None = None) -> torch.Tensor:
        _take(TAKEN)
        return super().encode(volume_B1DHW, origin_B3)


def segmenter() -> Segmenter:
    model = Heavy(NAMES, [0.3, 0.4, 0.5, 0.6, 0.7], patch=16)
    return Segmenter(model, MoMEProcessor(spacing=[2, 2, 2], hu_window=[-100, 100]), exact=True)


SCAN = Volume(np.random.default_rng(0).normal(0, 60, (24, 20, 16)).astype(np.float32), np.diag([2.0, 2.0, 2.0, 1]))
needs_memory_of_process = pytest.mark.skipif(
    not process_bytes(), reason="this system does not say how much memory a process takes"
)


@needs_memory_of_process
def test_a_run_measures_the_network_once_and_computes_no_tile_twice() -> None:
    made = segmenter()
    assert made.network_bytes is None
    result = made.segment(SCAN, NAMES)
    assert 0.6 * TAKEN < made.network_bytes < 2 * TAKEN
    assert made.model.encoded == result.tiles[0] == result.tiles[1] > 1
    known = made.network_bytes
    made.segment(SCAN, NAMES)
    assert made.network_bytes == known


@needs_memory_of_process
def test_a_scan_that_fits_only_without_the_network_is_refused_at_the_first_tile(monkeypatch) -> None:
    made = segmenter()
    without = made.segment(SCAN, NAMES)
    smallest = MemoryPlan(1, 1).total(Work(SCAN.shape, made.load(SCAN).network.shape, (16, 16, 16), 1))
    made, small = segmenter(), smallest + TAKEN // 2
    monkeypatch.setattr(scan_memory, "budget", lambda *given: small)
    with pytest.raises(InputError, match="of memory, one prompt at a time"):
        made.segment(SCAN, "liver")
    assert made.model.encoded == 1
    small = smallest + 2 * TAKEN
    again = made.segment(SCAN, "liver")
    assert np.array_equal(again.masks["liver"], without.masks["liver"])


def test_another_plan_begins_the_scan_again_with_the_same_masks(monkeypatch) -> None:
    made = segmenter()
    expected = made.segment(SCAN, NAMES).masks
    prepared, (array, network) = made.prepare(NAMES), made.processor.to_network(SCAN)
    seen: list[Any] = []
    real = within.predict_masks

    def watched(*arguments: Any, **options: Any) -> Any:
        seen.append((len(arguments[4].names), options["prompt_chunk"], options["first_tile"] is not None))
        return real(*arguments, **options)

    monkeypatch.setattr(within, "predict_masks", watched)
    plan, other = MemoryPlan(5, 5), MemoryPlan(3, 2)
    first = FirstTile(plan, lambda network_bytes: other)
    before = made.model.encoded
    masks, _, notes = within.predict_within_memory(
        made.predictor, array, network, SCAN.grid, prepared, plan, first_tile=first
    )
    assert seen == [(5, 5, True), (3, 2, False), (2, 2, False)] and notes == []
    assert (made.model.encoded - before - 1) % 2 == 0
    assert all(np.array_equal(masks[name], expected[name]) and masks.voxels[name] for name in NAMES)


class Tile:
    """A predictor whose encoder and decoder take what a test says."""

    device, patch_size = CPU, (16, 16, 16)

    def __init__(self, encoding: int, decoding: int) -> None:
        self.encoding, self.decoding = encoding, decoding

    def encode(self, tile: torch.Tensor, corner: tuple[int, int, int]) -> torch.Tensor:
        _take(self.encoding)
        return tile

    def decode(self, features: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        _take(self.decoding)
        return features.expand(1, len(text), 16, 16, 16).clone()


def _take(count: int) -> None:
    # of pages that are new to the process: an allocator may have kept as many from an earlier test
    scratch = mmap.mmap(-1, max(count, 1))
    np.frombuffer(scratch, dtype=np.uint8)[:] = 1
    time.sleep(0.03)
    scratch.close()


@needs_memory_of_process
@pytest.mark.parametrize("encoding, decoding, of_others", [(80, 1, 0), (1, 80, 0), (80, 1, 60)])
def test_the_larger_half_of_the_network_counts(encoding: int, decoding: int, of_others: int) -> None:
    measured: list[int] = []
    plan = MemoryPlan(2, 2)

    def plan_for(network_bytes: int) -> MemoryPlan:
        measured.append(network_bytes)
        return plan

    first = FirstTile(plan, plan_for, of_others * 1_000_000)
    predictor = Tile(encoding * 1_000_000, decoding * 1_000_000)
    tile = torch.rand(1, 1, 16, 16, 16)
    features, logits = first.compute(predictor, tile, (0, 0, 0), torch.eye(2))
    assert features is tile and torch.equal(logits, tile.expand(1, 2, 16, 16, 16))
    assert abs(measured[0] - (80 - of_others) * 1_000_000) < 25_000_000
    first = FirstTile(plan, lambda network_bytes: MemoryPlan(1, 1))
    with pytest.raises(AnotherPlan) as raised:
        first.compute(predictor, tile, (0, 0, 0), torch.eye(2))
    assert raised.value.plan == MemoryPlan(1, 1)


@needs_memory_of_process
def test_memory_that_is_free_again_at_the_end_of_a_block_was_seen() -> None:
    before = process_bytes()
    with HighestMemory(CPU) as seen:
        _take(100_000_000)
    assert seen.bytes - before > 80_000_000


def test_few_prompts_are_decoded_at_once_where_that_costs_nothing() -> None:
    model = create_model("mome_ct_tiny")
    assert decoded_at_once(32, model, CPU) == 8 and decoded_at_once(3, model, CPU) == 3
    assert decoded_at_once(32, model, torch.device("cuda")) == 32
    reads_prompts = SimpleNamespace(scale_experts=[SimpleNamespace(reads_prompts=True)], fusion=model.fusion)
    assert decoded_at_once(32, reads_prompts, CPU) == 32
    assert decoded_at_once(32, Contrast(), CPU) == 32

    class Summary(type(model.fusion)):  # type: ignore[misc]
        def summarise(self, features_BSCV: torch.Tensor) -> torch.Tensor:
            return features_BSCV.mean(-1)

    model.fusion.__class__ = Summary
    assert decoded_at_once(32, model, CPU) == 32
