"""Files beside the masks of a study: pages, previews, maps of probability, entropy and router disagreement."""

from __future__ import annotations

import math
import threading
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from small_models import liver_and_spleen
from small_scans import patient_affine, patient_hu, save_patient
from stand_in_models import Contrast

from mome import create_model
from mome.errors import InputError
from mome.inference import Segmenter, segment_folder
from mome.inference.disagreement import RouterWatch, on_scan, relative_entropy, watched_routers
from mome.inference.fingerprint import scan_identity
from mome.inference.mirror import MirrorPredictor
from mome.inference.predictor import ModelPredictor
from mome.inference.stream import stream_logits
from mome.inference.study_files import KINDS, checked_kinds, file_names
from mome.inference.uncertainty_files import entropy_of_bytes
from mome.processing import MoMEProcessor
from mome.routers.shares import shares_of_tokens
from mome.volumes import Grid, Volume

PROCESSOR = MoMEProcessor(spacing=[9, 9, 9], hu_window=(-1000, 1000))


def model() -> Contrast:
    return Contrast(("liver", "spleen"), (0.3, 0.6), 16)


def sparse_model():
    torch.manual_seed(0)
    return create_model("mome_ct_tiny").eval()


def test_a_study_gets_its_files_and_keeps_them(tmp_path: Path) -> None:
    save_patient(tmp_path / "in" / "a.nii.gz")
    out = tmp_path / "out"
    kinds = ["html", "preview", "probabilities", "entropy"]
    segmenter = Segmenter(model(), PROCESSOR)
    (entry,) = segment_folder(segmenter, [tmp_path / "in"], out, ["liver", "spleen"], files=kinds)
    assert entry["status"] == "done" and entry["file_kinds"] == kinds
    names = file_names(kinds, "a", ["liver", "spleen"])
    assert entry["files"] == names and all((out / name).is_file() for name in names)
    assert "a.html" in names and "entropy/a_spleen.nii.gz" in names
    assert {p.name for p in out.glob("*.nii.gz")} == {"a_liver.nii.gz", "a_spleen.nii.gz"}
    mask = np.asarray(nib.load(out / "a_liver.nii.gz").dataobj)
    image = nib.load(out / "probabilities" / "a_liver.nii.gz")
    probability = image.get_fdata()
    assert image.get_data_dtype() == np.uint8 and 0 <= probability.min() and probability.max() <= 1.0001
    assert np.array_equal(probability > 0.5, mask > 0) and np.allclose(image.affine, patient_affine())
    bits = nib.load(out / "entropy" / "a_liver.nii.gz").get_fdata()
    p = probability.clip(1e-12, 1 - 1e-12)
    assert np.abs(bits - -(p * np.log2(p) + (1 - p) * np.log2(1 - p))).max() < 0.003
    # a resumed run keeps them, makes what is missing, and a new run refuses files that are not of this scan
    again = segment_folder(segmenter, [tmp_path / "in"], out, ["liver", "spleen"], files=kinds, resume=True)
    assert again[0]["skipped"]
    (out / "a.html").unlink()
    (entry,) = segment_folder(segmenter, [tmp_path / "in"], out, ["liver", "spleen"], files=kinds, resume=True)
    assert not entry.get("skipped") and (out / "a.html").is_file()
    segment_folder(segmenter, [tmp_path / "in"], out, ["liver", "spleen"], files=kinds)
    other = tmp_path / "other"
    other.mkdir()
    (other / "a.html").write_text("mine")
    with pytest.raises(InputError, match="no report here says that it is of this scan"):
        segment_folder(segmenter, [tmp_path / "in"], other, ["liver"], files=["html"])
    assert (other / "a.html").read_text() == "mine"


def test_kinds_are_checked() -> None:
    assert checked_kinds(["preview", "html", "html"]) == ("html", "preview") and checked_kinds([]) == ()
    with pytest.raises(InputError, match="did you mean 'entropy'"):
        checked_kinds(["entropie"])
    from mome.cli.result_options import _FILES

    assert list(_FILES) == list(KINDS)


def test_entropy_is_largest_where_nothing_is_known() -> None:
    table = entropy_of_bytes(np.arange(256, dtype=np.uint8))
    assert table[0] == table[255] == 0 and table[127] == table[128] == 255
    assert np.array_equal(table, table[::-1]) and np.all(np.diff(table[:128].astype(int)) >= 0)


def test_relative_entropy() -> None:
    shares = torch.tensor([[0.25] * 4, [1.0, 0, 0, 0], [0.5, 0.5, 0, 0], [0.0] * 4])
    assert torch.allclose(relative_entropy(shares), torch.tensor([1.0, 0.0, 0.5, 0.0]))


