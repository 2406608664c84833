"""Synthetic CT from label maps: labels and image agree, a seed gives one scan, and HU are those of tissues."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import pytest

from mome.data.synthetic import Anatomy, load_anatomy, synthetic_ct
from mome.data.synthetic.elastic import deformation, warp
from mome.data.synthetic.tissues import draw_palette, tissue_of
from mome.errors import InputError
from mome.labels import load_dataset, load_table

NUMBERS = load_dataset("totalsegmentator_v2").name_to_id


def label_map() -> np.ndarray:
    """A trunk of 64 × 48 × 40 voxels of 4 mm: boxes for lungs, liver, spleen, aorta, a spine and muscles."""
    array = np.zeros((64, 48, 40), dtype=np.uint8)

    def put(name: str, i: tuple[int, int], j: tuple[int, int], k: tuple[int, int]) -> None:
        array[i[0] : i[1], j[0] : j[1], k[0] : k[1]] = NUMBERS[name]

    put("autochthon_left", (18, 30), (8, 14), (0, 40))
    put("autochthon_right", (34, 46), (8, 14), (0, 40))
    put("vertebrae_L1", (28, 36), (12, 20), (0, 40))
    put("aorta", (26, 32), (21, 26), (0, 40))
    put("lung_lower_lobe_left", (12, 25), (16, 38), (22, 40))
    put("lung_lower_lobe_right", (38, 52), (16, 38), (26, 40))
    put("liver", (34, 54), (16, 40), (4, 26))
    put("spleen", (10, 20), (14, 26), (6, 20))
    put("stomach", (14, 28), (28, 40), (6, 20))
    return array


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A label map and its CT, in LPS order as scanners store it."""
    folder, labels = tmp_path_factory.mktemp("anatomy"), label_map()
    affine = np.diag([-4.0, -4.0, 4.0, 1.0])
    stored = labels[::-1, ::-1]
    hu = np.full(stored.shape, -1000, dtype=np.float32)
    hu[6:58, 4:44] = -100
    for name, value in {"liver": 60, "spleen": 50, "aorta": 300, "stomach": 30, "vertebrae_L1": 200}.items():
        hu[stored == NUMBERS[name]] = value
    hu[(stored == NUMBERS["lung_lower_lobe_left"]) | (stored == NUMBERS["lung_lower_lobe_right"])] = -850
    nibabel.save(nibabel.Nifti1Image(stored, affine), folder / "labels.nii.gz")
    nibabel.save(nibabel.Nifti1Image(hu, affine), folder / "ct.nii.gz")
    return folder / "labels.nii.gz", folder / "ct.nii.gz"


@pytest.fixture(scope="module")
def anatomy(files) -> Anatomy:
    return load_anatomy(files[0], "totalsegmentator_v2")


def test_a_seed_gives_one_scan(anatomy: Anatomy) -> None:
    first, again, other = synthetic_ct(anatomy, 3), synthetic_ct(anatomy, 3), synthetic_ct(anatomy, 4)
    assert np.array_equal(first.array, again.array) and first.kind == "painted"
    assert all(np.array_equal(first.masks[name], again.masks[name]) for name in first.masks)
    assert first.array.shape != other.array.shape or not np.array_equal(first.array, other.array)


def test_masks_follow_the_label_map(anatomy: Anatomy) -> None:
    """Without deformation, the masks are those of the label map, cropped."""
    made = synthetic_ct(anatomy, 1, strength=0)
    voxel_ml = anatomy.spacing**3 / 1000
    margin = (made.array.shape[0] - anatomy.ids.shape[0]) // 2
    inner = made.masks["liver"][margin:-margin, margin:-margin]
    liver = anatomy.ids == load_table()["liver"].id
    shared = max(
        np.count_nonzero(inner & liver[:, :, k : k + inner.shape[2]])
        for k in range(liver.shape[2] - inner.shape[2] + 1)
    )
    assert shared >= 0.97 * np.count_nonzero(inner) > 0
    assert np.count_nonzero(liver) * voxel_ml == pytest.approx(20 * 24 * 22 * 0.064, rel=0.1)


def test_left_stays_left(anatomy: Anatomy) -> None:
    """The grid runs to the right, so the liver lies at larger i than the spleen."""
    made = synthetic_ct(anatomy, 5)
    centre = {name: np.argwhere(made.masks[name])[:, 0].mean() for name in ("liver", "spleen")}
    assert centre["liver"] > centre["spleen"]
    lungs = [np.argwhere(made.masks[f"lung_{side}"]) for side in ("left", "right")]
    if all(len(lung) for lung in lungs):
        assert lungs[1][:, 0].mean() > lungs[0][:, 0].mean()


def test_hu_are_those_of_tissues(anatomy: Anatomy) -> None:
    """In painted scans without domain randomisation, organs have the HU of their tissue, and outside lies air."""
    seen = 0
    for seed in range(8):
        made = synthetic_ct(anatomy, seed)
        assert made.array.dtype == np.float32 and made.array.min() >= -1024 and made.array.max() <= 3071
        assert abs(float(np.median(made.array[:2])) + 1000) < 60  # the outermost planes show air
        lung = made.masks["lung_left"]
        if lung.sum() > 50:
            assert float(np.median(made.array[lung])) < -600
        liver = made.array[made.masks["liver"]]
        seen += len(liver) > 100 and -40 < float(np.median(liver)) < 220
    assert seen >= 5


