"""Augmentations of batches: image and labels agree, reruns are equal, and a patch does not depend on its batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from mome.data.augmentation import AugmentationConfig, BatchAugmentation
from mome.data.augmentations.base import Cut, Flip, ImageChange, Movement, PatchFrame
from mome.data.augmentations.metal import _back_projected, _Ellipsoid
from mome.data.counter_noise import normal_noise
from mome.errors import InputError
from mome.registry import AUGMENTATIONS
from mome.training.config_file import load_run_config

FRAME = PatchFrame(spacing=(2.0, 2.0, 3.0), left_right_axis=0, height_axis=2, hu_window=(-200.0, 300.0))
PATCH = (20, 24, 16)
NAMES = AUGMENTATIONS.names()
LABELS = ["kidney_left", "kidney_right", "liver"]


def always(name: str) -> dict[str, object]:
    """The spec of an augmentation that changes every patch."""
    chance: dict[str, object] = {"name": name, "probability": 1.0}
    return {**chance, "front_back": 1.0} if name == "flip" else chance


def pipeline(*specs: object, seed: int = 0, **settings: object) -> BatchAugmentation:
    return BatchAugmentation(AugmentationConfig(transforms=specs, **settings), LABELS, FRAME, seed)  # type: ignore[arg-type]


def blobs(count: int = 3, size: tuple[int, ...] = PATCH) -> tuple[Tensor, Tensor]:
    """Smooth images and codes that are a function of them: 2 where the image is above 0.6, 1 where it is above 0.3."""
    generator = torch.Generator().manual_seed(0)
    small = torch.rand(count, 1, 5, 5, 5, generator=generator)
    small[:, :, 0] = small[:, :, :, 0] = small[..., 0] = 0  # air on all faces, as outside of a patch
    small[:, :, -1] = small[:, :, :, -1] = small[..., -1] = 0
    volume = torch.nn.functional.interpolate(small, size=size, mode="trilinear", align_corners=True)[:, 0]
    return volume, ((volume > 0.3).int() + (volume > 0.6).int()).to(torch.uint8)


@pytest.mark.parametrize("name", NAMES)
def test_reruns_are_equal_and_a_patch_does_not_depend_on_its_batch(name: str) -> None:
    volume, codes = blobs()
    other = "blur(probability=0.0)" if name != "blur" else "noise(probability=0.0)"
    augment, again = pipeline(always(name), seed=5), pipeline(other, always(name), seed=5)
    both = augment(volume, codes, [7, 3, 4], PATCH)
    assert not torch.equal(both[0], volume)
    for one, same in zip(both, again(volume, codes, [7, 3, 4], PATCH), strict=True):
        assert torch.equal(one, same)  # neither a rerun nor another part in the list changes a draw
    alone = augment(volume[1:2], codes[1:2], [3], PATCH)
    assert torch.equal(alone[0][0], both[0][1]) and torch.equal(alone[1][0], both[1][1])
    other_seed = pipeline(always(name), seed=6)(volume, codes, [7, 3, 4], PATCH)
    assert name == "flip" or not torch.equal(other_seed[0], both[0])
    assert both[0].dtype == torch.float32 and both[1].dtype == codes.dtype
    assert both[0].min() >= 0 and both[0].max() <= 1


@pytest.mark.parametrize("name", [n for n in NAMES if issubclass(AUGMENTATIONS.part_class(n), Flip | Movement | Cut)])
def test_labels_stay_a_function_of_the_image(name: str) -> None:
    """Codes are 200 times the image; what they say stays within half a voxel of what the image shows."""
    volume, _ = blobs()
    codes = (200 * volume).round().to(torch.uint8)
    changed, labels = pipeline(always(name))(volume, codes, [0, 1, 2], PATCH)
    assert not torch.equal(labels, codes)
    steps = [volume.diff(dim=axis).abs() for axis in (1, 2, 3)]
    apart = (labels.float() / 200 - changed).abs()
    assert apart.max() < 0.5 * sum(float(step.max()) for step in steps) + 0.01
    for axis in (1, 2, 3):  # labels that lie one voxel beside the image would be noticed
        for shift in (-1, 1):
            assert (labels.roll(shift, dims=axis).float() / 200 - changed).abs().mean() > 1.5 * apart.mean()


@pytest.mark.parametrize("name", [n for n in NAMES if issubclass(AUGMENTATIONS.part_class(n), ImageChange)])
def test_changes_of_the_image_keep_the_labels(name: str) -> None:
    volume, codes = blobs()
    before = volume.clone()
    changed, labels = pipeline(always(name))(volume, codes, [0, 1, 2], PATCH)
    assert torch.equal(labels, codes) and torch.equal(volume, before)
    inside = changed[(codes == 2) & (changed < 1)].median(), changed[(codes == 0) & (changed < 1)].median()
    assert inside[0] > inside[1]


def test_all_movements_are_one_interpolation(monkeypatch: pytest.MonkeyPatch) -> None:
    volume, codes = blobs(2)
    calls = []
    real = torch.nn.functional.grid_sample

    def counted(values: Tensor, grid: Tensor, mode: str, *rest: object, **options: object) -> Tensor:
        calls.append((mode, id(grid)))
        return real(values, grid, mode, *rest, **options)  # type: ignore[arg-type]

    monkeypatch.setattr("mome.data.patch_movement.F.grid_sample", counted)
    pipeline(always("rotate"), always("scale"), always("elastic"))(volume, codes, [0, 1], PATCH)
    assert [mode for mode, _ in calls] == ["bilinear", "nearest"] * 2
    assert calls[0][1] == calls[1][1]


def test_a_rotation_is_one_in_millimetres_and_the_margin_shows_the_scan() -> None:
    """A ball stays a ball although voxels are longer than wide; with a margin, corners show the scan and not air."""
    size = (40, 40, 30)
    axes = [(torch.arange(n) - (n - 1) / 2) * step for n, step in zip(size, FRAME.spacing, strict=True)]
    distance = torch.stack(torch.meshgrid(*axes, indexing="ij")).square().sum(0).sqrt()
    ball = (30 - distance).div(10).clamp(0, 1)[None]
    moved, _ = pipeline("rotate(probability=1.0, degrees=90.0)")(ball, ball.int(), [1], size)
    assert (moved - ball).abs().max() < 0.1
    solid = torch.ones(1, *size)
    augment = pipeline("rotate(probability=1.0, degrees=40.0)", margin=0.4)
    assert augment.margin((20, 20, 15)) == (8, 8, 6) and pipeline("noise", margin=0.4).margin((20, 20, 15)) == (0, 0, 0)
    bare, _ = augment(solid, solid.int(), [1], size)
    wide = torch.ones(1, 20 + 16, 20 + 16, 15 + 12)
    shown, labels = augment(wide, wide.int(), [1], (20, 20, 15))
    assert (bare == 0).any() and shown.shape == (1, 20, 20, 15) and shown.min() > 0.99 and labels.min() == 1


def test_a_scale_zooms_about_the_centre() -> None:
    volume = torch.zeros(1, *PATCH)
    volume[:, 8:12, 10:14, 6:10] = 1
    codes = volume.int()
    augment = pipeline("scale(probability=1.0, share=0.5)")
    sizes = [float(augment(volume, codes, [number], PATCH)[0].sum()) / 64 for number in range(12)]
    assert min(sizes) < 0.7 and max(sizes) > 2.0 and all(1.5**-3 - 0.15 < size < 0.5**-3 + 0.5 for size in sizes)


def test_other_axes_keep_the_sides() -> None:
    volume, codes = blobs(1)
    augment = pipeline("flip(probability=0.0, front_back=1.0, head_foot=1.0)")
    changed, labels = augment(volume, codes, [4], PATCH)
    assert torch.equal(changed, volume.flip(2, 3)) and torch.equal(labels, codes.flip(2, 3))
    assert not augment.swaps_sides(4) and pipeline("flip(probability=1.0)").swaps_sides(4)
    assert not pipeline("flip(probability=1.0)", "flip(probability=1.0)").swaps_sides(4)  # mirrored twice


def test_noise_has_its_deviation_and_its_grain() -> None:
    keys = [(1, 2), (1, 3), (2, 2)]
    noise = normal_noise(keys, (32, 32, 33), "cpu")
    assert abs(float(noise.mean())) < 0.01 and abs(float(noise.std()) - 1) < 0.01
    assert abs(float((noise**4).mean()) - 3) < 0.1 and len(noise.unique()) > 0.99 * noise.numel()
    for axis in (1, 2, 3):
        size = noise.shape[axis] - 1
        assert abs(float((noise.narrow(axis, 0, size) * noise.narrow(axis, 1, size)).mean())) < 0.02
    assert abs(float((noise[0] * noise[1]).mean())) < 0.02 and abs(float((noise[0] * noise[2]).mean())) < 0.02
    grey = torch.full((1, 32, 32, 32), 0.5)
    for grain in (0.0, 1.5):
        augment = pipeline(f"noise(probability=1.0, hu=40.0, grain={grain})")
        spread = [float(augment(grey, grey.int(), [n], grey.shape[1:])[0].std()) * FRAME.hu_width for n in range(12)]
        assert max(spread) < 41 and max(spread) > 25 and min(spread) < 15


def test_a_window_shows_other_hu() -> None:
    """Two voxels of known HU give back the ends of the window that they were shown in."""
    volume = torch.tensor([0.4, 0.6]).expand(1, 4, 4, 2).contiguous()
    ends = []
    for number in range(10):
        changed, _ = pipeline("window(probability=1.0, hu=50.0)")(volume, volume.int(), [number], (4, 4, 2))
        low, high = changed[0, 0, 0].tolist()
        width = (0.6 - 0.4) * FRAME.hu_width / (high - low)
        ends.append((0.4 * FRAME.hu_width - 200 - low * width, width))
    lows, highs = np.array([a for a, _ in ends]), np.array([a + w for a, w in ends])
    assert np.all(abs(lows + 200) <= 50.1) and np.all(abs(highs - 300) <= 50.1)
    assert np.ptp(lows) > 20 and np.ptp(highs) > 20


def test_a_kernel_softens_or_sharpens_the_axial_plane_alone() -> None:
    edge = torch.zeros(1, 16, 16, 8)
    edge[:, 8:] = 0.5
    edge += 0.25
    steps = []
    for number in range(16):
        changed, _ = pipeline("kernel(probability=1.0)")(edge, edge.int(), [number], edge.shape[1:])
        steps.append(float(changed[0, 8, 8, 4] - changed[0, 7, 8, 4]))
    assert min(steps) < 0.45 and max(steps) > 0.55
    height = torch.zeros(1, 16, 16, 8)
    height[..., 4:] = 0.5
    assert torch.allclose(pipeline(always("kernel"))(height, height.int(), [1], height.shape[1:])[0], height, atol=1e-6)


def test_low_resolution_averages_along_the_body() -> None:
    generator = torch.Generator().manual_seed(1)
    volume = torch.rand(1, 16, 16, 24, generator=generator)
    changed, _ = pipeline("low_resolution(probability=1.0, factor=4.0)")(volume, volume.int(), [2], volume.shape[1:])
    assert changed.diff(dim=3).std() < 0.7 * volume.diff(dim=3).std()
    columns = torch.rand(1, 16, 16, 1, generator=generator).expand(1, 16, 16, 24).contiguous()
    kept, _ = pipeline("low_resolution(probability=1.0, factor=4.0)")(columns, columns.int(), [2], volume.shape[1:])
    assert torch.allclose(kept, columns, atol=1e-5)


def test_the_streaks_of_metal_follow_from_its_projections() -> None:
    """Filtered back-projection of the path lengths through a disc gives back the disc; streaks join two pieces."""
    disc = _Ellipsoid((0.0, 4.0, -6.0), (5.0, 8.0, 8.0))
    axis = torch.arange(-20.0, 21.0)
    angles = [np.pi * view / 90 for view in range(90)]
    half = 32
    offsets = torch.arange(-half, half + 1).float()
    paths = torch.stack([disc.path(torch.zeros(1), offsets, angle) for angle in angles], dim=1)
    image = _back_projected(paths, axis, axis, angles, 1.0, half)[0]
    distance = ((axis[:, None] - 4) ** 2 + (axis[None] + 6) ** 2).sqrt()
    assert torch.allclose(image[distance < 6], torch.ones(()), atol=0.08)
    assert image[distance > 11].abs().max() < 0.1
    assert disc.inside(torch.zeros(1), axis, axis)[0].eq(distance <= 8).all()

    grey = torch.full((1, 32, 32, 16), 0.5)
    augment = pipeline("metal(probability=1.0, pieces=2, mm=8.0)")
    bright, dark = [], []
    for number in range(6):
        changed, _ = augment(grey, grey.int(), [number], grey.shape[1:])
        bright.append(int((changed == 1).sum()))
        dark.append(float(changed.min()))
    assert max(bright) > 20 and min(dark) < 0.4 and min(dark) >= 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("name", NAMES)
def test_a_gpu_gives_the_patches_of_the_cpu(name: str) -> None:
    volume, codes = blobs()
    augment = pipeline(always(name))
    wanted, labels = augment(volume, codes, [0, 1, 2], PATCH)
    found, same = augment(volume.cuda(), codes.cuda(), [0, 1, 2], PATCH)
    # Half an HU; a place or a surface that rounds to the other side may differ.
    assert found.is_cuda and ((found.cpu() - wanted).abs() > 1e-3).float().mean() < 1e-3
    assert (same.cpu() != labels).float().mean() < 1e-3


@pytest.mark.parametrize(
    ("specs", "words"),
    [
        (["rotat"], "unknown augmentation 'rotat', did you mean 'rotate'"),
        (["rotate(degree=5)"], "has no argument 'degree', did you mean 'degrees'"),
        (["rotate(degrees=400.0)"], "rotate.degrees is from 0 to 180"),
        (["noise(probability=1.5)"], "probability is from 0 to 1"),
        (["elastic(mm=10.0, distance=20.0)"], "a distance of at least 4 × mm, got 20 and 10"),
        (["window(hu=300.0)"], "by less than half of it, got 300"),
    ],
)
def test_bad_augmentations_are_refused(specs: list[str], words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        pipeline(*specs)
    assert len(str(caught.value).splitlines()) <= 3


def test_a_configuration_lists_augmentations_or_uses_the_short_keys(tmp_path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "labels: [liver]\naugmentation:\n  margin: 0.1\n  transforms: [flip, 'rotate(degrees=20, probability=0.5)']\n"
    )
    run = load_run_config(path, [])
    assert run.augmentation.specs(500.0) == ["flip", "rotate(degrees=20, probability=0.5)"]
    for override, words in (
        ("augmentation.mirror=0.3", "augmentation.mirror has no effect beside augmentation.transforms"),
        ("augmentation.transforms=[flipp]", "did you mean 'flip'"),
    ):
        with pytest.raises(InputError, match=words):
            load_run_config(path, [override])
    path.write_text("labels: [liver]\naugmentation: {mirror: 0.2, affine: 0.3, noise: 0.04, slab: 0.1}\n")
    specs = {spec["name"]: spec for spec in load_run_config(path, []).augmentation.specs(500.0)}
    assert specs["flip"]["probability"] == 0.2 and specs["rotate"] == {
        "name": "rotate",
        "probability": 0.3,
        "degrees": 10.0,
    }
    assert specs["noise"]["hu"] == 20.0 and specs["slab"]["probability"] == 0.1 and specs["blur"]["probability"] == 0


def test_mirroring_that_cannot_be_done_is_said() -> None:
    one_side = ["kidney_left", "liver"]

    def notes(labels: list[str], *specs: str) -> list[str]:
        return BatchAugmentation(AugmentationConfig(transforms=specs), labels, FRAME).notes

    assert notes(one_side, "flip") == ["left and right are not mirrored: kidney_left is trained without its other side"]
    assert not notes(LABELS, "flip") and not notes(one_side, "noise")
    assert not notes(one_side, "flip(probability=0.0, head_foot=0.5)")
