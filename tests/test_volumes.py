"""Reading, resampling by affine and writing, checked against nibabel, scipy, SimpleITK and balls of known size."""

from __future__ import annotations

import itertools
import resource
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy import ndimage
from scipy.spatial.transform import Rotation
from small_scans import save_mha, save_nrrd

from mome.errors import InputError, OutputError
from mome.volumes import (
    Grid,
    Volume,
    checked_volume,
    network_grid,
    read_label_table,
    read_volume,
    resample,
    write_mask,
)
from mome.volumes.axis_sampling import parallel_axes

CODES = [
    "".join(letters) for order in itertools.permutations(("LR", "PA", "IS")) for letters in itertools.product(*order)
]


def oblique(angles: tuple[float, float, float], spacing: tuple[float, float, float]) -> np.ndarray:
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", angles, degrees=True).as_matrix() * spacing
    affine[:3, 3] = (-40, 12, 7)
    return affine


def ball(grid: Grid, radius_mm: float) -> tuple[np.ndarray, np.ndarray]:
    """Returns the mask of a ball at the grid's centre, and the centre in mm."""
    centre = grid.affine @ np.array([*(np.asarray(grid.shape) - 1) / 2, 1.0])
    at = np.stack(np.meshgrid(*map(np.arange, grid.shape), indexing="ij"), -1) @ grid.affine[:3, :3].T
    at = at + grid.affine[:3, 3]
    return np.linalg.norm(at - centre[:3], axis=-1) <= radius_mm, centre[:3]


def test_there_are_48_orientations() -> None:
    assert len(set(CODES)) == 48


@pytest.mark.parametrize("code", CODES)
def test_masks_come_back_exactly_from_every_storage_orientation(code: str) -> None:
    base = nib.Nifti1Image(np.zeros((11, 13, 9), np.float32), np.diag([2.0, 1.5, 3.0, 1.0]))
    to = nib.orientations.axcodes2ornt(code)
    image = base.as_reoriented(nib.orientations.ornt_transform(nib.io_orientation(base.affine), to))
    mask = np.random.default_rng(0).random(image.shape) > 0.5
    grid = Grid(image.shape, image.affine)
    assert grid.orientation == code == "".join(nib.aff2axcodes(image.affine))
    spacing = [2.0, 1.5, 3.0]
    network = network_grid(grid, spacing=tuple(spacing), orientation="RAS")
    assert network.orientation == "RAS" and sorted(network.shape) == sorted(grid.shape)
    there = resample(mask.astype(np.float32), grid, network)
    assert set(np.unique(there)) <= {0.0, 1.0}
    back = resample(there, network, grid)
    assert np.array_equal(back.numpy() > 0.5, mask)
    # nibabel moves the voxels to the same places
    expected = nib.as_closest_canonical(nib.Nifti1Image(mask.astype(np.float32), image.affine)).get_fdata()
    assert np.array_equal(there.numpy(), expected)


@pytest.mark.parametrize("angles", [(0, 0, 0), (0, 0, 20), (15, -10, 30)])
@pytest.mark.parametrize("coarser", [1.0, 1.25, 1.5])
def test_a_ball_survives_the_way_there_and_back(angles: tuple[float, float, float], coarser: float) -> None:
    grid = Grid((56, 52, 54), oblique(angles, (1.0, 1.0, 1.0)))
    mask, centre = ball(grid, 20)
    straight = Grid((90, 90, 90), np.diag([coarser, coarser, coarser, 1.0]))
    straight.affine[:3, 3] = centre - (44.3 * coarser, 45.1 * coarser, 44.7 * coarser)
    for network in (network_grid(grid, spacing=(coarser,) * 3), straight):
        soft = resample(mask.astype(np.float32), grid, network)
        back = resample(soft, network, grid).numpy() > 0.5
        assert 2 * (back & mask).sum() / (back.sum() + mask.sum()) >= 0.99
        found = (np.argwhere(back) @ grid.affine[:3, :3].T + grid.affine[:3, 3]).mean(0)
        assert np.linalg.norm(found - centre) <= 0.5


