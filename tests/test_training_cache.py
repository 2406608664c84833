"""Caches on disk: compressed chunks give what plain arrays give, and what has changed is refused."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from training_runs import NAMES, losses, write_cases, write_recipe

from mome.data.cache import CaseCache
from mome.data.cache_build import LoadedCase, build_cache, cache_case_folder
from mome.data.case_folder import CaseFolder
from mome.data.label_codes import mask_of
from mome.data.sampling import PatchDataset
from mome.data.structure_places import BLOCK_SIDE, blocks_of, structures_in
from mome.errors import InputError
from mome.labels import load_table
from mome.processing import MoMEProcessor
from mome.training.config_file import load_run_config
from mome.training.loop import train
from mome.volumes import Grid

PROCESSOR = {"spacing": [2, 2, 2], "hu_window": [-200, 400]}


def make(root: Path, cache_format: str) -> CaseCache:
    data = root / "data"
    cases = CaseFolder(data if data.is_dir() else write_cases(data), "openkbp")
    return cache_case_folder(
        root / "cache", cases, "test", NAMES, MoMEProcessor(**PROCESSOR), cache_format=cache_format
    )


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Format → the folder of a cache that no test changes."""
    root = tmp_path_factory.mktemp("built")
    formats = ["plain"] if importlib.util.find_spec("blosc2") is None else ["plain", "blosc2"]
    return {cache_format: make(root, cache_format).folder for cache_format in formats}


def copy_of(built: dict[str, Path], cache_format: str, tmp_path: Path) -> CaseCache:
    """A cache that a test may change."""
    if cache_format not in built:
        pytest.skip("blosc2 is not installed")
    return CaseCache(Path(shutil.copytree(built[cache_format], tmp_path / "cache")), NAMES)


def whole(array: np.ndarray) -> tuple[slice, ...]:
    return tuple(slice(0, side) for side in array.shape)


def test_chunks_hold_what_plain_arrays_hold(built: dict[str, Path]) -> None:
    pytest.importorskip("blosc2")
    plain, chunked = (CaseCache(built[cache_format], NAMES) for cache_format in ("plain", "blosc2"))
    assert plain.folder != chunked.folder and not list(chunked.folder.glob("*.volume.npy"))
    rng = np.random.default_rng(0)
    for i in range(len(plain)):
        one, other = plain[i], chunked[i]
        assert max(one.volume.shape) > 32  # several chunks, the last ones smaller
        for a, b in ((one.volume, other.volume), (one.labels, other.labels)):
            assert a.shape == b.shape and a.dtype == b.dtype and np.array_equal(a, np.asarray(b))
            for _ in range(20):
                low = [int(rng.integers(0, side)) for side in a.shape]
                box = tuple(slice(x, int(rng.integers(x, side + 1))) for x, side in zip(low, a.shape, strict=True))
                assert np.array_equal(a[box], b[box]) and a[box].shape == b[box].shape
        assert other.codes == one.codes and other.annotated == one.annotated
        assert all(np.array_equal(one.voxels[name], other.voxels[name]) for name in one.voxels)
    sizes = [sum(file.stat().st_size for file in c.folder.glob("*.labels.*")) for c in (plain, chunked)]
    assert sizes[1] < sizes[0] / 4


@pytest.mark.parametrize("kind", ["volume", "labels"])
@pytest.mark.parametrize("damage", ["flipped", "truncated", "missing", "table"])
def test_a_damaged_chunk_is_refused(built: dict[str, Path], tmp_path: Path, kind: str, damage: str) -> None:
    folder = copy_of(built, "blosc2", tmp_path).folder
    path = folder / f"00001.{kind}.b2"
    data = bytearray(path.read_bytes())
    if damage == "flipped":
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    elif damage == "truncated":
        path.write_bytes(data[:-3])
    elif damage == "missing":
        path.unlink()
    else:
        table = np.load(folder / f"00001.{kind}.chunks.npy")
        np.save(folder / f"00001.{kind}.chunks.npy", table[::-1])
    cache = CaseCache(folder, NAMES)
    np.asarray(cache[0].volume)
    with pytest.raises(InputError, match=f"00001.{kind}.") as caught:
        np.asarray(getattr(cache[1], kind))
    assert len(str(caught.value).splitlines()) <= 3 and "remove" in str(caught.value)


@pytest.mark.parametrize("cache_format", ["plain", "blosc2"])
@pytest.mark.parametrize("change", ["written", "replaced", "removed"])
def test_a_cache_that_changes_during_a_run_is_noticed(
    built: dict[str, Path], tmp_path: Path, cache_format: str, change: str
) -> None:
    cache = copy_of(built, cache_format, tmp_path)
    before = cache[1].volume[whole(cache[1].volume)].copy()
    assert np.array_equal(cache[1].volume[whole(before)], before)
    path = cache.folder / ("00001.volume.npy" if cache_format == "plain" else "00001.volume.b2")
    if change == "written":
        with path.open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"\1")
    elif change == "replaced":
        shutil.copy(path, tmp_path / "copy")
        os.replace(tmp_path / "copy", path)
    else:
        path.unlink()
    with pytest.raises(InputError, match="has changed during the run|damaged or missing") as caught:
        cache[1]
    assert str(path) in str(caught.value) and "builds it again" in str(caught.value)
    assert cache[0].name == "c0"


