"""Evaluation of files: what a name means, and how many masks are held at once."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from mome.errors import InputError
from mome.labels import load_table
from mome.metrics import dice, evaluate_folder, hausdorff95, normalized_surface_dice
from mome.volumes import Grid, write_mask

GRID = Grid((12, 12, 12), np.diag([1.0, 1, 2, 1]))
TABLE = [{"id": 6, "name": "mandible"}, {"id": 7, "name": "larynx"}]


def numbers(shift: int = 0) -> np.ndarray:
    """A map of OpenKBP's mandible and larynx."""
    array = np.zeros(GRID.shape, np.uint8)
    array[2:8, 2:6, 2:6] = 6
    array[2:8, 7:10, 2:6] = 7
    return np.roll(array, shift, 0)


def scored(prediction: Path, reference: Path, **options) -> list[tuple[str, str, float]]:
    return [(s.case, s.structure, s.dice) for s in evaluate_folder(prediction, reference, **options)]


@pytest.mark.parametrize("as_map", [True, False])
def test_one_structure_is_held_at_a_time(tmp_path: Path, as_map: bool) -> None:
    names = load_table().names()[:60]
    grid = Grid((64, 64, 64), np.eye(4))
    array = np.zeros(grid.shape, np.uint8)
    for index in range(len(names)):
        array[:4, :4, index : index + 2] = index + 1
    if as_map:
        table = [{"id": index + 1, "name": name} for index, name in enumerate(names)]
        write_mask(tmp_path / "c.nii.gz", array, grid, labels=table)
    else:
        for index, name in enumerate(names):
            write_mask(tmp_path / f"c_{name}.nii.gz", array == index + 1, grid)
    tracemalloc.start()
    scores = evaluate_folder(tmp_path, tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(scores) == 60 and all(score.dice == 1 for score in scores)
    assert peak < 30 * array.size  # bytes; a mask of bool per structure and side would be 120 × array.size


def test_a_map_is_read_once(tmp_path: Path, monkeypatch) -> None:
    import mome.metrics.files as files

    for side in ("p", "r"):
        write_mask(tmp_path / side / "c.nii.gz", numbers(), GRID, labels=TABLE)
    read, paths = files.read_label_map, []
    monkeypatch.setattr(files, "read_label_map", lambda path: paths.append(path) or read(path))
    assert len(evaluate_folder(tmp_path / "p", tmp_path / "r")) == 2
    assert sorted(paths) == [tmp_path / "p" / "c.nii.gz", tmp_path / "r" / "c.nii.gz"]


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (0.7, 0.9, 5.0)])
@pytest.mark.parametrize("place", ["inside", "edge", "one empty"])
def test_cropping_changes_no_score(tmp_path: Path, spacing: tuple[float, float, float], place: str) -> None:
    rng = np.random.default_rng(0)
    grid = Grid((20, 22, 18), np.diag([*spacing, 1]))
    masks = []
    for name in "pr":
        mask = np.zeros(grid.shape, bool)
        box = (
            (slice(0, 9), slice(14, 22), slice(0, 18)) if place == "edge" else (slice(5, 14), slice(4, 12), slice(6, 9))
        )
        mask[box] = rng.random(mask[box].shape) > 0.4
        masks.append(mask & (place != "one empty" or name == "r"))
        write_mask(tmp_path / name / "c_liver.nii.gz", masks[-1], grid)
    (score,) = evaluate_folder(tmp_path / "p", tmp_path / "r", tolerance=1.0)
    expected = dice(*masks), normalized_surface_dice(*masks, spacing, 1.0), hausdorff95(*masks, spacing)
    assert (score.dice, score.nsd, score.hd95) == pytest.approx(expected, abs=1e-6)  # spacing is float32 in the file


# -- names ---------------------------------------------------------------------------------------------------


def test_an_exact_case_name_wins(tmp_path: Path) -> None:
    for case in ("pt", "pt_2"):
        for side in ("p", "r"):
            write_mask(tmp_path / side / f"{case}.nii.gz", numbers(), GRID)
    listed = scored(tmp_path / "p", tmp_path / "r", dataset="openkbp")
    assert {(case, d) for case, structure, d in listed if structure == "larynx"} == {("pt", 1), ("pt_2", 1)}


