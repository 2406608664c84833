"""Looking inside: tiles, regions and loads against direct computation, the pictures, and the command."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import throwaway_parts
import torch
from matplotlib import image as mpl_image
from scipy.spatial.transform import Rotation
from small_models import small
from small_scans import save_patient

from mome import MoME
from mome.cli.main import main
from mome.inference import Segmenter
from mome.inference.scan_grid import scan_grid
from mome.inference.tiles import gaussian_window
from mome.inspection.inspect import inspect
from mome.inspection.palette import OTHERS, colors_of
from mome.inspection.regions import Regions
from mome.inspection.tiles import owned_tiles
from mome.inspection.views import plan_views
from mome.processing import MoMEProcessor
from mome.volumes import Grid, Volume, read_volume

PROMPTS = ["liver", "spleen"]


def model_of(**parts: object) -> MoME:
    """A small model with a filled bank, whose masks are not empty."""
    model = small(**parts)
    torch.manual_seed(1)
    model.text_bank.set(torch.randn(3, 12))
    return model


def segmenter_of(model: MoME, spacing: float = 12.0) -> Segmenter:
    return Segmenter(model, MoMEProcessor(spacing=[spacing] * 3))


@pytest.fixture(scope="module")
def ct(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_patient(tmp_path_factory.mktemp("ct") / "patient.nii.gz")


@pytest.mark.parametrize(("size", "overlap"), [((20, 9, 8), 0.5), ((8, 8, 8), 0.5), ((17, 23, 11), 0.25)])
def test_every_voxel_belongs_to_the_tile_that_weighs_most(size: tuple[int, int, int], overlap: float) -> None:
    patch = (8, 8, 8)
    window, best = gaussian_window(patch), torch.zeros([max(a, b) for a, b in zip(size, patch, strict=True)])
    tiles = list(owned_tiles(size, patch, overlap))
    for tile in tiles:
        place = tuple(slice(o, o + 8) for o in tile.origin)
        best[place] = torch.maximum(best[place], window)
    owners = torch.zeros(size)
    for tile in tiles:
        owners[tile.slices()] += 1
        torch.testing.assert_close(window[tile.slices(tile.origin)], best[tile.slices()])
    assert (owners == 1).all()


def test_regions_count_their_voxels() -> None:
    grid = Grid((10, 8, 8), np.eye(4))
    mask = np.zeros(grid.shape, np.uint8)
    mask[3:9, 2:5, 1:2] = 1
    volume = torch.rand(grid.shape, generator=torch.Generator().manual_seed(0)) - 0.5
    regions = Regions(volume, grid, {"liver": mask, "none": np.zeros_like(mask)}, grid)
    total = torch.zeros(4)
    for tile in owned_tiles(grid.shape, (8, 8, 8), 0.5):
        total += regions.count_on_map(regions.names, tile, (4, 4, 2), (2, 2, 4)).sum(dim=1)
    assert total.tolist() == [640, int((volume > 0).sum()), mask.sum(), 0]


@pytest.mark.parametrize("orientation", ["RAS", "LPI", "IRA"])
@pytest.mark.parametrize("step", [3.0, 4.7, 7.3])
def test_copies_beyond_the_scan_count_in_no_region(orientation: str, step: float) -> None:
    """Copied planes are as dense as the patient, so that the loads of short scans would be those of the copies."""
    scan = Volume(np.full((9, 8, 7), 40, np.float32), np.diag([-3.0, 4, 5, 1]))
    counts = []
    for extend_mm in (0, 20):
        processor = MoMEProcessor(spacing=[step] * 3, orientation=orientation, extend_mm=extend_mm)
        array, network = processor.to_network(scan, scan_grid(scan, processor))
        regions = Regions(array[0, 0], network, {}, scan.grid)
        whole = owned_tiles(network.shape, (16, 16, 16), 0.5)
        found = sum(regions.count_on_map(regions.names, tile, (1, 1, 1), (16, 16, 16)) for tile in whole)
        counts.append(found.flatten().tolist())
    assert counts[0][0] == np.prod(processor.network_grid(scan.grid).shape)
    assert counts[1][0] == counts[0][0]
    assert 0.4 * counts[0][0] < counts[0][1] <= counts[1][1] <= counts[1][0]  # part of the last plane is a copy, too


def test_copies_beyond_a_turned_scan_count_in_no_region() -> None:
    turned = np.eye(4)
    turned[:3, :3] = Rotation.from_euler("x", 25, degrees=True).as_matrix()
    scan = Volume(np.full((30, 28, 7), 40, np.float32), turned @ np.diag([4.0, 4, 5, 1]))
    processor = MoMEProcessor(spacing=[4.0] * 3, extend_mm=40)
    array, network = processor.to_network(scan, scan_grid(scan, processor))
    regions = Regions(array[0, 0], network, {}, scan.grid)
    tiles = owned_tiles(network.shape, (16, 16, 16), 0.5)
    found = sum(regions.count_on_map(regions.names, tile, (1, 1, 1), (16, 16, 16)) for tile in tiles).flatten()
    assert (array > 0).sum() > 2 * found[1]
    assert found.tolist() == pytest.approx([scan.array.size * 80 / 64] * 2, rel=0.03)  # of 80 and of 64 mm³


def test_one_tile_agrees_with_the_model(ct: Path) -> None:
    """Loads and weights of a scan that one tile covers, against the router and the fusion called directly."""
    model = model_of(experts="swiglu(n=4, hidden=8)", router="topk(k=2)", fusion="text_guided")
    segmenter = segmenter_of(model, spacing=13.0)
    inspection = inspect(segmenter, ct, PROMPTS)
    volume = read_volume(ct)
    array, network = segmenter.processor.to_network(volume)
    assert max(network.shape) <= 16
    padded = torch.zeros(1, 1, 16, 16, 16)
    inside = tuple(slice(0, side) for side in network.shape)
    padded[(0, 0, *inside)] = array[0, 0]
    with torch.inference_mode():
        features = model.encode(padded, torch.zeros(1, 3, dtype=torch.int64))
        text_PT = segmenter.prepare(PROMPTS).text_PT
        weights_PSDHW = model.fusion_weights(features, text_PT)[0]
    ids_DHWK = features.routings[-1].ids_TK.view(16, 16, 16, 2)[inside]
    counts_E = torch.bincount(ids_DHWK.flatten(), minlength=4)
    finest = inspection.report["routers"]["scale_1"]
    assert finest["stride"] == [1, 1, 1] and finest["experts"] == 4
    assert finest["load"]["all prompts"]["whole scan"]["load"] == pytest.approx(
        (counts_E / counts_E.sum()).tolist(), abs=1e-6
    )
    coarse_ids_DHWK = features.routings[-2].ids_TK.view(8, 8, 8, 2)
    fine_DHWK = coarse_ids_DHWK.repeat_interleave(2, 0).repeat_interleave(2, 1).repeat_interleave(2, 2)[inside]
    counts_E = torch.bincount(fine_DHWK.flatten(), minlength=4)
    coarse = inspection.report["routers"]["scale_0"]["load"]["all prompts"]
    assert coarse["whole scan"]["load"] == pytest.approx((counts_E / counts_E.sum()).tolist(), abs=1e-6)
    assert list(coarse) == ["whole scan", "body", *PROMPTS]
    for name, weights_SDHW in zip(PROMPTS, weights_PSDHW, strict=True):
        whole = inspection.report["fusion"]["prompts"][name]["whole scan"]
        assert whole["voxels"] == np.prod(network.shape)
        mean_S = weights_SDHW[(slice(None), *inside)].flatten(1).mean(1)
        assert whole["weight"] == pytest.approx(mean_S.tolist(), abs=1e-5)
    view = inspection.views[1]
    d, h, w = view.voxels_N3.unbind(dim=1)
    best = weights_PSDHW[1][:, d, h, w].max(dim=0)
    assert torch.equal(view.scale_N.long(), best.indices)
    torch.testing.assert_close(view.weight_N, best.values)
    assert inspection.report["fusion"]["note"] is None and model.observer is None


def test_planes_show_the_voxel_under_each_pixel() -> None:
    """A scan whose axes run to the left and down, and a network grid of other voxels."""
    affine = np.diag([-2.0, 3.0, -2.5, 1.0])
    affine[:3, 3] = (30, -20, 40)
    volume = Volume(np.zeros((20, 18, 16), np.float32), affine)
    mask = np.zeros(volume.shape, np.uint8)
    mask[5:9, 6:10, 4:8] = 1
    network = MoMEProcessor(spacing=[4, 4, 4]).network_grid(volume.grid)
    (view,) = plan_views(volume, {"liver": mask}, network)
    world_N3 = view.voxels_N3.numpy() @ network.affine[:3, :3].T + network.affine[:3, 3]
    for axis, numbers in view.pixels.items():
        assert numbers.shape == view.images[axis].shape and (numbers >= 0).mean() > 0.9
        across, up = [a for a in range(3) if a != axis]
        i, j = np.nonzero(numbers >= 0)
        for world_axis, picture_axis, index in ((across, across, i), (up, up, j)):
            at = view.grid.affine[world_axis, picture_axis] * index + view.grid.affine[world_axis, 3]
            assert np.abs(world_N3[numbers[i, j], world_axis] - at).max() <= 2 + 1e-6  # half a network voxel


@pytest.mark.parametrize(
    ("parts", "note"),
    [
        ({"fusion": "last", "router": "sigmoid(k=1)"}, "reads one scale"),
        ({"fusion": "uniform", "router": "soft"}, "gives every voxel the same weights"),
        ({"fusion": "gate", "router": "depth(router=topk(k=1))"}, "shows no weights"),
        ({"fusion": "gated", "experts": "film(n=2)"}, None),
        ({"fusion": "cross_attention", "encoder": "flat", "router": "expert_choice"}, None),
    ],
)
def test_every_form_is_drawn(
    parts: dict[str, str], note: str | None, ct: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mome.inspection.figures import save_experts, save_scales
    from mome.inspection.load_figure import save_loads

    throwaway_parts.register(monkeypatch)
    model = model_of(**{"experts": "mlp(n=2, hidden=8)", "router": "topk(k=1)", **parts})
    inspection = inspect(segmenter_of(model), ct, PROMPTS)
    shown = inspection.report["fusion"]["note"]
    assert (shown is None) if note is None else note in shown
    by_prompt = parts.get("experts") == "film(n=2)"
    for name, router in inspection.report["routers"].items():
        assert list(router["load"]) == (["all prompts"] if not (by_prompt and name.startswith("scale")) else PROMPTS)
        for regions in router["load"].values():
            assert sum(regions["body"]["load"]) == pytest.approx(1, abs=1e-5)
            won = sum(regions["body"]["wins"]) + regions["body"]["without_expert"]
            assert won == pytest.approx(1, abs=1e-5)
            if router["form"] == "slots":
                assert regions["whole scan"]["mass"] == pytest.approx([1, 1])
    if parts.get("encoder") == "flat":
        assert "encoder.mixture" in inspection.report["routers"]
    if "depth" in parts.get("router", ""):
        assert inspection.report["routers"]["scale_0"]["load"]["all prompts"]["whole scan"]["without_expert"] > 0.1
    view = inspection.views[0]
    for path in (
        save_scales(tmp_path / "s.png", inspection, view),
        save_experts(tmp_path / "e.png", inspection, view),
        save_loads(tmp_path / "l.png", inspection),
    ):
        picture = mpl_image.imread(path)
        assert picture.shape[1] > 500 and picture[..., :3].std() > 0.05


def test_colours() -> None:
    assert len(set(colors_of([0.5] * 7))) == 7
    many = colors_of([0.1, 0.0, 0.3, 0.2, 0.1, 0.1, 0.1, 0.1])
    assert many[1] == OTHERS and len(set(many)) == 8


def test_the_command(ct: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "model"
    model_of(experts="mlp(n=2, hidden=8)", router="topk(k=1)").save_pretrained(folder)
    MoMEProcessor(spacing=[12, 12, 12]).save_pretrained(folder)
    command = ["inspect", str(folder), "--ct", str(ct), "-p", "liver", "-o", str(tmp_path / "out")]
    assert main(command) == 0
    said = capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "patient_inspection.json").read_text())
    pictures = ["patient_liver_scales.png", "patient_liver_experts.png", "patient_loads.png"]
    assert report["pictures"] == pictures and "scale_0: load of the experts in the body" in said
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted([*pictures, "patient_inspection.json"])
    assert main(command) == 2
    error = capsys.readouterr().err
    assert "the file is there already" in error and "--overwrite" in error and len(error.splitlines()) <= 3
    assert main([*command, "--overwrite", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["pictures"] == pictures


def test_the_labels_of_a_group_have_one_warning(ct: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labels = ["liver", "lung_left", "lung_right"]
    model_of(experts="linear", labels=labels, trained_labels=["liver"]).save_pretrained(tmp_path / "model")
    MoMEProcessor(spacing=[12, 12, 12]).save_pretrained(tmp_path / "model")
    assert main(["inspect", str(tmp_path / "model"), "--ct", str(ct), "-p", "lungs", "-o", str(tmp_path / "o")]) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if "not trained on" in line]
    assert len(said) == 1 and "'lung_left', 'lung_right'" in said[0]


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["mome-ct-tiny", "--ct", "none.nii.gz", "-p", "liver", "-o", "o"], "no such file"),
        (["mome-ct-tiny", "--ct", ".", "-o", "o"], "no prompt was given"),
        (["mome-ct-tiny", "-p", "liver", "-o", "o"], "--ct"),
    ],
)
def test_bad_input(
    arguments: list[str], what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["inspect", *arguments]) == 2
    error = capsys.readouterr().err
    assert what in error and len(error.splitlines()) <= 3 and not any(tmp_path.iterdir())
