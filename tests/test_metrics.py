"""Metrics against the libraries that own them, and the evaluation of folders."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.metrics import compute_hausdorff_distance, compute_surface_dice
from scipy.ndimage import gaussian_filter

from mome.errors import InputError
from mome.metrics import Score, dice, evaluate_folder, hausdorff95, normalized_surface_dice, summarise
from mome.volumes import Grid, write_mask

SPACINGS = [(1.0, 1.0, 1.0), (3.9, 3.9, 2.5), (0.7, 0.7, 5.0)]


def blobs(seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    a = gaussian_filter(rng.standard_normal((30, 32, 28)), 3) > 0.03
    b = gaussian_filter(a + 0.5 * rng.standard_normal(a.shape), 1.2) > 0.5
    return a, b


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("seed", [0, 1])
def test_surface_metrics_agree_with_surface_distance(spacing: tuple[float, float, float], seed: int) -> None:
    theirs = pytest.importorskip("surface_distance", reason="the surface-distance package is not installed")
    a, b = blobs(seed)
    distances = theirs.compute_surface_distances(b, a, spacing)
    for tolerance in (0.5, 1.0, 3.0):
        expected = theirs.compute_surface_dice_at_tolerance(distances, tolerance)
        assert normalized_surface_dice(a, b, spacing, tolerance) == pytest.approx(expected, abs=0.005)
    expected = theirs.compute_robust_hausdorff(distances, 95)
    assert hausdorff95(a, b, spacing) == pytest.approx(expected, rel=0.05, abs=max(spacing) / 2)


def test_surface_metrics_are_near_monais() -> None:
    """MONAI's surfaces are voxels, ours are cubes between voxels: near, not equal."""
    a, b = blobs(0)
    pair = [torch.from_numpy(m)[None, None].float() for m in (a, b)]
    theirs = float(compute_hausdorff_distance(*pair, percentile=95, include_background=True, spacing=[1, 1, 1]))
    assert hausdorff95(a, b, (1, 1, 1)) == pytest.approx(theirs, abs=1.0)
    theirs = float(compute_surface_dice(*pair, class_thresholds=[1.0], include_background=True, spacing=[1, 1, 1]))
    assert normalized_surface_dice(a, b, (1, 1, 1), 1.0) == pytest.approx(theirs, abs=0.05)


def test_dice_and_identity() -> None:
    a, b = blobs(0)
    assert dice(a, b) == pytest.approx(2 * (a & b).sum() / (a.sum() + b.sum()))
    assert dice(a, a) == normalized_surface_dice(a, a, (1, 1, 1), 0.0) == 1 and hausdorff95(a, a, (1, 1, 1)) == 0
    with pytest.raises(ValueError, match="different shapes"):
        dice(a, b[1:])


def test_empty_masks() -> None:
    a, nothing = blobs(0)[0], np.zeros((30, 32, 28), bool)
    assert all(math.isnan(v) for v in (dice(nothing, nothing), hausdorff95(nothing, nothing, (1, 1, 1))))
    assert math.isnan(normalized_surface_dice(nothing, nothing, (1, 1, 1), 1))
    for pair in ((a, nothing), (nothing, a)):
        assert dice(*pair) == normalized_surface_dice(*pair, (1, 1, 1), 1) == 0
        assert hausdorff95(*pair, (1, 2, 3)) == pytest.approx(np.linalg.norm([30, 64, 84]))


def test_a_shift_is_measured_in_mm() -> None:
    cube = np.zeros((30, 30, 30), bool)
    cube[8:20, 8:20, 8:20] = True
    assert hausdorff95(cube, np.roll(cube, 2, 2), (1, 1, 2.5)) == pytest.approx(5.0)


# -- folders -------------------------------------------------------------------------------------------------


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    grid = Grid((30, 32, 28), np.diag([1.0, 1, 2, 1]))
    for case in ("c1", "c2"):
        a, b = blobs(int(case[1]))
        for name, p, r in (("mandible", a, b), ("larynx", b, b)):
            write_mask(tmp_path / "p" / f"{case}_{name}.nii.gz", p, grid)
            write_mask(tmp_path / "r" / f"{case}_{name}.nii.gz", r, grid)
        numbers = np.where(b, 6, 0)
        numbers[:3] = 7
        write_mask(tmp_path / "maps" / f"{case}.nii.gz", numbers, grid)
        table = [{"id": 6, "name": "mandible"}, {"id": 7, "name": "larynx"}]
        write_mask(tmp_path / "tables" / f"{case}.nii.gz", numbers, grid, labels=table)
    cases = {"c1": {"annotated": ["mandible"]}, "c2": {"annotated": ["mandible", "larynx"]}}
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    return tmp_path / "p", tmp_path / "r"


def test_masks_per_prompt(folders: tuple[Path, Path]) -> None:
    scores = evaluate_folder(*folders)
    assert [(s.case, s.structure) for s in scores] == [
        ("c1", "larynx"), ("c1", "mandible"), ("c2", "larynx"), ("c2", "mandible"),
    ]  # fmt: skip
    a, b = blobs(1)
    assert scores[1].dice == dice(a, b) and scores[0].dice == 1
    assert scores[1].nsd == normalized_surface_dice(a, b, (1, 1, 2), 2.0)


def test_maps_of_numbers_and_partial_labels(folders: tuple[Path, Path]) -> None:
    root = folders[0].parent
    with pytest.raises(InputError, match="no label table"):
        evaluate_folder(folders[0], root / "maps")
    options = {"dataset": "openkbp", "cases": root / "cases.json"}
    listed = evaluate_folder(folders[0], root / "maps", **options)
    assert [(s.case, s.structure) for s in listed] == [("c1", "mandible"), ("c2", "larynx"), ("c2", "mandible")]
    assert evaluate_folder(folders[0], root / "tables", cases=root / "cases.json") == listed


def test_what_is_missing_or_elsewhere_is_said(folders: tuple[Path, Path]) -> None:
    pred, ref = folders
    (pred / "c2_larynx.nii.gz").unlink()
    with pytest.raises(InputError, match="'c2' has no prediction of 'larynx'"):
        evaluate_folder(pred, ref)
    (pred / "c2_mandible.nii.gz").unlink()
    with pytest.raises(InputError, match="'c2' has no prediction"):
        evaluate_folder(pred, ref)
    write_mask(pred / "c1_mandible.nii.gz", np.zeros((30, 32, 28)), Grid((30, 32, 28), np.eye(4)))
    with pytest.raises(InputError, match="different grids"):
        evaluate_folder(pred / "c1_mandible.nii.gz", ref / "c1_mandible.nii.gz")


def test_summary() -> None:
    scores = [Score(f"c{i}", "liver", v, v, 1.0) for i, v in enumerate((0.8, 0.9, float("nan"), 1.0))]
    scores.append(Score("c0", "aorta", 0.5, 0.5, 2.0))
    rows = summarise(scores)
    assert rows == summarise(scores) and [r["structure"] for r in rows] == ["aorta", "liver", "mean"]
    liver = rows[1]["dice"]
    assert liver["n"] == 3 and liver["mean"] == pytest.approx(0.9) and liver["median"] == 0.9
    assert 0.8 <= liver["low"] < 0.9 < liver["high"] <= 1.0
    assert rows[2]["dice"]["mean"] == pytest.approx(0.7)
