"""Layouts of data folders, the rules of data sets, and the check of a folder."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from mome.cli.main import main
from mome.data.cache_build import cache_case_folder
from mome.data.check import check_cases
from mome.data.layouts import LAYOUTS, open_cases
from mome.errors import InputError
from mome.labels import dataset_names, load_dataset, load_table
from mome.labels.dataset import StructureRule, parse_dataset
from mome.processing import MoMEProcessor
from mome.volumes import Grid
from mome.volumes.sides import split_sides

AFFINE = np.diag([3.0, 3.0, 4.0, 1.0])
SHAPE = (40, 30, 20)


def save(path: Path, array: np.ndarray, affine: np.ndarray = AFFINE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, affine), path)
    return path


def scan(seed: int = 0) -> np.ndarray:
    """A body in air, with fat, soft tissue and noise, so that its values are plausible HU."""
    rng = np.random.default_rng(seed)
    hu = np.full(SHAPE, -1000.0)
    hu[4:-4, 4:-4] = -90
    hu[7:-7, 7:-7] = 40
    return (hu + rng.normal(0, 10, SHAPE)).astype(np.int16)


def liver_map() -> np.ndarray:
    """Liver 1 with a tumour 2 inside."""
    labels = np.zeros(SHAPE, np.uint8)
    labels[22:32, 10:20, 5:15] = 1
    labels[25:28, 13:16, 8:11] = 2
    return labels


def kidneys(touch: bool = False) -> np.ndarray:
    """Both kidneys as 1, a tumour 2 in the patient's right one. On this grid, larger i is further to the right."""
    labels = np.zeros(SHAPE, np.uint8)
    labels[8:14, 10:18, 4:14] = 1
    labels[26:32, 10:18, 4:14] = 1
    labels[28:30, 12:14, 6:8] = 2
    if touch:
        labels[13:27, 12:14, 8:10] = 1
    return labels


def nnunet(folder: Path, labels: dict[str, np.ndarray], names: dict[str, object] | None = None) -> Path:
    for number, (case, array) in enumerate(labels.items()):
        save(folder / "imagesTr" / f"{case}_0000.nii.gz", scan(number))
        save(folder / "labelsTr" / f"{case}.nii.gz", array)
    if names is not None:
        (folder / "dataset.json").write_text(json.dumps({"labels": names, "channel_names": {"0": "CT"}}))
    return folder


# -- data sets --------------------------------------------------------------------------------------------------------


def test_every_data_set_is_whole() -> None:
    """Each names its citation, licence and page; its layout exists; pairs are complete."""
    for name in dataset_names():
        found = load_dataset(name)
        assert found.layout in LAYOUTS.names() and found.get.startswith("http") and found.citation
        sided = [structure for structure, rule in found.structures.items() if rule.side]
        assert all(load_table()[structure].mirror in sided for structure in sided)
    wanted = "btcv pancreas_ct chaos_ct lits kits19 kits23 word abdomenct_1k amos msd_liver msd_lung msd_pancreas"
    wanted += " msd_hepatic_vessel msd_spleen msd_colon ct_org abdomenct_12organ totalsegmentator_v2 flare22 ircadb"
    assert set(wanted.split()) <= set(dataset_names())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"structures": {"livr": 1}}, "'livr', did you mean 'liver'"),
        ({"structurs": {"liver": 1}}, "key 'structurs', did you mean 'structures'"),
        ({"structures": {"liver": 0}}, "positive whole number"),
        ({"structures": {"liver": "one"}}, "positive whole number"),
        ({"structures": {"kidney_left": {"values": [1], "side": "right"}}}, "the side that its name ends with"),
        ({"licence": None}, "no text 'licence'"),
        ({"structures": {}}, "lists no structure"),
    ],
)
def test_a_faulty_data_set_is_refused(change: dict, message: str) -> None:
    text = dict.fromkeys(("name", "citation", "licence", "get", "layout", "source"), "x")
    assert parse_dataset({**text, "structures": {"liver": [1, 2]}}, "x.yaml").values == {1, 2}
    with pytest.raises(ValueError, match=message):
        parse_dataset({**text, "structures": {"liver": 1}, **change}, "x.yaml")


