"""The inference benchmarks: known logits come where they belong, sides take turns, and the results become a table."""

from __future__ import annotations

import copy
import importlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from mome.inference import PreparedPrompts, Segmenter
from mome.volumes import Volume, resample

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    """Imports a module of the benchmarks by its name."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def a_body(shape=(70, 64, 60), spacing=4.0) -> Volume:
    """A block of tissue with a texture, off the centre of a scan of air."""
    array = np.full(shape, -1000.0, dtype=np.float32)
    texture = np.random.default_rng(0).normal(40, 60, (34, 30, 52))
    array[30:64, 26:56, 4:56] = texture
    return Volume(array, np.diag([spacing, spacing, spacing, 1.0]))


@pytest.mark.parametrize("mode", ["exact", "default"])
def test_known_logits_give_the_masks_of_their_structures(benchmark, mode, tmp_path):
    known = benchmark("known_logits")
    modes = benchmark("segmenter_modes")
    segmenter = Segmenter(modes.MODEL, **modes.MODES[mode])
    scan = a_body()
    network = segmenter.processor.network_grid(scan.grid)
    masks = [np.zeros(network.shape, dtype=bool) for _ in range(2)]
    masks[0][40:50, 35:50, 20:60] = True
    masks[1][45:60, 30:33, 50:52] = True
    known.SignedDistances.of_masks(masks, network.spacing).save(tmp_path / "distances.npz")
    distances = known.SignedDistances.load(tmp_path / "distances.npz")
    prepared = segmenter.prepare(["mandible", "larynx", "brainstem"])
    rows = known.with_structures(prepared.text_PT, [1, 0, 1])
    tensor, _ = segmenter.processor.to_network(scan)
    segmenter.predictor = known.KnownLogits(None, distances, tensor[0])
    result = segmenter.segment(scan, PreparedPrompts(prepared.prompts, rows))
    for name, structure in (("mandible", 1), ("larynx", 0), ("brainstem", 1)):
        logits = distances.dense(structure)
        assert np.array_equal(logits > 0, masks[structure])
        expected = resample(logits, network, scan.grid, fill=-1.0, antialias=False).numpy() > 0
        assert expected.sum() > 50
        assert (result.masks[name] != expected).sum() <= 0.01 * expected.sum(), name


def test_a_tile_is_found_in_its_volume(benchmark):
    known = benchmark("known_logits")
    volume = np.random.default_rng(1).random((20, 18, 16)).astype(np.float32)
    assert known.place_of(volume[3:11, 5:13, 7:15], volume) == (3, 5, 7)
    beyond = np.zeros((8, 8, 20), dtype=np.float32)
    beyond[:, :, :16] = volume[2:10, 4:12]
    assert known.place_of(beyond, volume) == (2, 4, 0)
    with pytest.raises(ValueError, match="no part"):
        known.place_of(np.ones((8, 8, 8), dtype=np.float32), volume)


def test_sides_take_turns(benchmark):
    processes = benchmark("processes")
    order: list[str] = []

    def side(name):
        return lambda: order.append(name) or {"seconds": len(order), "precision": "fp32", "ok": True}

    kept = []
    runs = processes.in_turns({name: side(name) for name in "abc"}, {"a": 3, "b": 3, "c": 1}, kept.append)
    assert order == ["a", "b", "c", "b", "a", "a", "b"]
    assert [run["seconds"] for run in runs["a"]] == [1, 5, 6]
    assert len(kept) == 7 and set(kept[0]) == {"a"}
    assert processes.medians(runs["a"]) == {"seconds": 5}
    assert processes.ratios([2.0, 6.0, 9.0], [1.0, 2.0]) == {"median": 2.5, "lowest": 2.0, "highest": 3.0}


def test_time_in_the_network_is_counted(benchmark):
    class Model:
        def encode(self, tile):
            return tile + 1

        def decode(self, features):
            return features * 2

    model = Model()
    measured = benchmark("network_time").NetworkTime(model)
    assert model.decode(model.encode(torch.ones(1))) == 4
    assert measured.tiles == 1 and measured.seconds > 0
    copy.copy(model).encode(torch.ones(1))
    assert measured.tiles == 2
    measured.reset()
    assert measured.tiles == 0 and measured.seconds == 0


def test_results_become_a_table(benchmark, monkeypatch, tmp_path):
    table = benchmark("inference_table")
    monkeypatch.setattr(table, "RESULTS", tmp_path)
    assert table.inference_section().count("Not yet measured") == 6
    run = {"seconds": 2.0, "outside_seconds": 0.5, "memory_mib": 100.0, "precision": "fp32"}
    ratio = {"median": 0.5, "lowest": 0.4, "highest": 0.6}
    report = {
        "commit": "0123456789",
        "machine": {"processor": "a processor", "cores": 2},
        "rounds": 3,
        "sides": {
            "exact": {**run, "ratio_to_monai": {key: ratio for key in ("seconds", "outside_seconds", "memory_mib")}},
            "monai": run,
        },
    }
    (tmp_path / "inference_peers.json").write_text(json.dumps(report))
    section = table.inference_section()
    assert "0.50 (0.40–0.60)" in section and "a processor, 2 cores, commit 0123456" in section
    assert section.count("Not yet measured") == 5


def test_masks_of_bfloat16_were_measured_on_every_validation_scan():
    report = json.loads((BENCHMARKS / "results" / "inference_precision.json").read_text())
    assert len(report["cases"]) == 33
    for row in report["summary"].values():
        assert 0 < row["bf16"]["lowest"] <= row["bf16"]["mean"] <= 1


def test_the_page_of_results_holds_the_results(benchmark):
    """Each section is written from the files in results, which are easily changed alone."""
    assert (BENCHMARKS / "RESULTS.md").read_text() == benchmark("openkbp_table").results_text()
