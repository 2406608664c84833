"""Statistics of masks beside plain numpy and scipy, and their files in a folder run."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage
from stand_in_models import Contrast, Threshold

from mome.errors import InputError
from mome.inference import Segmenter, segment_folder
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


@pytest.fixture
def folder(tmp_path: Path) -> MeasuredFolder:
    return MeasuredFolder(tmp_path)


class MeasuredFolder:
    """Runs into one folder, on two scans of the same name."""

    def __init__(self, path: Path) -> None:
        self.path, self.out = path, path / "out"
        for number, name in enumerate(("one", "two")):
            (path / name).mkdir()
            hu = np.random.default_rng(number).normal(0, 60, (8, 8, 8)).astype(np.int16)
            nib.save(nib.Nifti1Image(hu, np.diag([2.0, 2, 2, 1])), path / name / "a.nii.gz")

    def run(self, prompt: str, scan: str = "one", level: float = 0.4, **options: Any) -> dict[str, Any]:
        model = Contrast(thresholds=(level, level + 0.2))
        segmenter = Segmenter(model, MoMEProcessor(spacing=[2, 2, 2], hu_window=[-100, 100]))
        return segment_folder(segmenter, [self.path / scan], self.out, [prompt], **options)[0]

    def measured(self) -> dict[str, int]:
        """Voxels of the structures in the file of the scan and in the table, all of which are those of the masks."""
        file = self.out / "a_statistics.json"
        structures = json.loads(file.read_text())["structures"] if file.is_file() else {}
        found = {name: values["voxels"] for name, values in structures.items()}
        with (self.out / CSV_NAME).open(newline="") as table:
            assert {row["structure"]: int(row["voxels"]) for row in csv.DictReader(table)} == found
        for name, voxels in found.items():
            assert np.count_nonzero(nib.load(self.out / f"a_{name}.nii.gz").get_fdata()) == voxels
        return found

    def volumes(self) -> set[str]:
        with write_volumes(self.out).open(newline="") as table:
            return {row["structure"] for row in csv.DictReader(table)}


def test_a_run_with_other_prompts_keeps_the_statistics_of_the_first(folder: MeasuredFolder) -> None:
    """Masks that were replaced without being measured are no longer in the tables."""
    folder.run("liver", statistics=True)
    liver = folder.measured()
    folder.run("spleen", statistics=True)
    both = folder.measured()
    assert set(both) == folder.volumes() == {"liver", "spleen"} and both["liver"] == liver["liver"]
    with pytest.MonkeyPatch.context() as patch:  # a run that fails changes no mask
        patch.setattr(StudyRun, "segment", lambda *_: (_ for _ in ()).throw(InputError("it fails")))
        assert folder.run("spleen", statistics=True, overwrite=True)["status"] == "failed"
    assert folder.measured() == both and folder.volumes() == {"liver", "spleen"}
    folder.run("spleen", overwrite=True)  # the same mask again
    assert folder.measured() == both
    folder.run("spleen", level=0.5, overwrite=True)
    assert folder.measured() == liver and folder.volumes() == {"liver", "spleen"}
    folder.run("liver", level=0.5, overwrite=True)
    assert folder.measured() == {} and not (folder.out / "a_statistics.json").exists()


def test_statistics_of_another_scan_are_not_replaced(folder: MeasuredFolder) -> None:
    folder.run("liver", statistics=True)
    before = folder.measured()
    with pytest.raises(InputError, match="no report here says that it is of this scan"):
        folder.run("spleen", "two", statistics=True)
    assert folder.measured() == before
    folder.run("liver", "two", overwrite=True)
    assert folder.measured() == {}
    folder.run("spleen", "two", statistics=True, overwrite=True)
    assert set(folder.measured()) == {"spleen"}


def test_a_killed_run_leaves_no_numbers_of_masks_that_it_replaced(folder: MeasuredFolder) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    folder.run("liver", statistics=True)
    for scan, statistics in (("one", False), ("two", True)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(StudyRun, "_write_statistics", killed)
            with pytest.raises(KeyboardInterrupt):
                folder.run("liver", scan, level=0.6, overwrite=True, statistics=statistics)
        folder.run("spleen", scan, level=0.6, resume=True, statistics=True)
        assert set(folder.measured()) == {"spleen"}
        folder.run("liver", scan, level=0.6, resume=True, statistics=True)
        assert set(folder.measured()) == {"liver", "spleen"}


def test_the_table_follows_what_is_in_the_folder(folder: MeasuredFolder, caplog: pytest.LogCaptureFixture) -> None:
    """A file that was removed or damaged, a mask that was changed, and a file of an earlier version."""
    file = folder.out / "a_statistics.json"
    folder.run("liver", statistics=True)
    file.unlink()
    folder.run("spleen")
    assert folder.measured() == {}
    folder.run("liver", statistics=True, overwrite=True)
    content = json.loads(file.read_text())
    content["structures"]["liver"] = {}
    file.write_text(json.dumps(content))
    folder.run("spleen", statistics=True, overwrite=True)
    assert "spleen" in (folder.out / CSV_NAME).read_text() and "has no row of liver" in caplog.text
    folder.run("liver", statistics=True, overwrite=True)
    mask = folder.out / "a_spleen.nii.gz"
    nib.save(nib.Nifti1Image(np.ones((8, 8, 8), np.uint8), np.diag([2.0, 2, 2, 1])), mask)
    folder.run("liver", statistics=True, overwrite=True)
    assert set(folder.measured()) == {"liver"}
    content = json.loads(file.read_text())
    file.write_text(json.dumps({"study": "a", "structures": content["structures"]}))
    folder.run("spleen", statistics=True, overwrite=True)
    assert set(folder.measured()) == {"spleen"} and "is of an earlier version" in caplog.text


def test_a_map_has_the_statistics_of_its_own_structures(folder: MeasuredFolder) -> None:
    folder.run("liver", statistics=True, multilabel=True)
    assert "liver" in (folder.out / CSV_NAME).read_text()
    folder.run("liver", level=0.5, multilabel=True, overwrite=True)
    assert (folder.out / CSV_NAME).read_text().count("\n") == 1


def test_names_that_are_not_utf_8_are_written(tmp_path: Path) -> None:
    """A file name of another encoding, and one of UTF-8 that was read in an ASCII locale."""
    cube = np.ones((2, 2, 2), bool)
    found = {"liver": measured(cube, cube * 40.0, Grid(cube.shape, np.eye(4)))}
    mask = tmp_path / "liver.nii.gz"
    mask.touch()
    latin, utf8 = os.fsdecode(b"pati\xebnt"), "pati\udcc3\udcabnt"
    for i, name in enumerate((latin, utf8)):
        write_statistics(tmp_path / f"{i}.json", name, {}, found, {"liver": mask})
    write_table(tmp_path, ["0.json", "1.json"])
    rows = (tmp_path / "statistics.csv").read_text(encoding="utf-8").splitlines()
    assert rows[1].startswith("pati\\xebnt,liver") and rows[2].startswith("patiënt,liver")
