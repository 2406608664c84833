"""Metrics against the libraries that own them, and the evaluation of folders."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.metrics import DiceMetric, compute_hausdorff_distance, compute_surface_dice
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


@pytest.mark.parametrize("spacing", SPACINGS[:2])
@pytest.mark.parametrize("smooth", [1.0, 2.0])
def test_rough_blobs_agree_too(spacing: tuple[float, float, float], smooth: float) -> None:
    """Rougher, at the image's border, and far from each other: several draws of each."""
    theirs = pytest.importorskip("surface_distance", reason="the surface-distance package is not installed")
    for seed in range(3):
        rng = np.random.default_rng(100 + seed)
        a = gaussian_filter(rng.standard_normal((24, 26, 22)), smooth) > 0.02
        b = gaussian_filter(a + 0.5 * rng.standard_normal(a.shape), 1.0) > 0.5
        far = np.roll(a, 9, 0)
        for p, r in ((a, b), (b, a), (far, b)):
            distances = theirs.compute_surface_distances(r, p, spacing)
            expected = theirs.compute_surface_dice_at_tolerance(distances, 2.0)
            assert normalized_surface_dice(p, r, spacing, 2.0) == pytest.approx(expected, abs=0.005)
            expected = theirs.compute_robust_hausdorff(distances, 95)
            assert hausdorff95(p, r, spacing) == pytest.approx(expected, abs=0.1)


def test_metrics_are_symmetric() -> None:
    a, b = blobs(3)
    assert dice(a, b) == dice(b, a) and hausdorff95(a, b, (1, 2, 3)) == hausdorff95(b, a, (1, 2, 3))
    assert normalized_surface_dice(a, b, (1, 2, 3), 1.0) == pytest.approx(
        normalized_surface_dice(b, a, (1, 2, 3), 1.0), abs=1e-12
    )


@pytest.mark.parametrize("spacing", SPACINGS[:2])
def test_dice_is_monais_and_hd95_is_near(spacing: tuple[float, float, float]) -> None:
    a, b = blobs(2)
    pair = [torch.from_numpy(m)[None, None].float() for m in (a, b)]
    theirs = DiceMetric(include_background=True)
    theirs(*pair)
    assert dice(a, b) == pytest.approx(float(theirs.aggregate()), abs=1e-6)
    shift = np.roll(a, 3, 1)
    for other in (b, shift):
        pair[1] = torch.from_numpy(other)[None, None].float()
        hd = compute_hausdorff_distance(*pair, percentile=95, include_background=True, spacing=list(spacing))
        assert hausdorff95(a, other, spacing) == pytest.approx(float(hd), abs=max(spacing))


def test_the_table_may_be_on_either_side(folders: tuple[Path, Path]) -> None:
    root = folders[0].parent
    listed = evaluate_folder(root / "tables", folders[1], cases=root / "cases.json")
    back = evaluate_folder(folders[1], root / "tables", cases=root / "cases.json")
    assert [(s.case, s.structure, s.dice) for s in listed] == [(s.case, s.structure, s.dice) for s in back]
    both = evaluate_folder(root / "tables", root / "maps", dataset="openkbp", cases=root / "cases.json")
    assert all((s.dice, s.nsd, s.hd95) == (1, 1, 0) for s in both) and len(both) == 3
    every = evaluate_folder(root / "maps", root / "maps", dataset="openkbp")
    assert len(every) == 2 * 7 and sum(math.isnan(s.dice) for s in every) == 2 * 5  # absent from both: NaN


def test_labels_on_the_command_line(folders: tuple[Path, Path], capsys) -> None:
    from mome.cli.main import main

    root = folders[0].parent
    options = ["--labels", "openkbp", "--cases", str(root / "cases.json"), "--json"]
    assert main(["evaluate", str(folders[0]), str(root / "maps"), *options]) == 0
    rows = json.loads(capsys.readouterr().out)["structures"]
    assert [(row["structure"], row["n"]) for row in rows] == [("larynx", 1), ("mandible", 2), ("mean", 3)]