def test_unlabelled_structures_are_unknown_or_absent(files) -> None:
    """A data set covers all of its structures; `unknown` takes one away; a union is known where its parts are."""
    known = load_anatomy(files[0], "totalsegmentator_v2", unknown=["gallbladder"]).members
    assert "gallbladder" not in known and "urinary_bladder" in known and "lung_left" in known
    made = synthetic_ct(load_anatomy(files[0], "totalsegmentator_v2"), 0, names=["urinary_bladder", "liver"])
    assert set(made.masks) == {"urinary_bladder", "liver"} and not made.masks["urinary_bladder"].any()
    with pytest.raises(InputError, match="has no structure 'brainstem'"):
        load_anatomy(files[0], "totalsegmentator_v2", unknown=["brainstem"])
    known = load_anatomy(files[0], "totalsegmentator_v2", unknown=["lung_upper_lobe_left"]).members
    assert "lung_left" not in known and "lung_right" in known


def test_real_hu_keep_their_place(files) -> None:
    """A recoloured CT shows the deformed CT: lungs stay dark, the aorta stays brighter than fat."""
    anatomy = load_anatomy(files[0], "totalsegmentator_v2", files[1])
    made = synthetic_ct(anatomy, 2, real=1.0)
    assert made.kind == "recoloured"
    assert np.median(made.array[made.masks["aorta"]]) > 20
    lungs = made.masks["lung_left"] | made.masks["lung_right"]
    assert lungs.any() and np.median(made.array[lungs]) < -600


def test_deformation_of_strength_zero_crops() -> None:
    rng = np.random.default_rng(0)
    source = rng.normal(size=(9, 8, 7)).astype(np.float32)
    place = deformation(rng, (5, 4, 3), 3.0, (4.0, 3.5, 3.0), [((4.0, 4.0, 3.0), 10.0)], strength=0.0)
    assert np.allclose(warp(source, place, "bilinear", 0.0), source[2:7, 2:6, 2:5], atol=1e-4)


def test_contrast_phases_order_vessels() -> None:
    """Over many palettes, the aorta is brightest in the arterial phase and the liver in the portal venous one."""
    ids = {name: load_table()[name].id for name in ("aorta", "liver")}
    means: dict[str, list[tuple[float, float]]] = {}
    rng = np.random.default_rng(0)
    for _ in range(120):
        palette = draw_palette(rng, randomised=False)
        means.setdefault(palette.phase, []).append((palette.mean[ids["aorta"]], palette.mean[ids["liver"]]))
    average = {phase: np.mean(values, axis=0) for phase, values in means.items()}
    assert average["arterial"][0] > average["portal venous"][0] > average["unenhanced"][0]
    assert average["portal venous"][1] > average["arterial"][1]
    assert tissue_of("femur_left").hu[0] > 150 > tissue_of("liver").hu[0]


def test_an_empty_label_map_is_refused(tmp_path: Path) -> None:
    nibabel.save(nibabel.Nifti1Image(np.zeros((8, 8, 8), dtype=np.uint8), np.eye(4)), tmp_path / "empty.nii.gz")
    with pytest.raises(InputError, match="no voxel of the label map is labelled"):
        load_anatomy(tmp_path / "empty.nii.gz", "totalsegmentator_v2")


@pytest.mark.parametrize(
    ("dataset", "words"),
    [
        ("ircadb", "has no numbers: its structures are files"),
        ("lits", "number 1 of data set 'LiTS.*' is no structure of its own .it is in liver.,"),
        ("kits19", "number 1 of data set 'KiTS19' is no structure of its own .it is in kidney_left, kidney_right.,"),
    ],
)
def test_numbers_that_are_no_single_structure_are_refused(tmp_path: Path, dataset: str, words: str) -> None:
    """Their voxels would be painted as fat between the organs."""
    array = np.zeros((8, 8, 8), dtype=np.uint8)
    array[2:6, 2:6, 2:6], array[3, 3, 3] = 1, 2
    nibabel.save(nibabel.Nifti1Image(array, np.diag([4.0, 4, 4, 1])), tmp_path / "labels.nii.gz")
    with pytest.raises(InputError, match=words):
        load_anatomy(tmp_path / "labels.nii.gz", dataset)


def test_numbers_that_no_structure_has(files, tmp_path: Path) -> None:
    stored = nibabel.load(files[0])
    array = np.asarray(stored.dataobj).astype(np.int32)
    expected = load_anatomy(files[0], "totalsegmentator_v2").ids
    array[0, 0, 0] = 2**31 - 1
    nibabel.save(nibabel.Nifti1Image(array, stored.affine), tmp_path / "large.nii.gz")
    assert np.mean(load_anatomy(tmp_path / "large.nii.gz", "totalsegmentator_v2").ids == expected) > 0.999
    array[0, 0, 0] = -1
    nibabel.save(nibabel.Nifti1Image(array, stored.affine), tmp_path / "negative.nii.gz")
    with pytest.raises(InputError, match="no negative numbers, this one holds -1"):
        load_anatomy(tmp_path / "negative.nii.gz", "totalsegmentator_v2")


def test_a_label_map_whose_voxels_are_stored_in_another_order(files, tmp_path: Path) -> None:
    turned = nibabel.as_closest_canonical(nibabel.load(files[0]))
    nibabel.save(turned, tmp_path / "labels.nii.gz")
    first, second = (
        load_anatomy(path, "totalsegmentator_v2", files[1]) for path in (files[0], tmp_path / "labels.nii.gz")
    )
    assert np.array_equal(first.ids, second.ids)