# -- sides ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flip", [False, True])
def test_sides_follow_the_patient_and_not_the_array(flip: bool) -> None:
    mask, affine = kidneys() > 0, AFFINE.copy()
    if flip:
        mask, affine = mask[::-1], affine @ np.diag([-1, 1, 1, 1.0])
        affine[0, 3] = AFFINE[0, 0] * (SHAPE[0] - 1)
    sides = split_sides(mask, affine)
    right_i = np.argwhere(sides["right"])[:, 0].mean()
    assert (right_i < SHAPE[0] / 2) == flip
    assert (sides["left"] ^ sides["right"]).sum() == mask.sum() and not (sides["left"] & sides["right"]).any()


def test_sides_that_cannot_be_told_apart_are_refused() -> None:
    one = kidneys() > 0
    one[:20] = False
    above = np.zeros(SHAPE, bool)
    above[10:16, 10:16, 2:6] = above[10:16, 10:16, 12:16] = True
    for mask in (kidneys(touch=True) > 0, one, above):
        with pytest.raises(InputError, match="left and right cannot be told apart"):
            split_sides(mask, AFFINE)
    assert not split_sides(np.zeros(SHAPE, bool), AFFINE)["left"].any()


# -- layouts ----------------------------------------------------------------------------------------------------------


def test_an_organ_absorbs_its_tumour_and_sides_are_split(tmp_path: Path) -> None:
    grid = Grid(SHAPE, AFFINE)
    (case,) = open_cases(nnunet(tmp_path / "lits", {"a": liver_map()}), "nnunet", "lits")
    masks, notes = case.read_masks(grid)
    assert masks["liver"].sum() == 1000 and masks["liver_tumor"].sum() == 27 and not notes
    (case,) = open_cases(nnunet(tmp_path / "kits", {"a": kidneys()}), "nnunet", "kits19")
    masks, notes = case.read_masks(grid)
    assert masks["kidney_right"].sum() == masks["kidney_left"].sum() == 480 and masks["kidney_tumor"].sum() == 8
    assert (masks["kidney_right"] & masks["kidney_tumor"]).sum() == 8 and not notes
    (case,) = open_cases(nnunet(tmp_path / "touch", {"a": kidneys(touch=True)}), "nnunet", "kits19")
    masks, notes = case.read_masks(grid)
    assert set(masks) == {"kidney_tumor"} and len(notes) == 2 and "counts as not annotated" in notes[0]


def test_dataset_json_names_structures_in_either_direction(tmp_path: Path) -> None:
    ours = nnunet(tmp_path / "a", {"x": liver_map()}, {"background": 0, "liver": [1, 2], "liver tumor": 2})
    (case,) = open_cases(ours, "nnunet")
    assert case.rules == {"liver": StructureRule((1, 2)), "liver_tumor": StructureRule((2,))}
    decathlon = nnunet(tmp_path / "b", {"x": liver_map()}, {"0": "background", "1": "liver", "2": "cancer"})
    with pytest.raises(InputError, match="'cancer' is no structure of the class table"):
        open_cases(decathlon, "nnunet")
    (decathlon / "imagesTr" / "x_0000.nii.gz").rename(decathlon / "imagesTr" / "x.nii.gz")
    (case,) = open_cases(decathlon, "nnunet", "msd_liver")
    assert case.annotated == ("liver", "liver_tumor") and case.image.name == "x.nii.gz"
    (decathlon / "imagesTr" / "x.nii.gz").unlink()
    with pytest.raises(InputError, match="case 'x' has a label map and no scan"):
        open_cases(decathlon, "nnunet", "msd_liver")


def test_masks_per_structure(tmp_path: Path) -> None:
    save(tmp_path / "s1" / "ct.nii.gz", scan())
    save(tmp_path / "s1" / "segmentations" / "liver.nii.gz", (liver_map() == 1).astype(np.uint8))
    save(tmp_path / "s1" / "segmentations" / "face.nii.gz", np.zeros(SHAPE, np.uint8))
    (case,) = open_cases(tmp_path, "masks", "totalsegmentator_v2")
    assert case.annotated == ("liver",) and case.read_masks(Grid(SHAPE, AFFINE))[0]["liver"].sum() == 973
    save(tmp_path / "s1" / "segmentations" / "livertumor01.nii.gz", (liver_map() == 2).astype(np.uint8))
    (case,) = open_cases(tmp_path, "masks", "ircadb")
    assert case.read_masks(Grid(SHAPE, AFFINE))[0]["liver"].sum() == 1000