@pytest.mark.parametrize("angles", [(0, 0, 0), (10, 20, -30)])
def test_linear_resampling_agrees_with_scipy(angles: tuple[float, float, float]) -> None:
    rng = np.random.default_rng(1)
    array = rng.standard_normal((18, 20, 16)).astype(np.float32)
    source, target = (
        Grid(array.shape, oblique((0, 0, 0), (1.3, 1.0, 2.0))),
        Grid((15, 17, 13), oblique(angles, (1.4, 1.1, 1.9))),
    )
    move = np.linalg.inv(source.affine) @ target.affine
    at = np.stack(np.meshgrid(*map(np.arange, target.shape), indexing="ij")).reshape(3, -1)
    at = move[:3, :3] @ at + move[:3, 3:]
    expected = ndimage.map_coordinates(array, at, order=1, mode="nearest").reshape(target.shape)
    outside = ((at < -0.5) | (at > np.array(source.shape)[:, None] - 0.5)).any(0).reshape(target.shape)
    expected[outside] = -7.0
    got = resample(array, source, target, fill=-7.0, antialias=False).numpy()
    edge = (np.abs(at + 0.5) < 1e-3) | (np.abs(at - np.array(source.shape)[:, None] + 0.5) < 1e-3)
    inside = ~edge.any(0).reshape(target.shape)
    np.testing.assert_allclose(got[inside], expected[inside], atol=2e-4)


def test_resampling_agrees_with_simpleitk() -> None:
    sitk = pytest.importorskip("SimpleITK")
    array = np.random.default_rng(2).standard_normal((14, 15, 16)).astype(np.float32)
    source, target = (
        Grid(array.shape, oblique((0, 0, 15), (2, 2, 3))),
        Grid((12, 12, 14), oblique((5, 0, 0), (2.2, 2.1, 2.8))),
    )

    def itk(grid: Grid, values: np.ndarray):
        image = sitk.GetImageFromArray(values.transpose(2, 1, 0))
        lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ grid.affine
        image.SetSpacing(grid.spacing)
        image.SetDirection((lps[:3, :3] / np.asarray(grid.spacing)).ravel())
        image.SetOrigin(lps[:3, 3])
        return image

    reference = itk(target, np.zeros(target.shape, np.float32))
    moved = sitk.Resample(itk(source, array), reference, sitk.Transform(), sitk.sitkLinear, -9.0)
    expected = sitk.GetArrayFromImage(moved).transpose(2, 1, 0)
    got = resample(array, source, target, fill=-9.0, antialias=False).numpy()
    inside = (expected != -9.0) & (got != -9.0)
    assert inside.mean() > 0.2
    np.testing.assert_allclose(got[inside], expected[inside], atol=1e-3)


def test_blocks_of_planes_give_the_same_voxels() -> None:
    array = np.random.default_rng(3).standard_normal((20, 16, 18)).astype(np.float32)
    source, target = (
        Grid(array.shape, oblique((0, 0, 0), (1, 1, 1))),
        Grid((30, 12, 14), oblique((8, 3, -5), (0.6, 1.2, 1.1))),
    )
    whole = resample(array, source, target)
    parts = [resample(array, source, target.crop(0, a, a + 10)) for a in (0, 10, 20)]
    torch.testing.assert_close(torch.cat(parts), whole)
    block = resample(array[5:15], source.crop(0, 5, 15), source.crop(0, 6, 9))
    np.testing.assert_array_equal(block.numpy(), array[6:9])


def test_coarser_grids_are_smoothed_first() -> None:
    checker = (np.indices((32, 32, 32)).sum(0) % 2).astype(np.float32)
    source = Grid(checker.shape, np.eye(4))
    coarse = network_grid(source, spacing=(4, 4, 4))
    assert float(resample(checker, source, coarse).std()) < 0.02
    assert float(resample(checker, source, coarse, antialias=False).mean() - 0.5) < 0.5


def test_one_product_is_smoothing_and_then_interpolating() -> None:
    module = sys.modules["mome.volumes.resampling"]
    array = torch.from_numpy(np.random.default_rng(4).standard_normal((2, 23, 26, 15)))
    source = Grid(tuple(array.shape[1:]), np.diag([0.9, 1.1, 1.0, 1]))
    target = Grid((6, 9, 5), np.array([[3.7, 0, 0, -0.5], [0, 2.9, 0, 1.3], [0, 0, -2.8, 14.6], [0, 0, 0, 1]]))
    samplings = parallel_axes(source, target)
    for axis, sampling in enumerate(samplings):
        factor = abs(sampling.step)
        expected = module._along(module._smooth(array, axis + 1, factor), axis + 1, sampling.at, "linear")
        found = module._multiplied(array, module._matrix(sampling, factor), axis + 1)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mode", ["linear", "nearest"])