def test_places_that_were_changed_are_refused(built: dict[str, Path], tmp_path: Path) -> None:
    folder = copy_of(built, "plain", tmp_path).folder
    for kind in ("places", "blocks"):
        path = folder / f"00000.{kind}.npy"
        kept = np.load(path)
        np.save(path, kept + kept.dtype.type(1))
        with pytest.raises(InputError, match=f"00000.{kind}.npy"):
            CaseCache(folder, NAMES).places(0)
        np.save(path, kept)
    assert CaseCache(folder, NAMES).places(0).voxels["parotid_gland_left"].size


def test_a_cache_keeps_few_files_open(built: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mome.data.cache._MOST_OPEN", 2)
    cache = CaseCache(built["plain"], NAMES)
    first = cache[0]
    for i in (1, 2):
        assert cache[i].name == f"c{i}"
    assert len(cache._open) == 2 and len(cache._places) == 2
    again = cache[0]  # opened again, without another look at its checksum
    assert again is not first and np.array_equal(again.volume, first.volume)


def test_blocks_say_what_a_patch_may_show() -> None:
    rng = np.random.default_rng(0)
    labels = np.zeros((20, 17, 9), np.uint8)
    labels[3:5, 4:6, 2:4], labels[12:14, 12:15, 7:9] = 1, 2
    codes = [[], ["liver"], ["liver", "spleen"]]
    names = ["liver", "spleen", "aorta"]
    blocks = blocks_of(labels, codes, names)
    for _ in range(200):
        start, size = rng.integers(-6, 18, 3).tolist(), rng.integers(1, 12, 3).tolist()
        found = structures_in(blocks, labels.shape, names, start, size)
        for name in names:
            box = tuple(slice(max(a, 0), max(a + n, 0)) for a, n in zip(start, size, strict=True))
            wide = tuple(
                slice(max(a, 0) // BLOCK_SIDE * BLOCK_SIDE, -(-max(min(a + n, side), 0) // BLOCK_SIDE) * BLOCK_SIDE)
                for a, n, side in zip(start, size, labels.shape, strict=True)
            )
            mask = mask_of(labels, codes, name)
            assert (not mask[box].any() or name in found) and (name not in found or mask[wide].any())
    # a case may annotate none of the trained structures
    assert structures_in(blocks_of(labels, codes, []), labels.shape, [], (0, 0, 0), (8, 8, 8)) == frozenset()


@pytest.mark.parametrize("cache_format", ["plain", "blosc2"])
def test_many_overlapping_structures(tmp_path: Path, cache_format: str) -> None:
    """More than 256 sets of structures need two bytes per voxel; a batch may join them with cases of one byte."""
    if cache_format == "blosc2":
        pytest.importorskip("blosc2")
    names = load_table().names()[:10]
    rng = np.random.default_rng(0)
    shape, grid = (40, 20, 20), Grid((40, 20, 20), np.diag([2.0, 2, 2, 1]))
    masks = {name: rng.random(shape) < 0.5 for name in names}
    hu = rng.normal(0, 50, shape).astype(np.float32)
    cases = [
        ("many", lambda: LoadedCase(hu, grid, masks)),
        ("few", lambda: LoadedCase(hu, grid, {names[3]: masks[names[3]]})),
    ]
    cache = build_cache(tmp_path, "many", names, MoMEProcessor(**PROCESSOR), cases, "", cache_format=cache_format)
    assert cache[0].labels.dtype == np.uint16 and cache[1].labels.dtype == np.uint8
    patches = PatchDataset([cache], [1.0], names, (16, 16, 16), 20, 0)
    batch = patches.finished([patches.read(number) for number in range(12)])
    many = [patches.place(number).case == 0 for number in range(12)]
    assert {*many} == {True, False}
    for row, (is_many, origin) in enumerate(zip(many, batch["origin"].tolist(), strict=True)):
        box = tuple(slice(first, first + 16) for first in origin)
        for label, name in enumerate(names):
            known = is_many or name == names[3]
            assert bool(batch["supervised"][row, label]) == known
            wanted = masks[name][box] if known else np.zeros((16, 16, 16))
            assert np.array_equal(batch["targets"][row, label].numpy(), wanted)
    cache.index[0]["codes"] = cache.index[0]["codes"][:5]
    cache._open.clear()
    with pytest.raises(InputError, match="case 'many' of a training cache has a code that its index does not name"):
        patches.read(many.index(True))


def test_training_on_chunks_gives_the_losses_of_plain_arrays(tmp_path: Path) -> None:
    pytest.importorskip("blosc2")
    recipe = write_recipe(tmp_path)
    short = ["train.steps=3", "train.validate_every=3", "train.log_every=0", "sampling.prompts=2"]
    for cache_format in ("plain", "blosc2"):
        out = f"train.out={tmp_path / cache_format}"
        train(load_run_config(recipe, [*short, f"cache_format={cache_format}", out]))
    assert losses(tmp_path / "plain") == losses(tmp_path / "blosc2") and len(losses(tmp_path / "plain")) == 3


def test_an_unknown_format_or_a_missing_package_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="unknown cache_format 'blosc', did you mean 'blosc2'"):
        make(tmp_path, "blosc")
    monkeypatch.setitem(sys.modules, "blosc2", None)
    with pytest.raises(InputError, match="mome\\[cache\\]"):
        make(tmp_path, "blosc2")
    assert not (tmp_path / "cache").exists()