def test_masks_may_have_other_words_for_their_structures(tmp_path: Path) -> None:
    save(tmp_path / "s1" / "ct.nii.gz", scan())
    for name in ("Liver", "left_kidney", "bladder", "vertebrae_L1", "Tumor", "face"):
        save(tmp_path / "s1" / "masks" / f"{name}.nii.gz", (liver_map() == 1).astype(np.uint8))
    (case,) = open_cases(tmp_path, "masks")
    assert sorted(case.annotated) == ["kidney_left", "liver", "urinary_bladder", "vertebrae_L1"]
    save(tmp_path / "s1" / "masks" / "urinary_bladder.nii.gz", liver_map())  # twice, but not of this data set
    assert open_cases(tmp_path, "masks", "lits")[0].annotated == ("liver",)
    save(tmp_path / "s1" / "masks" / "liver.nii.gz", (liver_map() == 1).astype(np.uint8))
    with pytest.raises(InputError, match="two masks are of 'liver'"):
        open_cases(tmp_path, "masks")


def test_bids(tmp_path: Path) -> None:
    save(tmp_path / "sub-01" / "ct" / "sub-01_ct.nii.gz", scan())
    save(tmp_path / "derivatives" / "manual" / "sub-01" / "ct" / "sub-01_space-orig_dseg.nii.gz", liver_map())
    with pytest.raises(InputError, match="no table names the numbers"):
        open_cases(tmp_path, "bids")
    (tmp_path / "derivatives" / "manual" / "dseg.tsv").write_text("index\tname\n1\tLiver\n2\tliver tumor\n")
    (case,) = open_cases(tmp_path, "bids")
    assert case.annotated == ("liver", "liver_tumor") and case.patient == "sub-01"
    (tmp_path / "derivatives" / "other").mkdir()
    with pytest.raises(InputError, match="pipelines: manual, other"):
        open_cases(tmp_path, "bids")
    assert len(open_cases(tmp_path, "bids(pipeline='manual')", "lits")) == 1


def test_bids_files_that_cannot_be_told_apart_are_refused(tmp_path: Path) -> None:
    for name in ("sub-01_ct", "sub-01_ce-venous_ct"):
        save(tmp_path / "sub-01" / "ct" / f"{name}.nii.gz", scan())
    labels = tmp_path / "derivatives" / "manual" / "sub-01" / "sub-01_dseg.nii.gz"
    save(labels, liver_map())
    labels.with_name("sub-01_dseg.tsv").write_text("index\tname\n1\tliver\n3\tLiver\n")
    with pytest.raises(InputError, match="two files differ by none of sub, ses, acq and run: sub-01_ce-venous_ct"):
        open_cases(tmp_path, "bids")
    (tmp_path / "sub-01" / "ct" / "sub-01_ce-venous_ct.nii.gz").unlink()
    with pytest.raises(InputError, match="the table names liver twice"):
        open_cases(tmp_path, "bids")
    save(labels.with_name("sub-01_desc-second_dseg.nii.gz"), liver_map())
    with pytest.raises(InputError, match="two files differ by none"):
        open_cases(tmp_path, "bids")


@pytest.mark.parametrize("value", [1.5, True, [], "one", [1, None]])
def test_a_value_of_dataset_json_that_is_no_whole_number_is_refused(tmp_path: Path, value: object) -> None:
    with pytest.raises(InputError, match="dataset.json gives 'liver' the value"):
        open_cases(nnunet(tmp_path, {"x": liver_map()}, {"background": 0, "liver": value}), "nnunet")


def test_a_key_that_stands_twice_is_refused(tmp_path: Path) -> None:
    folder = nnunet(tmp_path, {"x": liver_map()})
    (folder / "dataset.json").write_text('{"labels": {"liver": 1, "liver": 2}}')
    with pytest.raises(InputError, match="dataset.json has the key 'liver' twice"):
        open_cases(folder, "nnunet")
    (folder / "list.json").write_text('[{"image": "a", "image": "b"}]')
    with pytest.raises(InputError, match="a case has the key 'image' twice"):
        open_cases(folder / "list.json", "manifest", "lits")


