"""Training data: the cache, samples, augmentation and case folders."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from training_runs import NAMES, write_cases

from mome.data.augmentation import AugmentationConfig, BatchAugmentation
from mome.data.cache import CaseCache
from mome.data.cache_build import cache_case_folder
from mome.data.case_folder import CaseFolder
from mome.data.label_codes import prompt_masks
from mome.data.layouts import open_cases
from mome.data.mapped_pages import release_pages
from mome.data.patch_box import cut_middle, patch_start, read_box
from mome.data.sampling import PatchDataset
from mome.data.sampling_config import SamplingConfig
from mome.errors import InputError
from mome.labels.dataset import StructureRule
from mome.processing import MoMEProcessor
from mome.training.config import RunConfig, SourceConfig
from mome.training.sources import open_source, patch_dataset


@pytest.fixture
def cached(tmp_path: Path) -> CaseCache:
    folder = CaseFolder(write_cases(tmp_path / "data"), "openkbp")
    processor = MoMEProcessor(spacing=[4, 4, 3], hu_window=[-200, 400])
    return cache_case_folder(tmp_path / "cache", folder, "test", NAMES, processor)


@pytest.mark.parametrize("compared", [0, 8])
def test_masks_of_prompts_follow_from_codes(compared: int, monkeypatch) -> None:
    monkeypatch.setattr("mome.data.label_codes._MOST_COMPARED", compared)
    generator = torch.Generator().manual_seed(0)
    for codes, dtype in ((3, torch.uint8), (300, torch.int32)):
        codes_BDHW = torch.randint(0, codes, (2, 4, 3, 5), generator=generator).to(dtype)
        members_BCP = torch.rand(2, codes, 6, generator=generator) < 0.4
        wanted = [members_BCP[case][codes_BDHW[case].long()].movedim(-1, 0) for case in range(2)]
        found = prompt_masks(codes_BDHW, members_BCP)
        assert found.dtype == torch.uint8 and torch.equal(found.bool(), torch.stack(wanted))


def test_reading_samples_keeps_no_page_of_the_cache(cached) -> None:
    """The map of this process counts the resident pages of every mapped file."""
    patches = PatchDataset([cached], [1.0], NAMES, [8, 8, 8], 20, 0)
    for number in range(20):
        patches.read(number)
    volume = cached[0].volume
    assert _resident_kb(cached.folder, "volume.npy") == 0
    assert int(volume.sum()) > 0 and _resident_kb(cached.folder, "volume.npy") > 0  # the measure sees pages
    release_pages(volume)
    assert _resident_kb(cached.folder, "volume.npy") == 0 and int(volume.sum()) > 0


def _resident_kb(folder: Path, ending: str) -> int:
    """Returns the resident memory of the files of a folder that this process has mapped."""
    smaps = Path("/proc/self/smaps")
    if not smaps.exists():
        pytest.skip("this system does not say which pages are resident")
    total, counts = 0, False
    for line in smaps.read_text().splitlines():
        key, *rest = line.split()
        if not key.endswith(":"):  # the head of a mapping, which ends with its file
            counts = bool(rest) and rest[-1].startswith(str(folder)) and rest[-1].endswith(ending)
        elif counts and key == "Rss:":
            total += int(rest[0])
    return total


def test_cache_is_on_the_network_grid_and_opens_again(cached, tmp_path: Path) -> None:
    case = cached[1]
    assert case.volume.dtype == np.uint8 and case.volume.shape == (24, 22, 20)
    # RAS: the patient's left is now at small indices
    assert np.argwhere(case.labels == 1)[:, 0].mean() < np.argwhere(case.labels == 2)[:, 0].mean()
    assert cached[0].annotated == ("parotid_gland_left", "parotid_gland_right")
    assert len(case.voxels["mandible"]) == (case.labels == 3).sum() > 0
    stamp = (cached.folder / "index.json").stat().st_mtime_ns
    folder = CaseFolder(tmp_path / "data", "openkbp")
    same = cache_case_folder(
        tmp_path / "cache", folder, "test", NAMES, MoMEProcessor(spacing=[4, 4, 3], hu_window=[-200, 400])
    )
    assert (same.folder / "index.json").stat().st_mtime_ns == stamp
    other = cache_case_folder(
        tmp_path / "cache", folder, "test", NAMES, MoMEProcessor(spacing=[4, 4, 3], hu_window=[-100, 400])
    )
    assert other.folder != same.folder


def test_a_changed_file_is_cached_anew(cached, tmp_path: Path) -> None:
    image = tmp_path / "data" / "images" / "c0.nii.gz"
    os.utime(image, ns=(0, image.stat().st_mtime_ns + 10**9))
    processor = MoMEProcessor(spacing=[4, 4, 3], hu_window=[-200, 400])
    again = cache_case_folder(tmp_path / "cache", CaseFolder(tmp_path / "data", "openkbp"), "test", NAMES, processor)
    assert again.folder != cached.folder


def test_samples_are_a_function_of_their_number(cached) -> None:
    def dataset(seed: int) -> PatchDataset:
        return PatchDataset(
            [cached],
            [1.0],
            NAMES,
            (16, 16, 16),
            50,
            seed,
            augmentation=BatchAugmentation(AugmentationConfig(affine=0.5), NAMES, seed=seed),
        )

    one, two = dataset(0), dataset(0)
    for number in (3, 0, 3):
        for key, value in one[number].items():
            assert torch.equal(value, two[number][key])
    assert not torch.equal(one[3]["volume"], dataset(1)[3]["volume"])
    assert any(not one[n]["supervised"][2] for n in range(20))  # case c0 has no mandible contour
    present = [bool(one[n]["targets"].flatten(1).any(1).any()) for n in range(20)]
    assert np.mean(present) > 0.6


def test_mirroring_swaps_sides(tmp_path: Path) -> None:
    """The targets of a mirrored patch are those of the other side, mirrored, and so is what is annotated."""
    root = write_cases(tmp_path / "data")
    (root / "cases.json").write_text(json.dumps({"c1": {"annotated": [NAMES[0], NAMES[2]]}}))
    processor = MoMEProcessor(spacing=[4, 4, 3], hu_window=[-200, 400])
    cache = cache_case_folder(tmp_path / "cache", CaseFolder(root, "openkbp"), "test", NAMES, processor)

    def sample(mirror: float, number: int) -> dict[str, torch.Tensor]:
        config = AugmentationConfig(mirror=mirror, intensity=0.0, noise=0.0)
        augmentation = BatchAugmentation(config, NAMES)
        return PatchDataset([cache], [1.0], NAMES, (16, 16, 16), 50, 0, augmentation=augmentation)[number]

    shown = [False] * 3
    for number in range(8):
        plain, flipped = sample(0.0, number), sample(1.0, number)
        assert torch.equal(flipped["volume"], plain["volume"].flip(1))
        assert torch.equal(flipped["targets"], plain["targets"][[1, 0, 2]].flip(1))
        assert flipped["supervised"].tolist() == [False, True, True] and plain["supervised"].tolist() == [
            True,
            False,
            True,
        ]
        assert torch.equal(flipped["origin"], plain["origin"])
        shown = [old or bool(new) for old, new in zip(shown, flipped["targets"].flatten(1).any(1), strict=True)]
    assert shown == [False, True, True]
    assert BatchAugmentation(AugmentationConfig(mirror=1.0), NAMES).can_mirror
    lonely = BatchAugmentation(AugmentationConfig(mirror=1.0), NAMES[:1])
    assert not lonely.can_mirror and not any(lonely.swaps_sides(number) for number in range(9))


def test_a_structure_of_one_side_teaches_nothing_in_mirrored_patches(tmp_path: Path) -> None:
    """It was left where it is by name, so that a mirrored patch taught it on the patient's other side."""
    folder = write_cases(tmp_path / "data")
    numbers = {"lung_middle_lobe_right": 4, "liver": 6}
    cases = [
        dataclasses.replace(
            case,
            annotated=tuple(numbers),
            rules={name: StructureRule((number,)) for name, number in numbers.items()},
        )
        for case in open_cases(folder, "cases", "openkbp")
    ]
    cache = cache_case_folder(tmp_path / "cache", cases, "x", list(numbers), MoMEProcessor(spacing=(4, 4, 3)))
    for mirror, expected in ((0.0, [True, True]), (1.0, [False, True])):
        augmentation = BatchAugmentation(AugmentationConfig(mirror=mirror), list(numbers))
        patches = PatchDataset([cache], [1.0], list(numbers), (8, 8, 8), 4, 0, SamplingConfig(), augmentation)
        assert all(patches.read(number)["supervised"].tolist() == expected for number in range(4))