def test_disagreement_is_the_mean_entropy_of_the_routers() -> None:
    """One tile, watched by hand; the logits are those without the watch, mirrored copies do not count."""
    network = sparse_model()
    patch = tuple(network.config.patch_size)
    volume = torch.rand(1, 1, *patch, generator=torch.Generator().manual_seed(0))
    text = network.prompt_rows(torch.zeros(1, network.text_bank.rows_LT.shape[1]), ["liver"])
    seen = []
    hooks = [
        router.register_forward_hook(lambda _, given, routing: seen.append((given[1].stride, given[0], routing)))
        for router in watched_routers(network).values()
    ]
    plain = [planes for _, planes in stream_logits(ModelPredictor(network), volume, text)]
    for hook in hooks:
        hook.remove()
    expected = torch.zeros(patch)
    for stride, x_BDHWC, routing in seen:
        shares = shares_of_tokens(routing)
        entropy = -(shares * shares.clamp(min=1e-30).log()).sum(1) / math.log(shares.shape[1])
        expected += torch.nn.functional.interpolate(
            entropy.view(1, 1, *x_BDHWC.shape[1:4]), scale_factor=tuple(map(float, stride))
        )[0, 0] / len(seen)
    with RouterWatch(ModelPredictor(network), network, patch) as watch:
        watched = [planes for _, planes in stream_logits(watch, volume, text)]
    assert all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True))
    assert torch.allclose(watch.result(), expected, atol=1e-5) and 0 < expected.mean() < 1.0001
    mirrored = MirrorPredictor(ModelPredictor(network), ("lr",), "RAS").for_volume(patch)
    with RouterWatch(mirrored, network, patch) as both:
        list(stream_logits(both, volume, torch.stack([text, text], dim=1)))
    assert torch.allclose(both.result(), expected, atol=1e-5)
    grid = Grid(patch, np.eye(4))
    assert np.array_equal(on_scan(expected, grid, grid), np.rint(expected.numpy() * 255).astype(np.uint8))


def test_a_tile_that_is_computed_again_counts_once_in_the_disagreement() -> None:
    network = sparse_model()
    depth, height, width = network.config.patch_size
    tiles = torch.rand(2, 1, depth, height, width, generator=torch.Generator().manual_seed(0))
    found = []
    for repeats in (1, 3):
        with RouterWatch(ModelPredictor(network), network, (depth, height, width * 3 // 2)) as watch:
            for _ in range(repeats):
                watch.encode(tiles[:1], (0, 0, 0))
            watch.encode(tiles[1:], (0, 0, width // 2))
        found.append(watch.result())
    assert torch.equal(found[0], found[1])


def test_the_disagreement_of_another_thread_is_not_watched() -> None:
    """Hooks see all calls of a router, so that tiles of a scan in another thread were mixed into the map."""
    network = sparse_model()
    patch = tuple(network.config.patch_size)
    tile, other = torch.rand(2, 1, 1, *patch, generator=torch.Generator().manual_seed(0))

    class Interrupted(ModelPredictor):
        def encode(self, tile_B1DHW: torch.Tensor, origin: tuple[int, int, int]) -> object:
            thread = threading.Thread(target=lambda: ModelPredictor(network).encode(other, origin))
            thread.start()
            thread.join()
            return super().encode(tile_B1DHW, origin)

    found = []
    for predictor in (ModelPredictor(network), Interrupted(network)):
        with RouterWatch(predictor, network, patch) as watch:
            watch.encode(tile, (0, 0, 0))
        found.append(watch.result())
    assert torch.equal(found[0], found[1])


def test_files_beside_the_slices_are_no_part_of_the_scan(tmp_path: Path) -> None:
    (tmp_path / "1.dcm").write_bytes(b"a slice")
    before = scan_identity(tmp_path)
    written = "liver.nii.gz report.json problems.json statistics.csv volumes.csv ct.html ct_preview.png"
    of_systems = ".DS_Store ._1.dcm Thumbs.db desktop.ini DICOMDIR .ct.claim"  # a look at the folder made another scan
    for name in (*written.split(), *of_systems.split()):
        (tmp_path / name).write_text("x")
    assert scan_identity(tmp_path) == before
    (tmp_path / "2.dcm").write_bytes(b"another")
    assert scan_identity(tmp_path) != before


def test_models_without_routers_are_refused(tmp_path: Path) -> None:
    dense = liver_and_spleen()
    volume = Volume(patient_hu().astype(np.float32), patient_affine())
    with pytest.raises(InputError, match="no sparse layer"):
        Segmenter(dense, PROCESSOR).segment(volume, ["liver"], disagreement=True)
    save_patient(tmp_path / "a.nii.gz")
    with pytest.raises(InputError, match="no sparse layer"):
        segment_folder(
            Segmenter(dense, PROCESSOR), [tmp_path / "a.nii.gz"], tmp_path, ["liver"], files=["disagreement"]
        )
