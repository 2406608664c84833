"""Inference: the stream equals the plain computation, masks lie on the scan's grid, a folder run survives errors."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.inferers import sliding_window_inference
from scipy.spatial.transform import Rotation
from stand_in_models import Contrast

from mome.errors import InputError, OutputError
from mome.inference import Segmenter, segment, segment_folder
from mome.inference.packed import PackedMasks
from mome.inference.planes import PlaneStream
from mome.inference.predictor import ModelPredictor
from mome.inference.stream import stream_logits
from mome.inference.tiles import tile_starts, tile_steps
from mome.processing import MoMEProcessor
from mome.volumes import Grid, Volume, read_label_table, read_volume, resample
from mome.volumes.fast_gzip import GzipWriter
from mome.volumes.mask_names import file_part
from mome.zoo import create_model

PATCH = (16, 16, 16)


def processor(spacing: float = 2.0) -> MoMEProcessor:
    return MoMEProcessor(spacing=[spacing] * 3, hu_window=[-100, 100])


def affine(angles: tuple[float, float, float], spacing: tuple[float, float, float]) -> np.ndarray:
    out = np.eye(4)
    out[:3, :3] = Rotation.from_euler("xyz", angles, degrees=True).as_matrix() * spacing
    out[:3, 3] = (5, -30, 12)
    return out


PERMUTED = np.array([[0, 0, -2, 60], [2.5, 0, 0, 0], [0, -2, 0, 44], [0, 0, 0, 1.0]])
AFFINES = {
    "straight": affine((0, 0, 0), (2, 2, 2)),
    "permuted": PERMUTED,
    "oblique": affine((20, -15, 30), (2, 1.8, 2.4)),
    "steep": affine((40, 40, 10), (1.6, 2, 2)),
}


def blobs(grid_affine: np.ndarray, shape: tuple[int, int, int] = (30, 34, 26)) -> Volume:
    """Returns a scan of smooth random HU."""
    from scipy.ndimage import gaussian_filter

    noise = gaussian_filter(np.random.default_rng(0).standard_normal(shape), 3)
    return Volume((noise / noise.std() * 60).astype(np.float32), grid_affine)


@pytest.mark.parametrize("name", AFFINES)
@pytest.mark.parametrize("overlap", [0.0, 0.5])
def test_stream_equals_the_plain_computation(name: str, overlap: float) -> None:
    """The reference keeps all logits and resamples them once, which needs too much memory for a large scan."""
    model, proc, scan = Contrast(), processor(), blobs(AFFINES[name])
    result = Segmenter(model, proc, overlap=overlap, exact=True).segment(scan, ["liver", "spleen"])
    rounded = Segmenter(model, proc, overlap=overlap).segment(scan, ["liver", "spleen"])
    network, grid = proc.to_network(scan)
    chunks = list(stream_logits(ModelPredictor(model), network, torch.eye(2), overlap=overlap))
    assert [first for first, _ in chunks] == list(np.cumsum([0] + [c.shape[1] for _, c in chunks[:-1]]))
    whole = torch.cat([chunk for _, chunk in chunks], dim=1)
    torch.testing.assert_close(whole[0], (network[0, 0] - 0.4) * 20, rtol=1e-4, atol=1e-4)
    expected = resample(whole, grid, scan.grid, fill=-30.0, antialias=False) > 0
    for index, prompt in enumerate(("liver", "spleen")):
        mask = result.masks[prompt]
        assert mask.shape == scan.shape and 0 < mask.sum() < mask.size
        assert np.array_equal(mask.astype(bool), expected[index].numpy())
        # By default, sums of logits are kept in float16.
        assert (rounded.masks[prompt] != mask).sum() <= 0.002 * mask.sum()


def test_planes_are_dropped_once_read() -> None:
    """Where the grids are parallel, only a few planes are held at once."""
    network, output = Grid((200, 8, 8), np.eye(4)), Grid((100, 8, 8), np.diag([2.0, 1, 1, 1]))
    stream, seen = PlaneStream(network, output), []
    for first in range(0, 200, 10):
        ready = stream.push(first, torch.full((1, 10, 8, 8), float(first)))
        if ready is not None:
            seen += list(ready.planes)
            block = resample(ready.logits, ready.source, ready.target, antialias=False)
            assert block.shape == (1, len(ready.planes), 8, 8)
    assert seen == list(range(100)) and stream.most_planes <= 12


def test_sliding_window_agrees_with_monai() -> None:
    torch.manual_seed(0)
    model = create_model(
        "mome_ct_tiny",
        encoder="unet(channels=[4, 8])",
        dim=8,
        patch_size=list(PATCH),
        head="dynamic(hidden=8)",
    ).eval()
    text = torch.randn(3, model.config.text_dim)
    volume = torch.rand(1, 1, 32, 24, 16)
    ours = torch.cat([c for _, c in stream_logits(ModelPredictor(model), volume, text, overlap=0.5)], dim=1)
    with torch.inference_mode():
        theirs = sliding_window_inference(
            volume, PATCH, 1, lambda tile: model(tile, text).logits, overlap=0.5, mode="gaussian"
        )[0]
    # MONAI's tiles start where ours do where half of a tile divides the volume; its Gaussian has the same width.
    assert (ours - theirs).abs().max() < 0.02 * theirs.abs().max()
    assert ((ours > 0) == (theirs > 0)).float().mean() > 0.995


def test_one_encoder_pass_per_tile_for_all_prompts() -> None:
    model, scan = Contrast(), blobs(AFFINES["straight"], (32, 32, 32))
    Segmenter(model, processor(), overlap=0.0, prompt_chunk=1).segment(scan, ["liver", "spleen"])
    assert model.encoded == 8


def test_tile_starts() -> None:
    def starts(size: int, overlap: float) -> list[int]:
        return tile_starts(size, 16, tile_steps((size,) * 3, (16,) * 3, overlap)[0])

    assert starts(10, 0.5) == [0]
    assert starts(40, 0.5) == [0, 8, 16, 24]
    assert starts(41, 0.5) == [0, 7, 14, 21, 25]
    assert starts(27, 0.25) == [0, 11] and starts(29, 0.25) == [0, 7, 13]
    # Enough overlap, as few tiles as that takes, and the same tiles in every part that begins and ends with one.
    for size in range(17, 130):
        step, tiles = tile_steps((size,) * 3, (16,) * 3, 0.3)[0], starts(size, 0.3)
        gaps = [b - a for a, b in zip(tiles, tiles[1:], strict=False)]
        assert max(gaps) <= 11 and len(gaps) <= -(-(size - 16) // 11) and tiles[-1] == size - 16
        for first, last in itertools.combinations(range(len(tiles)), 2):
            part = tile_starts(tiles[last] - tiles[first] + 16, 16, step)
            assert [tiles[first] + start for start in part] == tiles[first : last + 1]


def test_packed_masks_round_trip() -> None:
    rng = np.random.default_rng(0)
    for axis in range(3):
        mask = rng.random((5, 7, 3)) > 0.5
        packed = PackedMasks(["a"], mask.shape, axis)
        order = list(range(mask.shape[axis]))
        packed.write("a", order[2:], np.take(mask, order[2:], axis))
        packed.write("a", order[:2], np.take(mask, order[:2], axis))
        assert np.array_equal(packed["a"], mask) and packed.voxels["a"] == mask.sum()


def test_masks_on_disk(tmp_path: Path) -> None:
    scan = blobs(AFFINES["oblique"])
    result = Segmenter(Contrast(), processor()).segment(scan, ["liver", "spleen", "lien"])
    assert [p.name for p in result.prompts] == ["liver", "spleen"]
    paths = result.save(tmp_path, "case")
    assert [p.name for p in paths] == ["case_liver.nii.gz", "case_spleen.nii.gz"]
    image = nib.load(paths[0])
    np.testing.assert_allclose(image.affine, scan.affine, atol=1e-5)
    assert image.shape == scan.shape and read_label_table(paths[1])[0]["name"] == "spleen"
    (multi,) = result.save(tmp_path / "m", "case", multilabel=True)
    ids = {entry["name"]: entry["id"] for entry in read_label_table(multi)}
    numbers = np.asarray(nib.load(multi).dataobj)
    # The smaller structure is written over the larger one, which contains it here.
    assert np.array_equal(numbers == ids["spleen"], result.masks["spleen"].astype(bool))
    assert result.label_map()[2] == result.masks["spleen"].sum()


def test_a_map_of_ids_says_what_it_holds(tmp_path: Path) -> None:
    """The volumes were those before overlaps were resolved, and nothing said so."""
    scan = blobs(AFFINES["oblique"])
    result = Segmenter(Contrast(), processor()).segment(scan, ["liver", "spleen"], statistics=True)
    result.save(tmp_path, "case")
    assert result.voxels_in_map is None and "voxels_in_map" not in result.summary()[0]
    (path,) = result.save(tmp_path, "case", multilabel=True)
    numbers, ids = np.asarray(nib.load(path).dataobj), {e["name"]: e["id"] for e in read_label_table(path)}
    held = {name: int((numbers == number).sum()) for name, number in ids.items()}
    both = int((result.masks["liver"] & result.masks["spleen"]).sum())
    assert both and held["liver"] == result.masks.voxels["liver"] - both
    assert result.voxels_in_map == held and result.overlapping_voxels == both
    voxel_ml = abs(np.linalg.det(scan.affine[:3, :3])) / 1000
    for entry in result.summary():
        name = entry["name"]
        assert entry["volume_ml"] == pytest.approx(result.masks.voxels[name] * voxel_ml, abs=1e-3)
        assert entry["volume_ml_in_map"] == pytest.approx(held[name] * voxel_ml, abs=1e-3)
        found = result.statistics[name]
        assert found["voxels"] == result.masks.voxels[name] and found["voxels_in_map"] == held[name]
    array, table, overlap = result.label_map({"liver": 300, "spleen": 2})
    assert array.dtype == np.uint16 and overlap == both and [entry["id"] for entry in table] == [300, 2]
    assert {300: held["liver"], 2: held["spleen"]} == {n: int((array == n).sum()) for n in (300, 2)}
    # Such ids would give a map that says something else than it holds.
    for number in (1, 0, 65536, 1.5, True):
        with pytest.raises(InputError, match="ids are different whole numbers from 1 to 65535"):
            result.label_map({"liver": number, "spleen": 1})
    with pytest.raises(InputError, match="ids holds no id of 'spleen'"):
        result.label_map({"liver": 1})
    named, labels, _ = result.label_map({"hepar": 300, " Spleen": 2, "aorta": 2})  # as `masks` takes them
    assert (named == array).all() and labels == table
    with pytest.raises(InputError, match="two numbers for 'liver'"):
        result.label_map({"liver": 1, "hepar": 3, "spleen": 2})
    for wrong in (5, ["liver", "spleen"]):
        with pytest.raises(InputError, match="ids is a dict"):
            result.label_map(wrong)


def test_masks_of_another_scan_are_not_replaced(tmp_path: Path) -> None:
    """They were, without a word, where two scans had the same name."""
    segmenter = Segmenter(Contrast(), processor())
    first, other = (segmenter.segment(blobs(AFFINES[name]), ["liver"]) for name in ("straight", "oblique"))
    (path,) = first.save(tmp_path, "case")
    before = path.read_bytes()
    with pytest.raises(InputError, match="lies on another grid than this scan: .*\n  in: .*case_liver"):
        other.save(tmp_path, "case")
    assert path.read_bytes() == before and first.save(tmp_path, "case") == [path]  # its own may be made again
    assert other.save(tmp_path, "case", overwrite=True) == [path] and path.read_bytes() != before
    path.write_bytes(path.read_bytes()[:20])
    assert first.save(tmp_path, "case") == [path] and path.read_bytes() == before


def test_a_failing_write_leaves_no_masks(tmp_path: Path, monkeypatch) -> None:
    result = Segmenter(Contrast(), processor()).segment(blobs(AFFINES["straight"]), ["liver", "spleen"])
    real, calls = GzipWriter.close, []

    def fail_second(writer: GzipWriter) -> None:
        calls.append(writer)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        real(writer)

    monkeypatch.setattr(GzipWriter, "close", fail_second)
    with pytest.raises(OutputError, match="No space left"):
        result.save(tmp_path, "case")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("prompt", ["../../etc/passwd", "a/b", "..", "x\x00y", "liver; rm -rf"])
def test_a_prompt_never_becomes_a_path(prompt: str) -> None:
    try:
        part = file_part(prompt)
    except InputError:
        return
    assert "/" not in part and not part.startswith(".") and Path(part).name == part


def test_folder_goes_on_after_a_broken_study_and_resumes(tmp_path: Path) -> None:
    scans, out = tmp_path / "scans", tmp_path / "out"
    scans.mkdir()
    for name in ("a", "c"):
        nib.save(nib.Nifti1Image(blobs(AFFINES["straight"]).array, AFFINES["straight"]), scans / f"{name}.nii.gz")
    (scans / "b.nii.gz").write_bytes(b"broken")
    segmenter = Segmenter(Contrast(), processor())
    entries = segment_folder(segmenter, [scans], out, ["liver"])
    assert [e["status"] for e in entries] == ["done", "failed", "done"]
    report = json.loads((out / "report.json").read_text())["studies"]
    assert report == entries and str(tmp_path) not in json.dumps([e for e in report if e["status"] == "done"])
    (out / "c_liver.nii.gz").unlink()
    again = segment_folder(segmenter, [scans], out, ["liver"], resume=True)
    assert [e.get("skipped", False) for e in again] == [True, False, False]
    assert (out / "c_liver.nii.gz").is_file()
    other = segment_folder(segmenter, [scans], out, ["spleen"], resume=True)
    assert not any(e.get("skipped") for e in other)


def test_bad_settings_are_refused() -> None:
    for options, words in (
        ({"overlap": 1.0}, "overlap"),
        ({"precision": "int3"}, "precision"),
        ({"device": "gpu"}, "device"),
    ):
        with pytest.raises(InputError, match=words):
            Segmenter(Contrast(), processor(), **options)
    with pytest.raises(InputError, match="processor"):
        Segmenter(Contrast())
    with pytest.raises(InputError, match="no prompt"):
        segment(blobs(np.eye(4)), [], Contrast(), processor())


def test_a_scan_smaller_than_a_tile_and_one_slice() -> None:
    for shape in ((5, 6, 7), (9, 8, 1)):
        scan = Volume(np.full(shape, 90, np.float32), np.diag([2.0, 2, 2, 1]))
        assert Segmenter(Contrast(), processor()).segment(scan, ["liver"]).masks["liver"].all()


def test_real_scan(ct_data: Path) -> None:
    """A threshold at soft tissue finds most of the body of the torso scan, on the scan's own grid."""
    path = ct_data / "torso" / "ts_example_ct.nii.gz"
    result = segment(path, ["liver"], Contrast(("liver",), (0.3,)), processor(6.0))
    volume = read_volume(path)
    truth = volume.array > -40
    mask = result.masks["liver"].astype(bool)
    assert mask.shape == volume.shape
    assert 2 * (mask & truth).sum() / (mask.sum() + truth.sum()) > 0.8
