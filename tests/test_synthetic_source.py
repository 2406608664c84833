"""Synthetic CT as a source of training cases."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch

from mome.data.augmentation import AugmentationConfig, BatchAugmentation
from mome.data.augmentations import AUGMENTATIONS
from mome.data.augmentations.base import PatchFrame
from mome.errors import InputError
from mome.labels import load_dataset
from mome.processing import MoMEProcessor
from mome.training.config import RunConfig, SourceConfig
from mome.training.sources import open_source

LABELS = ("liver", "aorta", "gallbladder", "lung_left", "brainstem")


@pytest.fixture(scope="module")
def label_map(tmp_path_factory: pytest.TempPathFactory) -> Path:
    numbers = load_dataset("totalsegmentator_v2").name_to_id
    array = np.zeros((40, 36, 30), dtype=np.uint8)
    array[22:34, 10:26, 4:20] = numbers["liver"]
    array[16:21, 14:19] = numbers["aorta"]
    array[6:15, 10:26, 16:30] = numbers["lung_lower_lobe_left"]
    array[16:24, 6:12] = numbers["vertebrae_L1"]
    path = tmp_path_factory.mktemp("map") / "person.nii.gz"
    nibabel.save(nibabel.Nifti1Image(array, np.diag([6.0, 6.0, 6.0, 1.0])), path)
    return path


def run_of(folder: Path, **source: object) -> RunConfig:
    return RunConfig(labels=LABELS, cache=str(folder), sources=(SourceConfig(kind="synthetic", **source),))  # type: ignore[arg-type]


def test_cases_are_cached_with_what_the_data_set_covers(tmp_path: Path, label_map: Path) -> None:
    """Annotated is what the data set labels, also where it is absent; other structures stay unknown."""
    source = {"label_map": str(label_map), "dataset": "totalsegmentator_v2", "unknown": ("gallbladder",), "count": 2}
    run = run_of(tmp_path, **source, seed=7)
    processor = MoMEProcessor(spacing=(6.0, 6.0, 6.0), hu_window=(-400.0, 500.0))
    cache = open_source(run.sources[0], run, processor)
    assert [entry["name"] for entry in cache.index] == ["person_7", "person_8"]
    assert all(entry["annotated"] == ["liver", "aorta", "lung_left"] for entry in cache.index)
    case = cache[0]
    assert len(case.voxels["aorta"]) > 20 and case.volume.dtype == np.uint8
    soft = case.volume[case.labels == 1 + LABELS.index("liver")]
    air = case.volume[:2]
    assert np.median(soft) > 60 > np.median(air)

    again = open_source(run.sources[0], run, processor)
    assert again.folder == cache.folder
    other = run_of(tmp_path, **source, seed=9)
    assert open_source(other.sources[0], other, processor).folder != cache.folder


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ({"dataset": "amos", "count": 1}, "needs a label_map, a dataset and a count"),
        ({"label_map": "/nowhere/map.nii.gz", "dataset": "amos", "count": 1}, "no such file of a synthetic source"),
        ({"real": 1.5}, "a source.real is from 0 to 1"),
    ],
)
def test_bad_sources(tmp_path: Path, source: dict[str, object], words: str) -> None:
    with pytest.raises(InputError, match=words):
        run = run_of(tmp_path, **source)
        open_source(run.sources[0], run, MoMEProcessor())


def augmented(volume: np.ndarray, codes: np.ndarray, number: int, **settings: float) -> tuple[np.ndarray, np.ndarray]:
    """One patch after the augmentations that these keys stand for, without the others."""
    augment = BatchAugmentation(AugmentationConfig(mirror=0.0, intensity=0.0, noise=0.0, **settings), ["liver"])
    changed, same = augment(torch.from_numpy(volume)[None], torch.from_numpy(codes)[None], [number], volume.shape)
    return changed[0].numpy(), same[0].numpy()


def test_gamma_and_blur_change_the_image_alone() -> None:
    rng = np.random.default_rng(0)
    patch = rng.random((12, 12, 12), dtype=np.float32)
    codes = (patch > 0.5).astype(np.uint8)
    curved, same = augmented(patch, codes, 1, gamma=2.0)
    order = np.argsort(patch.ravel())
    assert np.all(np.diff(curved.ravel()[order]) >= -1e-6) and not np.allclose(curved, patch)
    assert np.array_equal(same, codes)
    smooth, same = augmented(patch, codes, 1, blur=1.0)
    assert smooth.std() < patch.std() and smooth.mean() == pytest.approx(patch.mean(), abs=0.02)
    assert np.array_equal(same, codes)


def test_a_slab_has_air_above_and_below() -> None:
    patch, codes = np.ones((6, 8, 16), np.float32), np.ones((6, 8, 16), np.uint8)
    heights = set()
    for number in range(20):
        cut, mask = augmented(patch, codes, number, slab=1.0)
        assert np.array_equal(cut > 0, mask > 0)
        shown = np.flatnonzero(mask.any(axis=(0, 1)))
        assert len(shown) == shown[-1] - shown[0] + 1 and mask[:, :, shown].all()
        heights.add(len(shown))
    assert min(heights) >= 2 and max(heights) <= 16 and len(heights) > 5


def test_short_slabs_have_a_quarter_of_the_height() -> None:
    slab = AUGMENTATIONS.build("slab(probability=1.0, short=0.5)", frame=PatchFrame())
    heights = [int(slab.inside(np.random.default_rng(seed), (6, 8, 16)).sum()) for seed in range(400)]
    assert min(heights) == 2 and max(heights) == 16
    assert 0.5 < np.mean(np.array(heights) <= 4) < 0.7  # one half, and a fifth of the others
    with pytest.raises(InputError, match="short"):
        AUGMENTATIONS.build("slab(short=2)", frame=PatchFrame())