def test_openkbp_csv(tmp_path: Path) -> None:
    place = tmp_path / "pt_7"
    place.mkdir()
    (place / "ct.csv").write_text(",data\n0,1024\n16385,1064\n")
    (place / "voxel_dimensions.csv").write_text("3.9\n3.8\n2.5\n")
    (place / "Brainstem.csv").write_text(",data\n16385,\n")
    (case,) = open_cases(tmp_path, "openkbp")
    volume = case.read_image()
    assert volume.array[0, 0, 0] == 0 and volume.array[1, 0, 1] == 40 and volume.array[5, 5, 5] == -1024
    assert volume.grid.orientation == "PLI" and np.allclose(volume.grid.spacing, (3.9, 3.8, 2.5))
    masks, _ = case.read_masks(volume.grid)
    assert masks["brainstem"][1, 0, 1] and masks["brainstem"].sum() == 1
    (place / "Brainstem.csv").write_text(",data\n99999999,\n")
    with pytest.raises(InputError, match="outside a volume of 128"):
        case.read_masks(volume.grid)
    (place / "Brainstem.csv").write_text(",data\ninf,\n")
    with pytest.raises(InputError, match="cannot be read"):
        case.read_masks(volume.grid)
    (place / "ct.csv").write_text(",data\n0,nan\n")
    with pytest.raises(InputError, match="NaN or infinite"):
        case.read_image()


@pytest.mark.parametrize("orientation", ["LAS", "IPR"])
def test_labels_whose_voxels_are_stored_in_another_order(tmp_path: Path, orientation: str) -> None:
    """Such a pair was refused as lying on different grids; nothing has to be resampled for it."""
    folder = nnunet(tmp_path, {"a": liver_map()})
    (case,) = open_cases(folder, "nnunet", "lits")
    grid = case.read_image().grid
    expected, _ = case.read_masks(grid)
    path = folder / "labelsTr" / "a.nii.gz"
    image = nib.load(path)
    there = nib.orientations.axcodes2ornt(tuple(orientation))
    turned = image.as_reoriented(nib.orientations.ornt_transform(nib.io_orientation(image.affine), there))
    assert "".join(nib.aff2axcodes(turned.affine)) == orientation
    nib.save(turned, path)
    found, _ = case.read_masks(grid)
    assert all(np.array_equal(found[name], mask) and mask.any() for name, mask in expected.items())


def test_manifest(tmp_path: Path) -> None:
    nnunet(tmp_path, {"a": liver_map(), "b": liver_map()})
    rows = ["image,labels,annotated,patient,split"]
    rows += [f"imagesTr/{c}_0000.nii.gz,labelsTr/{c}.nii.gz,liver,p1,{s}" for c, s in (("a", "train"), ("b", "val"))]
    (tmp_path / "list.csv").write_text("\n".join(rows))
    cases = open_cases(tmp_path / "list.csv", "manifest", "lits")
    assert [case.annotated for case in cases] == [("liver",)] * 2 and cases[0].patient == "p1"
    assert len(open_cases(tmp_path / "list.csv", "manifest(split='val')", "lits")) == 1
    assert any("patient 'p1' is in train and in val" in finding.what for finding in check_cases(cases))
    (tmp_path / "list.csv").write_text("\n".join(rows).replace("annotated", "anotated"))
    with pytest.raises(InputError, match="'anotated', did you mean 'annotated'"):
        open_cases(tmp_path / "list.csv", "manifest", "lits")
    (tmp_path / "list.json").write_text(json.dumps([{"image": "../nothing.nii.gz", "labels": "x"}]))
    with pytest.raises(InputError, match="there is no file"):
        open_cases(tmp_path / "list.json", "manifest", "lits")


# -- the check --------------------------------------------------------------------------------------------------------


