"""Labels, images and caches that cannot be trained on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hostile_helpers import SHORT, train_in
from training_runs import write_recipe

from mome.cli.main import main


def relabel(folder: Path, name: str, edit) -> None:
    path = folder / "data" / "labels" / f"{name}.nii.gz"
    image = nib.load(path)
    nib.save(nib.Nifti1Image(edit(np.asanyarray(image.dataobj)), image.affine), path)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda a: np.full(a.shape, 200, np.uint8), "no structure annotated in case 'c1' has a voxel"),
        (lambda a: np.zeros(a.shape, np.uint8), "no structure annotated in case 'c1' has a voxel"),
        (lambda a: np.full(a.shape, 0.5, np.float32), "c1.nii.gz"),
        (lambda a: np.full(a.shape, np.nan, np.float32), "c1.nii.gz"),
        (lambda a: np.full(a.shape, np.inf, np.float32), "c1.nii.gz"),
        (lambda a: np.full(a.shape, -1, np.int16), "c1.nii.gz"),
        (lambda a: a.astype(np.float32) + 0.3, "c1.nii.gz"),
    ],
)
def test_labels_that_are_none(tmp_path: Path, capsys, edit, words: str) -> None:
    write_recipe(tmp_path)
    relabel(tmp_path, "c1", edit)
    train_in(tmp_path, capsys, 2, words, *SHORT)
    assert not (tmp_path / "r").exists() and not list((tmp_path / "cache").iterdir())


def test_odd_labels_are_named(tmp_path: Path, capsys) -> None:
    write_recipe(tmp_path)
    relabel(tmp_path, "c0", lambda a: (a + 0.0004).astype(np.float32))  # as after a slope
    relabel(tmp_path, "c1", lambda a: np.where(a == 6, 77, a).astype(np.uint8))
    for _ in range(2):  # also when the cache is there already
        printed = train_in(tmp_path, capsys, 0, "77", *SHORT, "--restart")
        assert "'c1'" in printed and "mandible" in printed and "'c0'" not in printed


def test_a_case_without_trained_structures_is_named(tmp_path: Path, capsys) -> None:
    write_recipe(tmp_path)
    listed = {"c0": ["parotid_gland_left"], "c1": [], "c2": ["parotid_gland_left"]}
    (tmp_path / "data" / "cases.json").write_text(json.dumps({k: {"annotated": v} for k, v in listed.items()}))
    printed = train_in(tmp_path, capsys, 0, "case 'c1': none of the trained structures is annotated", *SHORT)
    assert "no training case annotates parotid_gland_right, mandible" in " ".join(printed.split())


@pytest.mark.parametrize("value", [np.nan, 0.0, -1024.0, np.inf])
def test_an_image_that_shows_nothing(tmp_path: Path, capsys, value: float) -> None:
    write_recipe(tmp_path)
    path = tmp_path / "data" / "images" / "c2.nii.gz"
    image = nib.load(path)
    nib.save(nib.Nifti1Image(np.full(image.shape, value, np.float32), image.affine), path)
    assert str(path) in train_in(tmp_path, capsys, 2, "c2", *SHORT)


def test_a_validation_without_a_case(tmp_path: Path, capsys) -> None:
    write_recipe(tmp_path)
    shutil.copytree(tmp_path / "data", tmp_path / "val")
    validation = f"validation=[{{kind: cases, folder: {tmp_path / 'val'}, dataset: openkbp}}]"
    arguments = (*SHORT, validation, "train.validate_every=2")
    for cases, words in (({}, "lists no case"), ({"c0": {"annotated": []}}, "no validation case annotates")):
        (tmp_path / "val" / "cases.json").write_text(json.dumps(cases))
        train_in(tmp_path, capsys, 2, words, *arguments)
    train_in(tmp_path, capsys, 2, "there are no validation cases", *SHORT, "validation=[]", "train.validate_every=2")


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.wide)])
@pytest.mark.parametrize("damage", ["zeroed", "truncated", "missing", "another shape", "no array", "pickle"])
@pytest.mark.parametrize("kind", ["volume", "labels"])
def test_a_damaged_cache_is_noticed(tmp_path: Path, capsys, kind: str, damage: str, workers: int) -> None:
    if workers and kind == "labels":
        pytest.skip("the same path as for volumes")
    write_recipe(tmp_path)
    train_in(tmp_path, capsys, 0, "", *SHORT, "train.steps=1")
    for path in tmp_path.glob(f"cache/*/*.{kind}.npy"):
        array = np.load(path)
        if damage == "missing":
            path.unlink()
        elif damage == "truncated":
            path.write_bytes(path.read_bytes()[:-100])
        elif damage == "no array":
            path.write_bytes(b"nothing")
        elif damage == "pickle":
            np.save(path, np.array([{}], dtype=object), allow_pickle=True)
        else:
            np.save(path, np.zeros_like(array) if damage == "zeroed" else array[:-1])
    printed = train_in(tmp_path, capsys, 2, f".{kind}.npy", *SHORT, f"train.workers={workers}", "--restart")
    assert "remove this folder" in printed
    shutil.rmtree(tmp_path / "cache")
    train_in(tmp_path, capsys, 0, "", *SHORT, "train.steps=1", "--restart")


def test_an_index_of_another_form(tmp_path: Path, capsys) -> None:
    write_recipe(tmp_path)
    train_in(tmp_path, capsys, 0, "", *SHORT, "train.steps=1")
    (path,) = tmp_path.glob("cache/*/index.json")
    whole = json.loads(path.read_text())
    bad: list[object] = [[], None, {}, {"cases": {}}, {"cases": [1]}]
    for key, value in (
        ("file", "../00000"), ("file", 3), ("annotated", "mandible"), ("annotated", ["liver"]), ("shape", [1]),
        ("checksums", None), ("checksums", {}), ("notes", None), ("name", 1),
    ):  # fmt: skip
        bad.append({**whole, "cases": [{**whole["cases"][0], key: value}]})
    for content in bad:
        path.write_text(json.dumps(content))
        assert "index.json" in train_in(tmp_path, capsys, 2, "", *SHORT, "train.steps=1")
    path.write_text(json.dumps(whole)[:-20])
    train_in(tmp_path, capsys, 2, "index.json", *SHORT, "train.steps=1")


def test_what_the_reader_says_of_a_scan_is_said(tmp_path: Path, capsys) -> None:
    write_recipe(tmp_path)
    path = tmp_path / "data" / "images" / "c1.nii.gz"
    image = nib.load(path)
    hu = np.asanyarray(image.dataobj).astype(np.float32)
    hu[2, 2, 2] = np.inf
    nib.save(nib.Nifti1Image(hu, image.affine), path)
    train_in(tmp_path, capsys, 0, "case 'c1': 1 voxels were NaN or infinite", *SHORT)


def test_a_patient_in_two_splits_is_refused(tmp_path: Path, capsys) -> None:
    write_recipe(tmp_path)
    rows = ["case,image,labels,annotated,patient,split"]
    for i, (split, patient) in enumerate((("train", "p0"), ("val", "p1"), ("val", "p0"))):
        rows.append(
            f"n{i},data/images/c{i}.nii.gz,data/labels/c{i}.nii.gz,mandible parotid_gland_left,{patient},{split}"
        )
    (tmp_path / "list.csv").write_text("\n".join(rows) + "\n")
    source = f"{{kind: cases, folder: {tmp_path / 'list.csv'}, layout: manifest, dataset: openkbp, part: train}}"
    printed = train_in(
        tmp_path, capsys, 2, "patient 'p0' is in train and, with case 'n2', in val", f"sources=[{source}]"
    )
    assert "c2.nii.gz" in printed and "mome data check" in printed and not (tmp_path / "cache").exists()
    arguments = ["prepare", str(tmp_path / "list.csv"), "--layout", "manifest", "--dataset", "openkbp"]
    assert main(["data", *arguments, "-o", str(tmp_path / "prepared")]) == 2
    assert "patient 'p0' is in train" in capsys.readouterr().err and not (tmp_path / "prepared").exists()