def test_a_known_structure_of_a_known_case_wins_over_a_longer_case(tmp_path: Path) -> None:
    for side in ("p", "r"):
        write_mask(tmp_path / side / "pt_kidney_left.nii.gz", numbers() == 6, GRID)
        write_mask(tmp_path / side / "pt_kidney_liver.nii.gz", numbers() == 7, GRID)
    listed = scored(tmp_path / "p", tmp_path / "r")
    assert listed == [("pt", "kidney_left", 1), ("pt_kidney", "liver", 1)]


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("x_liver", "gt_liver", ("gt", "liver")),
        ("x_spleen", "gt_liver", ("gt", "liver")),
        ("x", "gt_liver", ("gt", "liver")),
        ("x_liver", "gt", ("gt", "liver")),
        ("x", "gt", ("gt", "gt")),
    ],
)
def test_two_single_files_are_a_pair(tmp_path: Path, prediction: str, reference: str, expected: tuple) -> None:
    files = tmp_path / "a" / f"{prediction}.nii.gz", tmp_path / "b" / f"{reference}.nii.gz"
    for path in files:
        write_mask(path, numbers() == 6, GRID)
    assert scored(*files) == [(*expected, 1)]


def test_two_single_maps_are_a_pair(tmp_path: Path) -> None:
    guess, truth, mask = (tmp_path / f"{name}.nii.gz" for name in ("x_liver", "gt", "other_larynx"))
    write_mask(guess, numbers(), GRID, labels=TABLE)
    write_mask(truth, numbers(1), GRID)
    write_mask(mask, numbers() == 7, GRID)
    listed = scored(guess, truth, dataset="openkbp", cases=_cases(tmp_path, "gt"))
    assert [row[:2] for row in listed] == [("gt", "larynx"), ("gt", "mandible")] and 0.8 < listed[0][2] < 0.9
    assert scored(guess, mask) == [("other", "larynx", 1)]
    with pytest.raises(InputError, match="no label table"):
        evaluate_folder(guess, truth)  # nothing names the numbers of the reference


def _cases(folder: Path, case: str) -> Path:
    path = folder / "cases.json"
    path.write_text(f'{{"{case}": {{"annotated": ["mandible", "larynx"]}}}}')
    return path


@pytest.mark.parametrize("table", [True, False])
def test_a_map_may_be_called_like_a_structure(tmp_path: Path, table: bool) -> None:
    for side, shift in (("p", 1), ("r", 0)):
        labels = TABLE if table else []
        write_mask(tmp_path / side / "scan_brain.nii.gz", numbers(shift), GRID, labels=labels)
    options = {} if table else {"dataset": "openkbp", "cases": _cases(tmp_path, "scan_brain")}
    for places in ((tmp_path / "p", tmp_path / "r"), [tmp_path / s / "scan_brain.nii.gz" for s in "pr"]):
        listed = scored(*places, **options)
        assert [row[:2] for row in listed] == [("scan_brain", "larynx"), ("scan_brain", "mandible")]
        assert all(0.8 < row[2] < 0.9 for row in listed)


def test_a_map_without_names_is_not_taken_for_a_mask(tmp_path: Path) -> None:
    for side in ("p", "r"):
        write_mask(tmp_path / side / "scan_brain.nii.gz", numbers(), GRID)
    with pytest.raises(InputError, match="map without a label table") as caught:
        evaluate_folder(tmp_path / "p", tmp_path / "r")
    assert len(str(caught.value).splitlines()) == 3


def test_masks_with_their_own_table_stay_masks(tmp_path: Path) -> None:
    """As `mome segment` writes them: id 1, and the id of the class table beside it."""
    for side in ("p", "r"):
        for name in ("brain", "odd lesion"):
            file = tmp_path / side / f"scan_{name.replace(' ', '_')}.nii.gz"
            table = [{"id": 1, "name": name, "table_id": 90}]
            write_mask(file, numbers() == 6, GRID, labels=table)
    (tmp_path / "r" / "scan_odd_lesion.nii.gz").unlink()
    assert scored(tmp_path / "p", tmp_path / "r", dataset="openkbp") == [("scan", "brain", 1)]


def test_masks_of_free_text_are_scored_by_their_texts(tmp_path: Path) -> None:
    """Their files have no spaces; the table in the header has the text."""
    for folder in ("p", "r"):
        (tmp_path / folder).mkdir()
        table = [{"id": 1, "table_id": 137, "name": "lung nodule"}]
        path = tmp_path / folder / "c_lung_nodule.nii.gz"
        write_mask(path, (numbers() == 6).astype(np.uint8), GRID, labels=table)
    found = scored(tmp_path / "p", tmp_path / "r", structures=["lung nodule"], dataset="openkbp")
    assert found == [("c", "lung nodule", 1.0)]