def test_check_finds_each_fault(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, other = liver_map(), liver_map()
    other[0, 0, 0] = 9
    folder = nnunet(tmp_path, {"good": good, "value": other, "empty": np.zeros_like(good), "shape": good[:-1]})
    save(folder / "labelsTr" / "half.nii.gz", good.astype(np.float32) * 0.5)
    save(folder / "imagesTr" / "half_0000.nii.gz", scan(7))
    moved = AFFINE.copy()
    moved[0, 3] = 30
    save(folder / "labelsTr" / "moved.nii.gz", good, moved)
    save(folder / "imagesTr" / "moved_0000.nii.gz", scan(8))
    save(folder / "labelsTr" / "window.nii.gz", good)
    save(folder / "imagesTr" / "window_0000.nii.gz", np.clip((scan(9) + 160) / 400 * 255, 0, 255).astype(np.uint8))
    save(folder / "labelsTr" / "again.nii.gz", good)
    (folder / "imagesTr" / "again_0000.nii.gz").write_bytes((folder / "imagesTr" / "good_0000.nii.gz").read_bytes())
    assert main(["data", "check", str(folder), "--layout", "nnunet", "--dataset", "lits", "--json"]) == 2
    found = json.loads(capsys.readouterr().out)["findings"]
    words = {finding["case"]: finding["what"] for finding in found}
    assert set(words) == {"value", "empty", "shape", "half", "moved", "window", "good"}  # `again` comes before `good`
    assert "label values 9" in words["value"] and "has a voxel" in words["empty"]
    assert "different grids: shape" in words["shape"] and "origin" in words["moved"]
    assert "whole numbers" in words["half"] and "same as that of case 'again'" in words["good"]
    errors = {finding["case"] for finding in found if finding["is_error"]}
    assert {"empty", "shape", "half", "moved"} <= errors and "value" not in errors


def test_check_and_list_speak_plainly(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = nnunet(tmp_path, {"a": liver_map()})
    assert main(["data", "check", str(folder), "--dataset", "lits"]) == 0
    assert main(["data", "list"]) == 0
    assert "lits" in capsys.readouterr().out
    for arguments in (["data", "chek", str(folder)], ["data", "check"], ["data", "check", str(folder / "no")]):
        assert main(arguments) == 2
        assert len(capsys.readouterr().err.strip().splitlines()) <= 3


# -- caches -----------------------------------------------------------------------------------------------------------


def cached(tmp_path: Path, cases: list, **options: object):

    processor = MoMEProcessor(spacing=[3, 3, 4], hu_window=[-200, 400])
    return cache_case_folder(tmp_path / "cache", cases, "lits", ["liver", "liver_tumor"], processor, **options)


def test_overlapping_structures_stay_whole_in_a_cache(tmp_path: Path) -> None:
    from mome.data.label_codes import mask_of

    case = cached(tmp_path, open_cases(nnunet(tmp_path / "d", {"a": liver_map()}), "nnunet", "lits"))[0]
    assert case.codes == ((), ("liver",), ("liver", "liver_tumor"))
    assert mask_of(case.labels, case.codes, "liver").sum() == 1000 == len(case.voxels["liver"])
    assert mask_of(case.labels, case.codes, "liver_tumor").sum() == 27


def test_broken_cases_are_named_or_refused_and_a_build_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = nnunet(tmp_path / "d", {name: liver_map() for name in "abcd"})
    broken = folder / "imagesTr" / "c_0000.nii.gz"
    whole = broken.read_bytes()
    broken.write_bytes(whole[:2000])
    cases = open_cases(folder, "nnunet", "lits")
    with pytest.raises(InputError, match="truncated or damaged"):
        cached(tmp_path, cases)
    assert not list((tmp_path / "cache").iterdir())
    reads: list[str] = []
    from mome.data.case import Case

    original = Case.read_image

    def interrupted(self: Case) -> object:
        if self.name == "c":
            raise KeyboardInterrupt
        return original(self)

    monkeypatch.setattr(Case, "read_image", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cached(tmp_path, cases)
    monkeypatch.setattr(Case, "read_image", lambda self: reads.append(self.name) or original(self))
    cache = cached(tmp_path, cases, skip_broken=True, workers=2)
    assert sorted(reads) == ["c", "d"]  # a and b were finished before the interruption
    assert [entry["name"] for entry in cache.index] == ["a", "b", "d"] and set(cache.problems) == {"c"}
    assert any("case 'c' is left out" in note for note in cache.notes)
    reads.clear()
    assert len(cached(tmp_path, cases)) == 3 and not reads
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == [cache.folder.name]
    broken.write_bytes(whole)  # another file, so another cache
    assert len(cached(tmp_path, open_cases(folder, "nnunet", "lits"))) == 4
