"""Shares, histograms and shortcuts of the checks of values give what a pass over all values gives."""

from __future__ import annotations

import numpy as np
import pytest

from mome.volumes import voxel_order
from mome.volumes.doubtful_planes import _pairs_that_may_jump
from mome.volumes.value_sample import SortedValues, ValueSample
from mome.volumes.voxel_order import Differences, is_noise, other_order

RNG = np.random.default_rng(0)
# Many values lie exactly on the limits and on the edges of the bins below.
VALUES = {
    "hu": RNG.normal(-300, 500, 20_000).round(),
    "few": RNG.integers(-3, 3, 20_000) * 100.0,
    "fractions": RNG.uniform(-1_100, 1_100, 20_000),
    "one": np.full(7, -300.0),
    "none": np.zeros(0),
}


@pytest.mark.parametrize("dtype", ["float32", "float64", "int16"])
@pytest.mark.parametrize("name", VALUES)
def test_shares_and_counts_are_those_of_comparisons(name: str, dtype: str) -> None:
    values = VALUES[name].astype(dtype)
    found = SortedValues(np.sort(values))
    for low, high in ((-1_060, -900), (-200.0, 200.0), (-0.06 * 195, 0.95 * 195), (-np.inf, 0.1), (100, -100), (0, 0)):
        expected = ((values >= low) & (values <= high)).mean() if values.size else 0.0
        assert found.share(low, high) == expected
        assert found.below(high) == (values < high).sum() and found.up_to(high) == (values <= high).sum()
        assert np.array_equal(found.above(low).values, np.sort(values[values > low]))


@pytest.mark.parametrize("dtype", ["float32", "float64", "int16"])
@pytest.mark.parametrize("name", VALUES)
@pytest.mark.parametrize(
    "bins, low, high", [(191, -4_000, -180), (40, -400, 400), (80, -1_400.0, -600.0), (7, 0.1, 0.7)]
)
def test_histograms_are_those_of_numpy(name: str, dtype: str, bins: int, low: float, high: float) -> None:
    values = VALUES[name].astype(dtype)
    counts, edges = SortedValues(np.sort(values)).histogram(bins, low, high)
    expected, expected_edges = np.histogram(values, bins=bins, range=(low, high))
    assert counts.tolist() == expected.tolist() and edges.tolist() == expected_edges.tolist()


def test_the_sample_of_a_large_array_is_every_odd_th_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mome.volumes.value_sample._SAMPLE", 1_000)
    array = RNG.permutation(4_000).reshape(20, 20, 10).astype(np.float32)
    known = ValueSample(array)
    assert (known.low, known.high) == (0, 3_999)
    assert known.sorted.values.tolist() == sorted(array.reshape(-1)[::5].tolist())


@pytest.mark.parametrize("scale", [0.0, 10.0, 60.0, 70.0, 80.0, 200.0, np.inf])
@pytest.mark.parametrize("smooth", [0, 1, 2, 3])
def test_random_order_is_computed_only_where_it_decides(
    scale: float, smooth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = RNG.normal(0, 1, (40, 40, 40)).astype(np.float32)
    for axis in range(smooth):
        values = np.cumsum(values, axis=axis) / 3
    with np.errstate(invalid="ignore"):
        differences = Differences(values * np.float32(scale))
        decided = is_noise(differences), other_order(differences)
        was_computed = "distant" in vars(differences)
        monkeypatch.setattr(voxel_order.Differences, "may_reach", lambda *given: True)
        assert (is_noise(differences), other_order(differences)) == decided
    assert was_computed or not (decided[0] or decided[1])
    if scale == 0:
        assert not was_computed


def test_planes_that_are_left_out_do_not_jump() -> None:
    def quantiles(sample: np.ndarray) -> np.ndarray:
        return np.quantile(sample, 0.05, axis=(0, 1))

    for spread, voxels in ((20.0, 12), (300.0, 12), (900.0, 30), (900.0, 4)):
        levels = RNG.choice([-1_000, -700, -650, 0, 400], 60)
        sample = (levels + RNG.normal(0, spread, (voxels, voxels, 60))).astype(np.float32)
        may_jump = set(_pairs_that_may_jump(sample).tolist())
        changes = np.abs(np.diff(quantiles(sample)))
        assert {k for k in range(59) if changes[k] > 350} <= may_jump
    assert _pairs_that_may_jump(np.full((30, 30, 9), 3e9, dtype=np.float32)).tolist() == list(range(8))
    steady = RNG.normal(-1_000, 20, (30, 30, 9)).astype(np.float32)
    assert not _pairs_that_may_jump(steady).size