def test_a_part_is_scored_where_that_is_asked_for(folders: tuple[Path, Path]) -> None:
    pred, ref = folders
    cases = pred.parent / "cases.json"
    whole = evaluate_folder(pred, ref, cases=cases)
    alone = evaluate_folder(pred, ref, cases=cases, structures=["voice box"])
    assert alone == [score for score in whole if score.structure == "larynx"] != []
    for wrong in ("liver", ["larynx", "liver"]):
        with pytest.raises(InputError, match="no case has a reference of liver") as caught:
            evaluate_folder(pred, ref, cases=cases, structures=wrong)
        assert "there are: larynx, mandible" in str(caught.value)
    (pred / "c2_larynx.nii.gz").unlink()
    with pytest.raises(InputError, match="'c2' has no prediction of 'larynx'") as caught:
        evaluate_folder(pred, ref, cases=cases)
    assert "-p larynx" in str(caught.value) and "--partial" in str(caught.value)
    left_out: list[tuple[str, str | None]] = []
    scores = evaluate_folder(pred, ref, cases=cases, on_missing=lambda *what: left_out.append(what))
    assert scores == [score for score in whole if score.structure != "larynx"]
    assert left_out == [("c2", "larynx")]
    for path in pred.glob("c1_*"):
        path.unlink()
    with pytest.raises(InputError, match="'c2' has no prediction of 'larynx'"):  # c1 has no larynx: not missed
        evaluate_folder(pred, ref, cases=cases, structures="larynx")
    with pytest.raises(InputError, match="'c1' has no prediction\n"):
        evaluate_folder(pred, ref, cases=cases)
    scores = evaluate_folder(pred, ref, cases=cases, on_missing=lambda *what: left_out.append(what))
    assert {score.case for score in scores} == {"c2"} and ("c1", None) in left_out


def test_partial_labels_of_separate_masks(folders: tuple[Path, Path]) -> None:
    pred, ref = folders
    (pred / "c1_larynx.nii.gz").unlink()  # not annotated in c1, so not missed
    listed = evaluate_folder(pred, ref, cases=pred.parent / "cases.json")
    assert [(s.case, s.structure) for s in listed] == [
        ("c1", "mandible"), ("c2", "larynx"), ("c2", "mandible"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such list of cases"),
        ("{", "list of cases is not"),
        ('{"c1": ["mandible"]}', "list of cases is not"),
        ('{"c1": {"annotated": ["mandible"]}}', "'c2' is not in the list of cases"),
        ('{"c1": {"annotated": ["brain"]}, "c2": {"annotated": []}}', "'c1' has no reference of 'brain'"),
    ],
)
def test_bad_lists_of_cases(folders: tuple[Path, Path], content: str | None, message: str) -> None:
    path = folders[0].parent / "other.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=message) as caught:
        evaluate_folder(*folders, cases=path)
    assert len(str(caught.value).splitlines()) <= 3


def test_bad_places_and_grids(folders: tuple[Path, Path], tmp_path: Path) -> None:
    pred, ref = folders
    (tmp_path / "nothing").mkdir()
    with pytest.raises(InputError, match="no such file or folder"):
        evaluate_folder(pred, tmp_path / "absent")
    with pytest.raises(InputError, match="no masks to compare with"):
        evaluate_folder(pred, tmp_path / "nothing")
    with pytest.raises(InputError, match="no case of the reference has a prediction: c1, c2\n"):
        evaluate_folder(tmp_path / "nothing", ref)
    with pytest.raises(InputError, match="unknown data set 'other'"):
        evaluate_folder(pred, tmp_path / "maps", dataset="other")
    moved = np.diag([1.0, 1, 2, 1])
    moved[0, 3] = 4
    shifted, shorter = Grid((30, 32, 28), moved), Grid((30, 32, 27), np.diag([1.0, 1, 2, 1]))
    for grid in (shifted, shorter):
        write_mask(pred / "c1_mandible.nii.gz", np.ones(grid.shape), grid)
        with pytest.raises(InputError, match="'mandible' in 'c1' are on different grids") as caught:
            evaluate_folder(pred, ref, cases=tmp_path / "cases.json")
        assert len(str(caught.value).splitlines()) <= 3