def crop(array: np.ndarray, centre: tuple[int, ...], patch: tuple[int, ...]) -> np.ndarray:
    return read_box(array, patch_start(array.shape, centre, patch), patch)


def test_crop_stays_inside_or_pads() -> None:
    array = np.arange(10 * 10 * 3).reshape(10, 10, 3)
    assert np.array_equal(crop(array, (0, 9, 1), (4, 4, 3)), array[:4, 6:, :])
    padded = crop(array + 1, (5, 5, 1), (4, 4, 7))
    assert np.array_equal(padded[:, :, 2:5], (array + 1)[3:7, 3:7]) and not padded[:, :, :2].any()
    beyond = read_box(array + 1, (-3, 8, 20), (5, 5, 2))
    assert beyond.shape == (5, 5, 2) and not beyond.any()


def test_patches_reach_beyond_the_scan_only_if_asked(cached) -> None:
    patch = (12, 12, 12)

    def dataset(**sampling: float) -> PatchDataset:
        return PatchDataset([cached], [1.0], NAMES, patch, 200, seed=3, sampling=SamplingConfig(**sampling))

    def outside(patches: PatchDataset) -> list[float]:
        found = []
        for number in range(200):
            place = patches.place(number)
            shape = cached.index[place.case]["shape"]
            inside = patch_start(shape, place.centre, patch)
            start = patches.read(number)["origin"].tolist()
            assert start == patch_start(shape, place.centre, patch, place.beyond)
            moved = max(abs(a - b) for a, b in zip(start, inside, strict=True))
            assert moved <= round(place.beyond * 12) <= 3
            found.append(moved)
        return found

    never, sometimes, often = (outside(dataset(beyond=share)) for share in (0.0, 0.3, 1.0))
    assert not any(never) and np.count_nonzero(sometimes) < np.count_nonzero(often)
    assert max(often) == 3
    assert [dataset().place(n).centre for n in range(50)] == [dataset(beyond=1.0).place(n).centre for n in range(50)]


