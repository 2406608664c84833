"""Where windows lie at the same places, our exact mode and MONAI's sliding window give the same masks."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from mome.inference import Segmenter

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.mark.wide
def test_same_windows_give_the_masks_of_monai(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("monai")
    monkeypatch.syspath_prepend(str(BENCHMARKS.parent / "kernels" / "benchmarks"))
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    peers = importlib.import_module("inference_peers")
    scan = importlib.import_module("gpu_segmentation").synthetic_ct((90, 90, 72), (4.0, 4.0, 5.0))
    segmenter = Segmenter("mome-ct-torso-tiny", overlap=peers.OVERLAP, precision="fp32", exact=True)
    segmenter.processor.extend_mm = 0.0  # MONAI's side sees the scan as it is
    prepared = segmenter.prepare(list(segmenter.model.config.labels[:32]))
    ours = segmenter.segment(scan, prepared).masks
    theirs = peers.monai_masks(segmenter, prepared, scan, 1)
    sizes = {name: int(mask.sum()) for name, mask in theirs.items()}
    assert sum(size > 0 for size in sizes.values()) >= 15
    for name, mask in theirs.items():
        different = int((mask.numpy() != ours[name].astype(bool)).sum())
        assert different <= 1e-4 * max(sizes[name], 10_000), (name, different, sizes[name])