@pytest.mark.parametrize("spacing", [(1.5, 1.5, 1.5), (4.0, 4.0, 4.0), (6.0, 1.0, 3.0)])
def test_slabs_give_the_same_voxels_as_the_whole(spacing: tuple[float, float, float], mode: str, monkeypatch) -> None:
    array = np.random.default_rng(4).standard_normal((2, 21, 26, 15)).astype(np.float32)
    source = Grid(array.shape[1:], np.array([[0, 0, -2.0, 60], [2.5, 0, 0, 0], [0, -0.8, 0, 44], [0, 0, 0, 1]]))
    target = network_grid(source, spacing=spacing, orientation="LPS")
    target.affine[:3, 3] += (-7, 3.3, 1)  # partly outside
    module, sizes = sys.modules["mome.volumes.resampling"], []
    for name in ("_along", "_multiplied"):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda x, *rest, real=real: (sizes.append(x.numel()), real(x, *rest))[1])
    whole = resample(array, source, target, mode=mode, fill=-7.0)
    largest, _ = max(sizes), sizes.clear()
    monkeypatch.setattr(module, "_SLAB_VOXELS", 1)
    slabs = resample(array, source, target, mode=mode, fill=-7.0)
    torch.testing.assert_close(slabs, whole, rtol=1e-6, atol=1e-6)
    assert float(whole.min()) == -7.0 and max(sizes) < largest


def test_network_grid_refuses_nonsense() -> None:
    with pytest.raises(InputError, match="three directions"):
        network_grid(Grid((2, 2, 2), np.eye(4)), spacing=(1, 1, 1), orientation="RAR")


# -- files ---------------------------------------------------------------------------------------------------


def save(path: Path, array: np.ndarray, affine: np.ndarray | None = None) -> Path:
    nib.save(nib.Nifti1Image(array, np.eye(4) if affine is None else affine), path)
    return path


def test_reads_what_nibabel_reads(tmp_path: Path) -> None:
    array = np.random.default_rng(0).integers(-1000, 2000, (5, 6, 7)).astype(np.int16)
    affine = oblique((10, 0, 5), (1, 2, 3))
    volume = read_volume(save(tmp_path / "a.nii.gz", array, affine))
    assert volume.array.dtype == np.float32
    np.testing.assert_array_equal(volume.array, array)
    np.testing.assert_allclose(volume.affine, affine, atol=1e-5)