def test_masks_at_the_same_places_in_another_order_of_voxels_are_compared(tmp_path: Path) -> None:
    """Other programs store the masks of an LPS scan as RAS or LAS; a voxel has the same place by its affine."""
    mask = np.zeros((12, 14, 10), np.uint8)
    mask[2:7, 3:6, 1:8] = 1
    affine = np.array([[-2.0, 0, 0, 40], [0, -1.5, 0, 60], [0, 0, 3, -20], [0, 0, 0, 1]])
    write_mask(tmp_path / "p_liver.nii.gz", mask, Grid(mask.shape, affine))
    turned = np.ascontiguousarray(mask.transpose(2, 1, 0)[:, ::-1, ::-1])
    turn = np.array([[0, 0, -1.0, 11], [0, -1, 0, 13], [1, 0, 0, 0], [0, 0, 0, 1]])  # from new to old indices
    write_mask(tmp_path / "r_liver.nii.gz", turned, Grid(turned.shape, affine @ turn))
    (score,) = evaluate_folder(tmp_path / "p_liver.nii.gz", tmp_path / "r_liver.nii.gz")
    assert (score.dice, score.nsd, score.hd95) == (1.0, 1.0, 0.0)
    mirrored = affine @ np.diag([-1.0, 1, 1, 1])  # the same array elsewhere is no other order
    write_mask(tmp_path / "r_liver.nii.gz", mask, Grid(mask.shape, mirrored))
    with pytest.raises(InputError, match="axes run to LPS and RPS"):
        evaluate_folder(tmp_path / "p_liver.nii.gz", tmp_path / "r_liver.nii.gz")


def test_the_bootstrap_interval_is_that_of_a_mean() -> None:
    values = np.random.default_rng(0).normal(0.8, 0.05, 60)
    rows = summarise([Score(f"c{i}", "liver", v, 1.0, 2.0) for i, v in enumerate(values)])
    found, half = rows[0]["dice"], 1.96 * values.std() / 60**0.5
    assert found["mean"] == pytest.approx(values.mean())
    assert found["median"] == pytest.approx(np.median(values))
    assert found["low"] == pytest.approx(values.mean() - half, abs=0.15 * half)
    assert found["high"] == pytest.approx(values.mean() + half, abs=0.15 * half)
    assert rows[0]["hd95"]["low"] == rows[0]["hd95"]["high"] == rows[0]["hd95"]["mean"] == 2.0
    other = summarise([Score(f"c{i}", "liver", v, 1.0, 2.0) for i, v in enumerate(values)], seed=1)[0]["dice"]
    assert other["low"] != found["low"] and other["mean"] == found["mean"]


def test_summary_of_nothing() -> None:
    nan = float("nan")
    assert summarise([]) == []
    rows = summarise([Score("c0", "aorta", nan, nan, nan), Score("c0", "liver", 0.6, 0.7, 3.0)])
    assert rows[0]["n"] == 1 and rows[0]["dice"]["n"] == 0 and math.isnan(rows[0]["dice"]["mean"])
    assert (rows[2]["dice"]["mean"], rows[2]["dice"]["n"]) == (0.6, 1)


def test_free_text_masks_belong_to_their_case(folders: tuple[Path, Path]) -> None:
    pred, ref = folders
    grid = Grid((30, 32, 28), np.diag([1.0, 1, 2, 1]))
    write_mask(pred / "c1_my_odd_lesion.nii.gz", np.zeros(grid.shape), grid)
    assert len(evaluate_folder(pred, ref)) == 4
