"""Interpolating only where a value can be above a threshold gives the voxels of interpolating everything."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from mome.inference.above import AboveThreshold, box_above
from mome.inference.logit_ring import OUTSIDE_LOGIT
from mome.inference.planes import PlaneStream, shortest_buffer_axis
from mome.volumes import Grid, resample

SHAPE = (17, 14, 21)


def grid(shape: tuple[int, int, int], columns: np.ndarray, origin: tuple[float, float, float] = (0, 0, 0)) -> Grid:
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = columns, origin
    return Grid(shape, affine)


def turned(angles: tuple[float, float, float], spacing: tuple[float, float, float]) -> np.ndarray:
    return Rotation.from_euler("xyz", angles, degrees=True).as_matrix() * spacing


NETWORK = grid(SHAPE, np.diag([2.0, 2.5, 3.0]))
FLIPPED = np.array([[0, 0, -1.3], [0.8, 0, 0], [0, -2.1, 0]])
TARGETS = {
    "same": NETWORK,
    "finer": grid((39, 41, 50), np.diag([0.9, 0.85, 1.27]), (-0.6, -0.8, -0.9)),
    "coarser": grid((8, 9, 16), np.diag([4.1, 3.9, 3.9]), (0.3, 0.2, -0.1)),
    "larger, with a border": grid((60, 50, 70), np.diag([1.0, 1.0, 1.0]), (-8.0, -5.0, -3.0)),
    "permuted and flipped": grid((44, 31, 29), FLIPPED, (35.0, -1.0, 62.0)),
    "oblique": grid((30, 34, 26), turned((12, -20, 33), (1.4, 1.2, 1.9)), (2.0, -6.0, 4.0)),
    "steep": grid((26, 30, 24), turned((45, 40, 20), (1.4, 1.6, 1.5)), (0.0, 0.0, 10.0)),
    "one plane": grid((38, 40, 1), np.diag([0.9, 0.85, 5.0]), (0, 0, 20.0)),
    "elsewhere": grid((10, 10, 10), np.diag([1.0, 1.0, 1.0]), (500.0, 0, 0)),
}


def organs() -> torch.Tensor:
    """Logits of no organ, a speck, a long thin organ along a diagonal, a ball at a face, noise, and the whole body."""
    rng = np.random.default_rng(0)
    logits = np.full((6, *SHAPE), -3.0, dtype=np.float32)
    logits += rng.normal(0, 0.2, logits.shape).astype(np.float32)
    logits[1, 9, 4, 16] = 2.0
    for step in range(14):
        logits[2, step + 1, step, step + 5] = 5.0
    at = np.stack(np.meshgrid(*map(np.arange, SHAPE), indexing="ij"))
    distance = np.linalg.norm(at - np.array([0, 7, 20])[:, None, None, None], axis=0)
    logits[3] = 5 - distance
    logits[4] = rng.normal(-0.5, 1, SHAPE)
    logits[5] = 4.0
    return torch.from_numpy(logits)


def sparse(logits: torch.Tensor, source: Grid, target: Grid, axis: int, threshold: float) -> torch.Tensor:
    """The whole target, filled where blocks were yielded; every voxel is yielded at most once."""
    out, times = torch.full((len(logits), *target.shape), OUTSIDE_LOGIT), torch.zeros(target.shape)
    above = AboveThreshold(source, target, axis, threshold)
    for p, one in enumerate(logits):
        times.zero_()
        for first, values in above.blocks(one, lambda block: block):
            place = tuple(slice(a, a + n) for a, n in zip(first, values.shape, strict=True))
            out[p][place] = torch.from_numpy(values)
            times[place] += 1
        assert times.max() <= 1
    return out


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("threshold", [0.0, -2.9])
def test_voxels_above_the_threshold_are_those_of_the_plain_computation(name: str, threshold: float) -> None:
    logits, target = organs(), TARGETS[name]
    expected = resample(logits, NETWORK, target, fill=OUTSIDE_LOGIT, antialias=False)
    for axis in range(3):
        found = sparse(logits, NETWORK, target, axis, threshold)
        certain = (expected - threshold).abs() > 1e-4  # elsewhere, the order of interpolation decides how it is rounded
        assert torch.equal((found > threshold) & certain, (expected > threshold) & certain)
        both = (found > threshold) & (expected > threshold)
        torch.testing.assert_close(found[both], expected[both], rtol=1e-4, atol=1e-4)
    if name in ("same", "finer", "larger, with a border", "permuted and flipped"):
        assert ((expected > 0).flatten(1).sum(1) > 0).tolist() == [False, True, True, True, True, True]


def test_nothing_is_touched_without_a_value_above_the_threshold() -> None:
    logits = organs()
    assert box_above(logits[0], 0.0) is None and box_above(logits[1], 0.0) == [(9, 10), (4, 5), (16, 17)]
    above = AboveThreshold(NETWORK, TARGETS["finer"], 2)
    assert list(above.blocks(logits[0], lambda block: block)) == []
    ((_, speck),) = above.blocks(logits[1], lambda block: block)
    assert speck.size < 400  # the voxels around one voxel of the network grid, of 79,950


@pytest.mark.parametrize("name", ["finer", "permuted and flipped", "oblique", "one plane"])
@pytest.mark.parametrize("axis", range(3))
def test_planes_that_arrive_one_after_the_other_give_the_whole(name: str, axis: int) -> None:
    logits, target = organs(), TARGETS[name]
    expected = resample(logits, NETWORK, target, fill=OUTSIDE_LOGIT, antialias=False)
    stream, first, seen = PlaneStream(NETWORK, target, axis), 0, []
    for count in (3, 1, 6, 50):
        part = logits.narrow(1 + axis, first, min(count, SHAPE[axis] - first))
        ready = stream.push(first, part)
        first += part.shape[1 + axis]
        if ready is not None:
            found = sparse(ready.logits, ready.source, ready.target, stream.axis, 0.0)
            wanted = expected.narrow(1 + stream.axis, ready.planes.start, len(ready.planes))
            assert torch.equal((found > 0) & (wanted.abs() > 1e-4), (wanted > 0) & (wanted.abs() > 1e-4))
            seen += list(ready.planes)
        if first == SHAPE[axis]:
            break
    assert sorted(seen) == list(range(target.shape[stream.axis]))


def test_the_buffer_is_shortest_along_the_longest_axis() -> None:
    assert shortest_buffer_axis((100, 100, 240), (64, 64, 64)) == 2
    assert shortest_buffer_axis((300, 100, 240), (64, 64, 64)) == 0
    assert shortest_buffer_axis((8, 8, 8), (64, 64, 64)) == 2