def test_bad_files_are_said_to_be_bad(tmp_path: Path) -> None:
    whole = save(tmp_path / "whole.nii.gz", np.random.default_rng(0).random((20, 20, 20)).astype(np.float32))
    truncated = tmp_path / "truncated.nii.gz"
    truncated.write_bytes(whole.read_bytes()[:9000])
    short = tmp_path / "short.nii"
    nib.save(nib.load(whole), tmp_path / "plain.nii")
    short.write_bytes((tmp_path / "plain.nii").read_bytes()[:5000])
    text = tmp_path / "text.nii.gz"
    text.write_text("this is not a scan")
    rgb = np.zeros((4, 4, 4), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    flat = np.zeros((4, 4, 4), np.float32)
    singular = nib.Nifti1Image(flat, None)
    singular.header.set_sform(np.diag([0.0, 1, 1, 1]), code=1)
    nib.save(singular, tmp_path / "singular.nii.gz")
    cases = {
        tmp_path / "missing.nii.gz": "no such file",
        truncated: "truncated or damaged",
        short: "truncated or damaged",
        text: "truncated or damaged|not a NIfTI",
        save(tmp_path / "rgb.nii.gz", rgb): "colour image",
        save(tmp_path / "two_d.nii.gz", np.zeros((5, 6), np.float32)): "three dimensions",
        save(tmp_path / "four.nii.gz", np.zeros((4, 4, 4, 3), np.float32)): "holds 3 volumes",
        tmp_path / "singular.nii.gz": "affine cannot be inverted",
        Path(__file__): "cannot read .py",
    }
    for path, expected in cases.items():
        with pytest.raises(InputError, match=expected) as caught:
            read_volume(path)
        assert len(str(caught.value).splitlines()) <= 3


def test_frames_and_strange_numbers(tmp_path: Path) -> None:
    four = np.stack([np.full((3, 3, 3), v, np.float32) for v in (-5, 7)], -1)
    assert read_volume(save(tmp_path / "f.nii.gz", four), frame=1).array.max() == 7
    for frame in (99, -1):
        with pytest.raises(InputError, match="the scan is one volume"):
            read_volume(save(tmp_path / "three.nii.gz", four[..., 0]), frame=frame)
    odd = np.full((3, 3, 3), 40, np.float32)
    odd[0, 0, 0], odd[0, 0, 1], odd[0, 0, 2] = np.nan, np.inf, -np.inf
    odd[1, 1, 1] = -500
    volume = read_volume(save(tmp_path / "o.nii.gz", odd))
    assert volume.array[0, 0].tolist() == [-1024, 40, -500]
    assert "3 voxels were NaN or infinite" in volume.notes[0]
    offset = read_volume(save(tmp_path / "u.nii.gz", np.full((3, 3, 3), 1064, np.int16)))
    assert "offset of 1024" in offset.notes[0]


def test_a_damaged_quaternion(tmp_path: Path) -> None:
    """nibabel: w2 should be positive. With an sform nothing is lost; without one nobody knows where the voxels are."""
    affine = oblique((10, 0, 5), (1, 2, 3))
    for code, name in ((1, "both.nii"), (0, "qform_only.nii")):
        image = nib.Nifti1Image(np.full((3, 4, 5), -50, np.float32), affine)
        image.set_sform(affine, code=code)
        image.set_qform(affine, code=1)
        nib.save(image, tmp_path / name)
        raw = bytearray((tmp_path / name).read_bytes())
        raw[256:268] = np.array([1.5, 1.5, 1.5], "<f4").tobytes()  # quatern_b, c, d
        (tmp_path / name).write_bytes(raw)
    volume = read_volume(tmp_path / "both.nii")
    assert "qform is damaged; the sform is used" in volume.notes[0]
    np.testing.assert_allclose(volume.affine, affine, atol=1e-5)
    with pytest.raises(InputError, match="qform is damaged and there is no sform"):
        read_volume(tmp_path / "qform_only.nii")
    with pytest.raises(InputError):
        read_label_table(tmp_path / "qform_only.nii")


def test_a_passed_volume_is_checked_as_a_file_is() -> None:
    odd = np.full((3, 3, 3), -500.0)
    odd[0, 0, 0] = np.nan
    once = checked_volume(Volume(odd, np.eye(4), {"qform_code": 2}, ("kept",)))
    assert once.array[0, 0, 0] == -1024 and once.array.dtype == np.float32 and once.header == {"qform_code": 2}
    assert once.notes == ("kept", "1 voxels were NaN or infinite; NaN is read as air")
    positive = checked_volume(Volume(np.full((3, 3, 3), 1064.0), np.eye(4)))
    assert len(positive.notes) == 1 and checked_volume(positive).notes == positive.notes
    for array, affine, words in (
        (np.zeros((3, 3)), np.eye(4), "three dimensions"),
        (np.zeros((3, 0, 3)), np.eye(4), "three dimensions"),
        (np.zeros((3, 3, 3)), np.zeros((4, 4)), "cannot be inverted"),
    ):
        with pytest.raises(InputError, match=words):
            checked_volume(Volume(array, affine))


def test_the_extra_for_dicom_is_named(tmp_path: Path, monkeypatch) -> None:
    for module in ("SimpleITK", "pydicom"):
        monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / "series").mkdir()
    (tmp_path / "series" / "a.dcm").write_bytes(b"\0" * 128 + b"DICM")
    with pytest.raises(InputError, match=r'pip install "mome\[dicom\]"'):
        read_volume(tmp_path / "series")
    # NRRD and MetaImage are read without another package.
    save_mha(tmp_path / "a.mha"), save_nrrd(tmp_path / "a.nrrd")
    assert np.array_equal(read_volume(tmp_path / "a.mha").array, read_volume(tmp_path / "a.nrrd").array)


