"""Files of masks: the bytes that nibabel writes, in one gzip member that every reader opens."""

from __future__ import annotations

import gzip
import io
import json
import subprocess
import zlib
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from mome.errors import OutputError
from mome.volumes import Grid, write_mask
from mome.volumes import fast_gzip as module
from mome.volumes.boxed import BoxedArray
from mome.volumes.fast_gzip import GzipWriter, joined_crc32
from mome.volumes.mask_set import MaskSet

LIBRARIES = {"isal": ("isal.isal_zlib", 1), "zlib-ng": ("zlib_ng.zlib_ng", 2), "zlib": ("zlib", 1)}
GRID = Grid((33, 21, 47), np.array([[-0.9, 0, 0, 10], [0, 0.9, 0, -4], [0, 0, 2.5, 7], [0, 0, 0, 1.0]]))
TABLE = [{"id": 1, "name": "liver"}]


@pytest.fixture(params=LIBRARIES)
def library(request, monkeypatch) -> None:
    name, level = LIBRARIES[request.param]
    chosen = pytest.importorskip(name)
    monkeypatch.setattr(module, "deflate_library", lambda: (chosen, level))


def plain_bytes(array: np.ndarray, path: Path) -> bytes:
    """What nibabel alone writes."""
    image = nib.Nifti1Image(array, GRID.affine)
    image.set_sform(GRID.affine, code=1)
    image.set_qform(GRID.affine, code=1)
    image.header["xyzt_units"] = 2
    text = json.dumps({"mome_labels": TABLE}).encode()
    image.header.extensions.append(nib.nifti1.Nifti1Extension(6, text))
    nib.save(image, path)
    return gzip.decompress(path.read_bytes())


def test_checksums_are_joined() -> None:
    data = np.random.default_rng(0).bytes(5000)
    for cut in (0, 1, 17, 4096, 5000):
        joined = joined_crc32(zlib.crc32(data[:cut]), zlib.crc32(data[cut:]), 5000 - cut)
        assert joined == zlib.crc32(data)


def test_pieces_and_zeros_are_one_member(library) -> None:
    rng, expected, file = np.random.default_rng(0), [], io.BytesIO()
    writer = GzipWriter(file)
    for piece in (b"head", rng.bytes(70_000), b"", bytes([1]) * 300_000):
        writer.write(piece)
        writer.write_zeros(3_000_001)
        expected += [piece, bytes(3_000_001)]
    writer.write_zeros(0)
    writer.close()
    whole, decoder = b"".join(expected), zlib.decompressobj(wbits=31)
    assert decoder.decompress(file.getvalue()) == whole and decoder.eof and decoder.unused_data == b""
    assert gzip.decompress(file.getvalue()) == whole


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_a_mask_file_holds_what_nibabel_writes(library, kind: type, tmp_path: Path) -> None:
    values = np.zeros(GRID.shape, dtype=kind)
    values[4:20, 3:9, 11:40] = np.random.default_rng(0).random((16, 6, 29)) > 0.3
    values[5, 5, 12] = 1 if kind == np.uint8 else 999
    first, last = (4, 3, 11), (20, 9, 40)
    box = BoxedArray(GRID.shape, first, values[tuple(slice(a, b) for a, b in zip(first, last, strict=True))])
    expected = plain_bytes(values, tmp_path / "plain.nii.gz")
    for number, array in enumerate((values, np.asfortranarray(values), values[::-1][::-1], box)):
        path = write_mask(tmp_path / f"{number}.nii.gz", array, GRID, labels=TABLE)
        assert gzip.decompress(path.read_bytes()) == expected
        assert write_mask(tmp_path / f"{number}.nii", array, GRID, labels=TABLE).read_bytes() == expected
        assert subprocess.run(["gzip", "-t", path]).returncode == 0
        assert np.array_equal(np.asarray(nib.load(path).dataobj), values)
        assert np.array_equal(sitk.GetArrayFromImage(sitk.ReadImage(str(path))).T, values)


def test_an_empty_mask_and_one_plane(library, tmp_path: Path) -> None:
    for shape in ((33, 21, 47), (5, 4, 1), (1, 1, 1)):
        grid = Grid(shape, GRID.affine)
        empty = BoxedArray(shape, (0, 0, 0), np.zeros((0, 0, 0), np.uint8))
        image = nib.load(write_mask(tmp_path / "empty.nii.gz", empty, grid))
        assert image.shape == shape and not np.asarray(image.dataobj).any()
        image = nib.load(write_mask(tmp_path / "full.nii.gz", np.ones(shape, np.uint8), grid))
        assert np.asarray(image.dataobj).all()


def test_planes_are_put_together_a_few_at_a_time(monkeypatch) -> None:
    monkeypatch.setattr("mome.volumes.boxed._BYTES_AT_ONCE", 10 * 33 * 21)
    box = BoxedArray(GRID.shape, (4, 3, 11), np.ones((16, 6, 29), np.uint8))
    slabs = list(box.slabs(np.uint8))
    assert [planes for planes, _ in slabs] == [11, 10, 10, 9, 7]
    assert [slab is None for _, slab in slabs] == [True, False, False, False, True]


def test_a_full_disk_leaves_no_file(monkeypatch, tmp_path: Path) -> None:
    def full(self: GzipWriter, count: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(GzipWriter, "write_zeros", full)
    box = BoxedArray(GRID.shape, (4, 3, 11), np.ones((16, 6, 29), np.uint8))
    with pytest.raises(OutputError, match="No space left"):
        write_mask(tmp_path / "mask.nii.gz", box, GRID)
    assert list(tmp_path.iterdir()) == []


def test_a_map_of_ids_is_the_same_with_and_without_boxes() -> None:
    from mome.inference.packed import PackedMasks

    rng = np.random.default_rng(0)
    arrays = {name: np.zeros(GRID.shape, np.uint8) for name in ("liver", "spleen", "nothing", "all")}
    arrays["liver"][3:20, 2:15, 5:30] = rng.random((17, 13, 25)) > 0.5
    arrays["spleen"][10:25, 6:20, 20:40] = rng.random((15, 14, 20)) > 0.6
    arrays["all"][...] = 1
    packed = PackedMasks(list(arrays), GRID.shape, 2)
    for name, array in arrays.items():
        packed.write(name, range(GRID.shape[2]), array.astype(bool))
    labels = [{"id": 7 + 100 * number, "name": name} for number, name in enumerate(arrays)]
    sets = [MaskSet(masks, labels, packed.voxels, GRID) for masks in (arrays, packed)]
    (plain, plain_overlap), (boxed, overlap) = (masks.label_map() for masks in sets)
    assert np.array_equal(plain, boxed) and plain.dtype == boxed.dtype and plain_overlap == overlap
    assert overlap == np.count_nonzero(sum(arrays.values()) > 1)  # a voxel in three masks counts once
    expected = np.where(arrays["liver"] == 1, 7, 307)
    expected[
        (arrays["spleen"] == 1) & ((arrays["liver"] == 0) | (packed.voxels["spleen"] < packed.voxels["liver"]))
    ] = 107
    assert np.array_equal(plain, expected)
