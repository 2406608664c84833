"""Statistics of masks beside plain numpy and scipy, and their files in a folder run."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage
from stand_in_models import Contrast, Threshold

from mome.errors import InputError
from mome.inference import Segmenter, segment_folder
from mome.inference.report import read_report
from mome.inference.statistics import CSV_NAME, write_statistics, write_table
from mome.inference.study_run import StudyRun
from mome.inference.volumes_table import write_volumes
from mome.processing import MoMEProcessor
from mome.volumes import Grid
from mome.volumes.boxed import BoxedArray
from mome.volumes.boxes import bounding_box
from mome.volumes.statistics import structure_statistics


def measured(mask: np.ndarray, hu: np.ndarray, grid: Grid) -> dict:
    """The statistics; a box that is looser than the mask gives the same as the whole array."""
    found = structure_statistics(BoxedArray.whole(mask), hu, grid)
    if mask.any():
        first = np.maximum(np.argwhere(mask).min(axis=0) - 1, 0)
        part = mask[tuple(slice(at, None) for at in first)]
        assert structure_statistics(BoxedArray(mask.shape, tuple(first.tolist()), part), hu, grid) == found
    return found


def oblique_grid(shape: tuple[int, int, int]) -> Grid:
    angle = np.radians(20)
    affine = np.eye(4)
    turned = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    affine[:3, :3] = turned @ np.diag([-1.5, -2, 3.0])  # LPS, turned
    affine[:3, 3] = (40, 30, -100)
    return Grid(shape, affine)


def test_numbers_beside_numpy_and_scipy() -> None:
    rng, shape = np.random.default_rng(0), (14, 12, 9)
    grid, hu = oblique_grid(shape), rng.normal(0, 300, shape).astype(np.float32)
    for share in (0.02, 0.1, 0.6, 1.0):
        mask = (rng.random(shape) < share).astype(np.uint8)
        found, values, at = measured(mask, hu, grid), hu[mask > 0].astype(float), np.argwhere(mask)
        assert found["voxels"] == len(values) and found["volume_ml"] == pytest.approx(len(values) * 9 / 1000)
        expected = (values.mean(), np.median(values), values.std(), *np.percentile(values, [5, 95]))
        names = ("mean_hu", "median_hu", "sd_hu", "p5_hu", "p95_hu")
        assert [found[name] for name in names] == pytest.approx(expected, abs=2e-3)
        assert found["box_voxels"] == np.stack([at.min(axis=0), at.max(axis=0)], axis=1).tolist()
        assert found["pieces"] == ndimage.label(mask, np.ones((3, 3, 3)))[1]
        corners = at[:, None] + np.array(np.meshgrid(*[(-0.5, 0.5)] * 3)).reshape(3, 8).T
        low, high = at.min(axis=0) - 0.5, at.max(axis=0) + 0.5
        box = np.array(np.meshgrid(*zip(low, high, strict=True))).reshape(3, 8).T
        world = box @ grid.affine[:3, :3].T + grid.affine[:3, 3]
        np.testing.assert_allclose(found["box_mm"], np.stack([world.min(axis=0), world.max(axis=0)], axis=1), atol=1e-3)
        inside = corners.reshape(-1, 3) @ grid.affine[:3, :3].T + grid.affine[:3, 3]
        assert (inside >= np.array(found["box_mm"])[:, 0] - 1e-3).all()


def test_faces_are_named_by_the_patient() -> None:
    """Array axes of this grid run to L, P and S."""
    grid, hu = oblique_grid((6, 6, 6)), np.zeros((6, 6, 6), np.float32)
    assert grid.orientation == "LPS"
    for index, face in (
        ((0, 3, 3), "right"), ((5, 3, 3), "left"), ((3, 0, 3), "anterior"),
        ((3, 5, 3), "posterior"), ((3, 3, 0), "inferior"), ((3, 3, 5), "superior"), ((3, 3, 3), None),
    ):  # fmt: skip
        mask = np.zeros((6, 6, 6), np.uint8)
        mask[index] = 1
        assert measured(mask, hu, grid)["touches"] == ([face] if face else [])
    assert len(measured(np.ones((6, 6, 6)), hu, grid)["touches"]) == 6


def test_an_empty_mask_and_pieces() -> None:
    grid, hu = oblique_grid((8, 8, 8)), np.zeros((8, 8, 8), np.float32)
    empty = measured(np.zeros((8, 8, 8), np.uint8), hu, grid)
    assert (empty["voxels"], empty["mean_hu"], empty["box_mm"], empty["pieces"]) == (0, None, None, 0)
    mask = np.zeros((8, 8, 8), np.uint8)
    mask[1:3, 1:3, 1:3] = mask[3, 3, 3] = mask[6, 6, 6] = 1  # the second touches the first by a corner
    found = measured(mask, hu, grid)
    assert (found["pieces"], found["largest_piece_voxels"]) == (2, 9)
    assert bounding_box(mask) == (slice(1, 7), slice(1, 7), slice(1, 7))


def test_a_folder_run_writes_json_and_one_table(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    segmenter = Segmenter(Threshold(0.5), MoMEProcessor(spacing=[2, 2, 2], hu_window=[-100, 100]))
    given, out = tmp_path / "in", tmp_path / "out"
    given.mkdir()
    for number, name in enumerate(("a", "=b", "empty")):
        hu = np.random.default_rng(number).normal(-500 if name == "empty" else 0, 60, (8, 8, 8)).astype(np.int16)
        nib.save(nib.Nifti1Image(hu, np.diag([2.0, 2, 2, 1])), given / f"{name}.nii.gz")
    segment_folder(segmenter, [given], out, ["liver"], statistics=False)
    assert not (out / CSV_NAME).exists()
    entries = segment_folder(segmenter, [given], out, ["liver"], statistics=True, resume=True)
    assert not any(entry.get("skipped") for entry in entries)
    hu = nib.load(given / "a.nii.gz").get_fdata()
    mask = nib.load(out / "a_liver.nii.gz").get_fdata() > 0
    found = json.loads((out / "a_statistics.json").read_text())
    assert found["study"] == "a" and found["structures"]["liver"]["mean_hu"] == pytest.approx(hu[mask].mean(), abs=1e-3)
    with (out / CSV_NAME).open(newline="") as file:
        rows = {row["study"]: row for row in csv.DictReader(file)}
    assert set(rows) == {"a", "'=b", "empty"} and float(rows["a"]["mean_hu"]) == found["structures"]["liver"]["mean_hu"]
    assert rows["empty"]["voxels"] == "0" and rows["empty"]["mean_hu"] == rows["empty"]["box_x_low_mm"] == ""
    assert rows["a"]["touches"] == " ".join(found["structures"]["liver"]["touches"])
    again = segment_folder(segmenter, [given], out, ["liver"], statistics=True, resume=True)
    assert all(entry["skipped"] for entry in again)
    (out / "a_statistics.json").unlink()
    again = segment_folder(segmenter, [given], out, ["liver"], statistics=True, resume=True)
    assert [entry.get("skipped", False) for entry in again] == [True, False, True]  # =b, a, empty
    # The file of a study of an earlier run is damaged; the table lacks the study, and a warning says so.
    (out / "a_statistics.json").write_text("{}")
    segment_folder(segmenter, [given / "empty.nii.gz"], out, ["liver"], statistics=True, resume=True)
    assert "a_statistics.json is missing or damaged" in caplog.text and "\na," not in (out / CSV_NAME).read_text()
    assert all(entry["skipped"] for entry in segment_folder(segmenter, [given], out, ["liver"], resume=True))


def test_a_run_with_other_prompts_keeps_the_statistics_of_the_first(tmp_path: Path) -> None:
    """The tables hold the masks that are there; what was replaced without being measured is no longer in them."""
    segmenter = Segmenter(Contrast(), MoMEProcessor(spacing=[2, 2, 2], hu_window=[-100, 100]))
    given, out = tmp_path / "in", tmp_path / "out"
    given.mkdir()
    hu = np.random.default_rng(0).normal(0, 60, (8, 8, 8)).astype(np.int16)
    nib.save(nib.Nifti1Image(hu, np.diag([2.0, 2, 2, 1])), given / "a.nii.gz")

    def run(prompt: str, **options: bool) -> tuple[dict[str, float], set[str], dict[str, float]]:
        segment_folder(segmenter, [given], out, [prompt], **options)
        file = out / "a_statistics.json"
        found = json.loads(file.read_text())["structures"] if file.is_file() else {}
        with (out / CSV_NAME).open(newline="") as table:
            names = {row["structure"] for row in csv.DictReader(table)}
        with write_volumes(out).open(newline="") as table:
            volumes = {row["structure"]: float(row["ml"]) for row in csv.DictReader(table)}
        return {name: values["volume_ml"] for name, values in found.items()}, names, volumes

    liver, _, _ = run("liver", statistics=True)
    both, table, volumes = run("spleen", statistics=True)
    assert set(both) == table == {"liver", "spleen"} and both["liver"] == liver["liver"] != both["spleen"]
    assert volumes == pytest.approx(both, abs=0.01)
    with pytest.MonkeyPatch.context() as patch:  # a run that fails changes no mask
        patch.setattr(StudyRun, "segment", lambda *_: (_ for _ in ()).throw(InputError("it fails")))
        assert run("spleen", statistics=True, overwrite=True) == (both, table, volumes)
        assert read_report(out / "report.json")["a"]["status"] == "failed"
    measured, table, volumes = run("spleen", overwrite=True)
    assert set(measured) == table == {"liver"} and set(volumes) == {"liver", "spleen"}
    measured, table, volumes = run("liver", overwrite=True)
    assert measured == {} and table == set() and set(volumes) == {"liver", "spleen"}


def test_statistics_of_another_scan_are_not_replaced(tmp_path: Path) -> None:
    segmenter = Segmenter(Contrast(), MoMEProcessor(spacing=[2, 2, 2], hu_window=[-100, 100]))
    for number, name in enumerate(("one", "two")):
        (tmp_path / name).mkdir()
        hu = np.random.default_rng(number).normal(0, 60, (8, 8, 8)).astype(np.int16)
        nib.save(nib.Nifti1Image(hu, np.diag([2.0, 2, 2, 1])), tmp_path / name / "a.nii.gz")
    segment_folder(segmenter, [tmp_path / "one"], tmp_path / "out", ["liver"], statistics=True)
    before = (tmp_path / "out" / "a_statistics.json").read_bytes()
    with pytest.raises(InputError, match="no report here says that it is of this scan"):
        segment_folder(segmenter, [tmp_path / "two"], tmp_path / "out", ["spleen"], statistics=True)
    assert (tmp_path / "out" / "a_statistics.json").read_bytes() == before


def test_names_that_are_not_utf_8_are_written(tmp_path: Path) -> None:
    """A file name of another encoding, and one of UTF-8 that was read in an ASCII locale."""
    cube = np.ones((2, 2, 2), bool)
    found = {"liver": measured(cube, cube * 40.0, Grid(cube.shape, np.eye(4)))}
    latin, utf8 = os.fsdecode(b"pati\xebnt"), "pati\udcc3\udcabnt"
    for i, name in enumerate((latin, utf8)):
        write_statistics(tmp_path / f"{i}.json", name, found)
    write_table(tmp_path, ["0.json", "1.json"])
    rows = (tmp_path / "statistics.csv").read_text(encoding="utf-8").splitlines()
    assert rows[1].startswith("pati\\xebnt,liver") and rows[2].startswith("patiënt,liver")