def test_cut_patches_end_inside_their_structure(cached) -> None:
    patch = (8, 8, 8)

    def dataset(**sampling: float) -> PatchDataset:
        return PatchDataset([cached], [1.0], NAMES, patch, 200, seed=3, sampling=SamplingConfig(**sampling))

    plain, cut = dataset(foreground=1.0), dataset(foreground=1.0, cut=1.0)
    moved, ends = 0, set()
    for number in range(200):
        place, before = cut.place(number), plain.place(number)
        assert (place.case, place.focus, place.centre[:2]) == (before.case, before.focus, before.centre[:2])
        if place.centre == before.centre:
            continue
        moved += 1
        shape = cached.index[place.case]["shape"]
        heights = np.unravel_index(cached.places(place.case).voxels[place.focus], shape)[2]
        first = cut.read(number)["origin"].tolist()[2]
        assert 0 <= first <= shape[2] - 8
        shown = np.count_nonzero((np.unique(heights) >= first) & (np.unique(heights) < first + 8))
        assert 1 <= shown <= 2 and len(np.unique(heights)) > shown
        ends.add(bool(heights.max() >= first + 8))
    assert moved > 50 and ends == {False, True}
    without_structure = (dataset(foreground=0.0, cut=share) for share in (0.0, 1.0))
    assert all(
        one == other for one, other in zip(*([d.place(n) for n in range(50)] for d in without_structure), strict=True)
    )
    with pytest.raises(InputError, match="cut"):
        SamplingConfig(cut=1.5)


@pytest.mark.parametrize("orientation", ["RAS", "IRP", "LIA"])
def test_patches_are_cut_in_height_on_every_grid(cached, orientation: str) -> None:
    height = next(axis for axis, letter in enumerate(orientation) if letter in "SI")
    processor = MoMEProcessor(orientation=orientation)

    def places(share: float) -> list[tuple[int, ...]]:
        run = RunConfig(labels=NAMES, sources=[SourceConfig()], sampling=SamplingConfig(foreground=1.0, cut=share))
        patches = patch_dataset(run, [cached], (8, 8, 8), processor, 50)
        return [patches.place(number).centre for number in range(50)]

    moved = {
        axis
        for one, other in zip(places(0.0), places(1.0), strict=True)
        for axis in range(3)
        if one[axis] != other[axis]
    }
    assert moved == {height}


@pytest.mark.parametrize(("size", "low", "high"), [(10, 2, 8), (12, 0, 11), (20, 5, 5)])
def test_a_case_without_room_has_no_cut_patches(size: int, low: int, high: int) -> None:
    assert cut_middle(low, high, size, 12, np.random.default_rng(0)) is None


def test_bad_case_folders(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no cases.json"):
        CaseFolder(tmp_path, "openkbp")
    folder = write_cases(tmp_path / "d", 1)
    (folder / "cases.json").write_text(json.dumps({"c0": {"annotated": ["liver"]}}))
    with pytest.raises(InputError, match="lists 'liver'"):
        CaseFolder(folder, "openkbp")
    (folder / "cases.json").write_text(json.dumps({"c9": {"annotated": []}}))
    with pytest.raises(InputError, match="has no file"):
        CaseFolder(folder, "openkbp")


def test_a_cache_opens_without_its_scans(cached) -> None:
    processor = MoMEProcessor(spacing=[4, 4, 3], hu_window=[-200, 400])
    source = SourceConfig(kind="cached", folder=str(cached.folder))
    opened = open_source(source, RunConfig(labels=tuple(NAMES)), processor)
    assert [entry["name"] for entry in opened.index] == [entry["name"] for entry in cached.index]
    with pytest.raises(InputError, match="other labels"):
        open_source(source, RunConfig(labels=("liver",)), processor)
    with pytest.raises(InputError, match="other processor settings"):
        open_source(source, RunConfig(labels=tuple(NAMES)), MoMEProcessor(spacing=[4, 4, 4], hu_window=[-200, 400]))
    index = cached.folder / "index.json"
    made = json.loads(index.read_text())
    del made["cases"][0]["codes"]  # as of a release that stored one number per voxel
    index.write_text(json.dumps(made))
    with pytest.raises(InputError, match="another release made it") as caught:
        open_source(source, RunConfig(labels=tuple(NAMES)), processor)
    assert "remove" not in str(caught.value)
    with pytest.raises(InputError, match="needs a folder"):
        open_source(SourceConfig(kind="cached"), RunConfig(labels=tuple(NAMES)), processor)