@pytest.mark.parametrize("ending", [".nrrd", ".nhdr", ".mha", ".mhd"])
def test_headers_with_the_voxels_in_another_file(tmp_path: Path, ending: str) -> None:
    sitk = pytest.importorskip("SimpleITK")
    array = np.random.default_rng(0).integers(-1000, 2000, (5, 6, 7)).astype(np.int16)
    image = sitk.GetImageFromArray(array.transpose(2, 1, 0))
    image.SetSpacing((1.0, 2.0, 3.0))
    sitk.WriteImage(image, str(tmp_path / f"ct{ending}"))
    volume = read_volume(tmp_path / f"ct{ending}")
    np.testing.assert_array_equal(volume.array, array)
    assert volume.spacing == (1.0, 2.0, 3.0) and volume.grid.orientation == "LPS"


FORMATS = {
    "1slice_ct.nii.gz": (122, 101, 1),
    "4d_1vol_ct.nii.gz": (122, 101, 30),
    "4d_2vol_ct.nii.gz": "holds 2 volumes",
    "float64_nan_inf_ct.nii.gz": (122, 101, 30),
    "nifti2_ct.nii.gz": (122, 101, 30),
    "sform_qform_conflict_ct.nii.gz": (122, 101, 30),
    "slope0p5_qform_only_ct.nii.gz": (122, 101, 30),
    "tptbox_L3_ct.nii.gz": (73, 47, 73),
    "uint16_offset1024_noslope_ct.nii.gz": (122, 101, 30),
    "cip_ct-64.nrrd": (64, 64, 79),
    "ct_lps.mha": (122, 101, 30),
    "ct_lps.nrrd": (122, 101, 30),
    "dcmqi_3slice_seg": "holds 2 DICOM series",
}


@pytest.mark.parametrize("name", FORMATS)
def test_odd_formats(name: str, ct_data: Path) -> None:
    path, expected = ct_data / "formats" / name, FORMATS[name]
    if isinstance(expected, str):
        with pytest.raises(InputError, match=expected):
            read_volume(path)
        return
    volume = read_volume(path)
    assert volume.shape == expected and np.isfinite(volume.array).all()
    if name in ("ct_lps.mha", "ct_lps.nrrd", "nifti2_ct.nii.gz"):
        same = read_volume(ct_data / "torso" / "ts_example_ct_sm.nii.gz")
        np.testing.assert_array_equal(volume.array, same.array)
        np.testing.assert_allclose(volume.affine, same.affine, atol=1e-4)


def test_masks_keep_grid_codes_and_labels(tmp_path: Path) -> None:
    affine = oblique((5, 0, 0), (1, 2, 3))
    volume = Volume(np.zeros((4, 5, 6), np.float32), affine, {"sform_code": 2, "qform_code": 1, "xyzt_units": 10})
    mask = np.random.default_rng(0).random((4, 5, 6)) > 0.5
    table = [{"id": 1, "name": "liver", "snomed": "10200004"}]
    path = write_mask(tmp_path / "deep" / "m.nii.gz", mask, volume.grid, volume.header, table)
    image = nib.load(path)
    assert image.get_data_dtype() == np.uint8 and int(image.header["sform_code"]) == 2
    np.testing.assert_array_equal(np.asarray(image.dataobj), mask)
    np.testing.assert_allclose(image.affine, affine, atol=1e-5)
    assert read_label_table(path) == table
    assert read_label_table(save(tmp_path / "n.nii.gz", np.zeros((2, 2, 2), np.uint8))) == []
    assert nib.load(write_mask(tmp_path / "w.nii.gz", mask * 300, volume.grid)).get_data_dtype() == np.uint16


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path) -> None:
    """A limit on the size of files stands in for a full disk, so that the writer meets an error of the system."""
    code = f"""
import resource, signal, numpy as np
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
import nibabel
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
from mome.volumes import Grid, write_mask
from mome.errors import OutputError
try:
    noise = np.random.default_rng(0).integers(0, 2, (40, 40, 40))
    write_mask({str(tmp_path / "m.nii.gz")!r}, noise, Grid((40, 40, 40), np.eye(4)))
except OutputError as error:
    print(error)
"""
    assert resource.RLIMIT_FSIZE is not None
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("the mask could not be written") and len(done.stdout.splitlines()) == 3
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_move_keeps_the_old_file(tmp_path: Path, monkeypatch) -> None:
    path, grid = tmp_path / "m.nii.gz", Grid((3, 3, 3), np.eye(4))
    write_mask(path, np.ones((3, 3, 3)), grid)
    before = path.read_bytes()

    def fail(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mome.atomic.os.replace", fail)
    with pytest.raises(OutputError, match="No space left"):
        write_mask(path, np.zeros((3, 3, 3)), grid)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1
