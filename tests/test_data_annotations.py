"""What a folder does not annotate is never background; files that cannot be meant as they are written are refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from test_data_layouts import AFFINE, SHAPE, liver_map, nnunet, save, scan

from mome.data.cache_build import cache_case_folder
from mome.data.layouts import open_cases
from mome.errors import InputError
from mome.labels import load_dataset
from mome.processing import MoMEProcessor
from mome.volumes import Grid


def test_voxels_that_nnunet_ignores_are_no_background(tmp_path: Path) -> None:
    labels = liver_map()
    labels[0, :3, 0] = 3
    folder = nnunet(tmp_path, {"a": labels, "b": liver_map()}, {"background": 0, "liver": [1, 2], "ignore": 3})
    first, second = open_cases(folder, "nnunet")
    with pytest.raises(InputError, match="3 voxels of case 'a' are marked as not annotated") as caught:
        first.read_masks(Grid(SHAPE, AFFINE))
    assert len(str(caught.value).splitlines()) == 3
    assert second.read_masks(Grid(SHAPE, AFFINE))[0].keys() == {"liver"}
    # The file says so, too, where a data set names the other numbers.
    first, second = open_cases(folder, "nnunet", "lits")
    with pytest.raises(InputError, match="3 voxels of case 'a' are marked as not annotated"):
        first.read_masks(Grid(SHAPE, AFFINE))
    assert second.read_masks(Grid(SHAPE, AFFINE))[0].keys() == {"liver", "liver_tumor"}
    (folder / "dataset.json").unlink()
    assert open_cases(folder, "nnunet", "lits")[0].ignored_values == frozenset()


def test_an_empty_list_of_annotated_structures_is_none_of_them(tmp_path: Path) -> None:
    """What is not annotated would be trained as background."""
    nnunet(tmp_path, {"a": liver_map()})
    row = {"image": "imagesTr/a_0000.nii.gz", "labels": "labelsTr/a.nii.gz"}

    def annotated(**values: object) -> tuple[str, ...]:
        (tmp_path / "list.json").write_text(json.dumps([{**row, **values}]))
        (case,) = open_cases(tmp_path / "list.json", "manifest", "lits")
        return case.annotated

    assert annotated() == annotated(annotated=None) == load_dataset("lits").annotated
    assert annotated(annotated=[]) == () and annotated(annotated=["liver"]) == ("liver",)
    with pytest.raises(InputError, match="lists 'liver' twice"):
        annotated(annotated=["liver", "liver"])
    with pytest.raises(InputError, match="'case' is a text"):
        annotated(case=["a"])


def test_a_change_of_what_labels_mean_makes_a_new_cache(tmp_path: Path) -> None:
    processor = MoMEProcessor(spacing=(6, 6, 6))
    labels = liver_map()
    folder = nnunet(tmp_path / "data", {"a": labels}, {"background": 0, "liver": 1})

    def built(name: str, layout: str) -> Path:
        return cache_case_folder(tmp_path / "cache", open_cases(folder, layout), name, ["liver"], processor).folder

    before = built("n", "nnunet")
    assert built("n", "nnunet") == before
    nnunet(folder, {"a": labels}, {"background": 0, "liver": 1, "ignore": 2})
    with pytest.raises(InputError, match="marked as not annotated"):
        built("n", "nnunet")
    place = tmp_path / "csv" / "pt_1"
    place.mkdir(parents=True)
    (place / "ct.csv").write_text(",data\n0,1024\n16385,1064\n")
    (place / "Brainstem.csv").write_text(",data\n" + "".join(f"{i},\n" for i in range(500_000, 500_900)))
    folders = []
    for side in ("4", "8"):
        (place / "voxel_dimensions.csv").write_text(f"{side}\n{side}\n4\n")
        cases = open_cases(tmp_path / "csv", "openkbp")
        folders.append(cache_case_folder(tmp_path / "cache", cases, "k", ["brainstem"], processor).folder)
    assert folders[0] != folders[1]


def test_a_tumour_without_its_organ_is_not_the_organ(tmp_path: Path) -> None:
    save(tmp_path / "s1" / "ct.nii.gz", scan())
    save(tmp_path / "s1" / "masks" / "livertumor1.nii.gz", (liver_map() == 2).astype(np.uint8))
    (case,) = open_cases(tmp_path, "masks", "ircadb")
    assert case.annotated == ("liver_tumor",)


@pytest.mark.parametrize(("values", "message"), [((0, 2, 3), "holds several"), ((0, -1), "no negative values")])
def test_a_mask_file_of_several_values_is_refused(tmp_path: Path, values: tuple[int, ...], message: str) -> None:
    array = np.zeros(SHAPE, np.int16)
    for number, value in enumerate(values):
        array[5 * number : 5 * number + 5, 8:20, 5:15] = value
    save(tmp_path / "s1" / "ct.nii.gz", scan())
    save(tmp_path / "s1" / "masks" / "liver.nii.gz", array)
    (case,) = open_cases(tmp_path, "masks")
    with pytest.raises(InputError, match=message) as caught:
        case.read_masks(Grid(SHAPE, AFFINE))
    assert len(str(caught.value).splitlines()) == 3


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"background": 0, "liver": [0, 1]}, "counts the background, 0, to 'liver'"),
        ({"background": 0, "liver": 1, "spleen": 1}, "gives 'liver' and 'spleen' the value 1"),
    ],
)
def test_names_of_dataset_json_that_cannot_be_meant(tmp_path: Path, names: dict, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        open_cases(nnunet(tmp_path, {"a": liver_map()}, names), "nnunet")
    assert len(str(caught.value).splitlines()) == 3


def test_a_table_that_is_none(tmp_path: Path) -> None:
    nnunet(tmp_path, {"a": liver_map()})
    (tmp_path / "list.csv").write_text('image,labels\n"' + "x" * 140_000)
    with pytest.raises(InputError, match="is no table: field larger"):
        open_cases(tmp_path / "list.csv", "manifest", "lits")
    save(tmp_path / "b" / "sub-01" / "ct" / "sub-01_ct.nii.gz", scan())
    labels = tmp_path / "b" / "derivatives" / "manual" / "sub-01" / "sub-01_dseg"
    save(labels.with_suffix(".nii.gz"), liver_map())
    for text, message in (("", "names no structure"), ("9" * 5000 + "\tliver\n", "a whole number")):
        labels.with_suffix(".tsv").write_text("index\tname\n" + text)
        with pytest.raises(InputError, match=message):
            open_cases(tmp_path / "b", "bids")