def test_a_mask_beside_a_map_of_the_same_structure_is_scored_with_a_warning(tmp_path: Path, caplog) -> None:
    """A folder may hold the mask of one run and the map of another; the mask was scored without a word."""
    table = [{"id": 1, "name": "liver"}, {"id": 2, "name": "spleen"}]
    grid = Grid((8, 8, 8), np.diag([2.0, 2, 2, 1]))
    values = np.zeros(grid.shape, np.uint8)
    values[1:4, 2:6, 2:6], values[5:7, 2:6, 2:6] = 1, 2
    for folder in ("reference", "prediction"):
        write_mask(tmp_path / folder / "a.nii.gz", values, grid, labels=table)
    write_mask(tmp_path / "prediction" / "a_liver.nii.gz", (values == 2).astype(np.uint8), grid)
    found = scored(tmp_path / "prediction", tmp_path / "reference")
    assert [(structure, dice) for _, structure, dice in found] == [("liver", 0.0), ("spleen", 1.0)]
    said = "case 'a': the prediction has both a mask and a label map of liver: the mask is scored"
    assert [record.getMessage() for record in caplog.records] == [said]
    caplog.clear()
    scored(tmp_path / "prediction", tmp_path / "reference", structures=["spleen"])
    assert not caplog.records


def test_distances_on_sheared_axes_are_said_to_be_approximate(tmp_path: Path, caplog) -> None:
    """Distances are computed from the voxel sizes alone; of a tilted scan they were wrong without a word."""
    shear = np.eye(4)
    shear[1, 2] = 0.5
    for case, affine in (("a", GRID.affine), ("b", GRID.affine @ shear)):
        for folder in ("reference", "prediction"):
            values = (numbers() == 6).astype(np.uint8)
            write_mask(tmp_path / folder / f"{case}_mandible.nii.gz", values, Grid(GRID.shape, affine))
    assert [dice for *_, dice in scored(tmp_path / "prediction", tmp_path / "reference")] == [1, 1]
    (record,) = caplog.records
    assert "axes of 1 cases are not at right angles" in record.getMessage() and record.getMessage().endswith(": b")


def test_a_broken_file_that_is_not_asked_for_is_left_alone(tmp_path: Path) -> None:
    for side in ("p", "r"):
        write_mask(tmp_path / side / "scan_brain.nii.gz", numbers() == 6, GRID)
    whole = (tmp_path / "p" / "scan_brain.nii.gz").read_bytes()
    for name, content in (("spleen", whole[:60]), ("liver", b""), ("aorta", b"text")):
        (tmp_path / "p" / f"scan_{name}.nii.gz").write_bytes(content)
    for dataset in (None, "openkbp"):
        assert scored(tmp_path / "p", tmp_path / "r", dataset=dataset) == [("scan", "brain", 1)]


def test_an_organ_includes_its_tumour_and_sides_are_told_apart_by_the_data_set(tmp_path: Path) -> None:
    """References with the numbers of LiTS and KiTS19; the predictions are masks as `mome segment` writes them."""
    organ = np.zeros(GRID.shape, np.uint8)
    organ[1:5, 2:8, 2:8] = 1
    organ[2:4, 3:5, 3:5] = 2
    write_mask(tmp_path / "lits" / "c.nii.gz", organ, GRID)
    write_mask(tmp_path / "p" / "c_liver.nii.gz", organ > 0, GRID)
    write_mask(tmp_path / "p" / "c_liver_tumor.nii.gz", organ == 2, GRID)
    assert scored(tmp_path / "p", tmp_path / "lits", dataset="lits") == [
        ("c", "liver", 1.0),
        ("c", "liver_tumor", 1.0),
    ]
    kidneys = organ.copy()
    kidneys[8:11, 2:8, 2:8] = 1  # GRID is RAS, so that the higher indices are the patient's right
    write_mask(tmp_path / "kits" / "c.nii.gz", kidneys, GRID)
    right = np.arange(12)[:, None, None] >= 6
    write_mask(tmp_path / "q" / "c_kidney_left.nii.gz", (kidneys > 0) & ~right, GRID)
    write_mask(tmp_path / "q" / "c_kidney_right.nii.gz", (kidneys > 0) & right, GRID)
    write_mask(tmp_path / "q" / "c_kidney_tumor.nii.gz", kidneys == 2, GRID)
    assert [dice for *_, dice in scored(tmp_path / "q", tmp_path / "kits", dataset="kits19")] == [1.0, 1.0, 1.0]
    write_mask(tmp_path / "kits" / "c.nii.gz", organ, GRID)  # one kidney only: its side is unknown
    with pytest.raises(InputError, match="kidney_left: left and right cannot be told apart") as caught:
        evaluate_folder(tmp_path / "q", tmp_path / "kits", dataset="kits19")
    assert "c.nii.gz" in str(caught.value)
    assert [s.dice for s in evaluate_folder(tmp_path / "q", tmp_path / "kits", dataset="kits19",
                                            structures="kidney_tumor")] == [1.0]  # fmt: skip
