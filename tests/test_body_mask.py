"""Tiles are laid over the patient, and exact mode looks everywhere."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation
from stand_in_models import Contrast

from mome.errors import InputError
from mome.inference import Segmenter
from mome.inference.body_mask import body_mask
from mome.inference.loaded_scan import load_scan
from mome.inference.precision import LOWEST_DICE, MEASURED_IN_BFLOAT16, chosen_precision
from mome.inference.probabilities import ProbabilityMaps
from mome.inference.stream import wanted_tiles
from mome.inference.tiles import tile_steps
from mome.metrics import dice
from mome.module_objects import weights_sha256
from mome.processing import MoMEProcessor
from mome.volumes import Volume, read_volume

PATCH = (16, 16, 16)
PROCESSOR = {"spacing": [4, 4, 4], "hu_window": [-100, 100]}


def patient(*, table: bool = False, spacing: float = 4.0) -> Volume:
    """A cylinder of water with two lungs along z, in air, off the centre; on a table of 2 mm where asked."""
    i, j, k = np.meshgrid(*map(np.arange, (100, 90, 60)), indexing="ij")
    hu = np.full(i.shape, -1000.0, np.float32)
    hu[((i - 60) / 25) ** 2 + ((j - 35) / 15) ** 2 < 1] = 40
    for lung in (48, 72):
        hu[((i - lung) / 8) ** 2 + ((j - 35) / 8) ** 2 < 1] = -850
    hu[3:5, 3:5, 3:5] = 500  # a speck in the air
    if table:
        hu[:, 80:82] = 100
    return Volume(hu, np.diag([spacing, spacing, spacing, 1.0]))


def segmenter(**options: object) -> Segmenter:
    return Segmenter(Contrast(("liver", "lung_left"), (0.4, -0.1)), MoMEProcessor(**PROCESSOR), **options)


@pytest.mark.parametrize("angles", [(0, 0, 0), (90, 0, 0), (20, -15, 30)])
def test_the_box_holds_the_patient_with_its_lungs(angles: tuple[float, float, float]) -> None:
    scan = patient()
    affine = scan.affine.copy()
    affine[:3, :3] = Rotation.from_euler("xyz", angles, degrees=True).as_matrix() @ affine[:3, :3]
    scan = Volume(scan.array, affine)
    network = MoMEProcessor(**PROCESSOR).network_grid(scan.grid)
    mask = body_mask(scan, network, PATCH, 0.5)
    assert mask is not None
    inside = np.argwhere(scan.array > -500)
    inside = inside[(inside > 6).all(axis=1)]  # without the speck
    places = np.c_[inside, np.ones(len(inside))] @ scan.affine.T @ np.linalg.inv(mask.grid.affine).T
    assert places[:, :3].min() > -0.51 and (places[:, :3] - mask.grid.shape).max() < -0.49
    assert np.prod(mask.grid.shape) < 0.6 * np.prod(network.shape)
    steps = tile_steps(network.shape, PATCH, 0.5)
    # every tile inside of a lung is wanted, and the box of one tile somewhere in the air is not
    tiles = wanted_tiles(mask.grid.shape, PATCH, steps, mask.wants)
    assert 0 < len(tiles) <= len(wanted_tiles(mask.grid.shape, PATCH, steps))
    lung = np.linalg.inv(mask.grid.affine) @ scan.affine @ np.array([48, 35, 30, 1.0])
    at = [int(value) for value in lung[:3]]
    assert mask.wants(tuple((a, a + 1) for a in at))


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5])
def test_tiles_keep_the_places_that_they_have_in_exact_mode(overlap: float) -> None:
    """The steps of the part around the patient would be other ones, where the last step of the grid is a short one."""
    has_other_steps = False
    for width in range(50, 56):
        scan = Volume(patient().array[:, :width, :20], np.diag([4.0, 4, 4, 1]))
        found: dict[bool, set[tuple[int, ...]]] = {False: set(), True: set()}
        for exact, places in found.items():
            made = segmenter(exact=exact, overlap=overlap)
            encode, loaded = made.predictor.encode, made.load(scan)

            def placed(tile, at, encode=encode, places=places):
                places.add(at)
                return encode(tile, at)

            made.predictor.encode = placed
            made.segment(scan, ["liver"], loaded=loaded)
            grids = (loaded.network.shape, loaded.whole.shape)
            has_other_steps |= len({tile_steps(shape, PATCH, overlap) for shape in grids}) == 2
        assert found[False] < found[True]
    assert has_other_steps


@pytest.mark.parametrize("mirror", [None, "lr,si"])
def test_a_model_is_told_the_places_that_tiles_have_on_the_whole_network_grid(mirror: str | None) -> None:
    """Tiles were placed in the part around the patient, so that routers by place chose other experts than in exact."""

    class Placed(Contrast):
        def encode(self, volume_B1DHW: torch.Tensor, origin_B3: torch.Tensor | None = None) -> torch.Tensor:
            assert origin_B3 is not None
            places.setdefault(tuple(origin_B3[0].tolist()), []).append(volume_B1DHW.clone())
            return volume_B1DHW

    found = []
    for exact in (False, True):
        places: dict[tuple[int, ...], list[torch.Tensor]] = {}
        Segmenter(Placed(), MoMEProcessor(**PROCESSOR), exact=exact, mirror=mirror).segment(patient(), ["liver"])
        found.append(places)
    default, all_of_them = found
    assert len(default) < len(all_of_them)
    for place, tiles in default.items():
        assert all(any(torch.equal(tile, other) for other in all_of_them[place]) for tile in tiles)


def test_the_part_around_the_patient_follows_the_overlap_of_the_processor() -> None:
    processor = MoMEProcessor(**PROCESSOR, overlap=0.0)
    parts = [load_scan(patient(), processor, patch=PATCH, **options).network for options in ({}, {"overlap": 0.0})]
    assert parts[0].same_as(parts[1])
    assert not parts[0].same_as(load_scan(patient(), processor, patch=PATCH, overlap=0.5).network)


def test_masks_inside_of_the_patient_are_those_of_exact_mode() -> None:
    for scan in (patient(), patient(table=True)):
        found, exact = (segmenter(exact=mode).segment(scan, ["liver"]) for mode in (False, True))
        body = np.zeros(scan.shape, bool)
        body[20:, 15:60] = True
        assert np.array_equal(found.masks["liver"] * body, exact.masks["liver"] * body) and found.masks["liver"].any()
        assert found.tiles[1] == exact.tiles[0] == exact.tiles[1] and found.tiles[0] <= exact.tiles[0]
        if not scan.array[:, 80:].max() > 0:
            assert found.tiles[0] < 0.4 * exact.tiles[0]


def test_a_prompt_of_air_shows_what_exact_mode_is_for() -> None:
    """The second prompt is everywhere; outside of the patient only exact mode finds it."""
    scan = patient()
    found, exact = (segmenter(exact=mode).segment(scan, ["lung_left"]).masks["lung_left"] for mode in (False, True))
    assert exact.all() and not found.all() and found[40:80, 25:45].all()


def test_a_scan_without_a_body_is_looked_at_everywhere() -> None:
    hu = np.random.default_rng(0).normal(-900, 60, (20, 20, 20)).astype(np.float32)
    scan = Volume(hu, np.diag([4.0, 4, 4, 1]))
    assert body_mask(scan, MoMEProcessor(**PROCESSOR).network_grid(scan.grid), PATCH, 0.5) is None


def test_a_box_is_at_least_a_tile_where_the_grid_allows() -> None:
    hu = np.full((60, 60, 9), -1000, np.float32)
    hu[50:58, 2:9, 3:8] = 30
    scan = Volume(hu, np.diag([4.0, 4, 4, 1]))
    mask = body_mask(scan, MoMEProcessor(**PROCESSOR).network_grid(scan.grid), PATCH, 0.5)
    assert mask is not None and min(mask.grid.shape[:2]) >= 16 and mask.grid.shape[2] == 9


@pytest.mark.parametrize(
    ("shape", "spacing"), [((1, 1, 1), 5.0), ((700, 700, 2), 0.5), ((40, 40, 1), 4.0), ((6, 5, 4), 50.0)]
)
def test_odd_sizes_give_masks_of_their_own_size(shape: tuple[int, int, int], spacing: float) -> None:
    hu = np.where(np.indices(shape).sum(0) % 7 > 2, 60, -200).astype(np.float32)
    scan = Volume(hu, np.diag([spacing, spacing, spacing, 1.0]))
    for exact in (False, True):
        result = segmenter(exact=exact).segment(scan, ["liver", "lung_left"], probabilities=True)
        assert result.masks["liver"].shape == shape and result.probabilities["liver"].shape == shape
        assert result.masks["lung_left"].all()


def test_probabilities_agree_with_masks() -> None:
    noise = np.random.default_rng(0).normal(-20, 40, (30, 28, 26)).astype(np.float32)
    scan = Volume(noise, np.diag([2.0, 2.0, 2.0, 1.0]))
    result = segmenter().segment(scan, ["liver", "lung_left"], probabilities=["liver", "liver"])
    values, mask = result.probabilities["liver"], result.masks["liver"].astype(bool)
    assert list(result.probabilities) == ["liver"] and values.dtype == np.uint8
    assert (values[mask] >= 128).all() and (values[~mask] <= 127).all() and 0 < values[~mask].max()
    assert segmenter().segment(scan, ["liver"]).probabilities is None
    with pytest.raises(InputError, match="probabilities are asked of 'spleen'"):
        segmenter().segment(scan, ["liver"], probabilities=["spleen"])


def test_no_map_is_assembled_before_somebody_asks_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """To find out whether a prompt has a map, all of it was assembled, once for every group of planes."""
    assembled, real = [], ProbabilityMaps.__getitem__
    monkeypatch.setattr(ProbabilityMaps, "__getitem__", lambda maps, name: assembled.append(name) or real(maps, name))
    maps = segmenter().segment(patient(), ["liver", "lung_left"], probabilities=["liver"]).probabilities
    assert maps is not None and "liver" in maps and "hepar" in maps and "lung_left" not in maps and 3 not in maps
    assert assembled == [] and maps["liver"].any() and assembled == ["liver"]


def test_probabilities_are_the_sigmoid_of_logits() -> None:
    from mome.volumes import resample

    scan = patient()
    made = segmenter(exact=True)
    found = made.segment(scan, ["liver"], probabilities=True).probabilities["liver"]
    array, network = made.processor.to_network(scan)
    logits = resample((array[0, 0] - 0.4) * 20, network, scan.grid, fill=-30.0, antialias=False)
    expected = torch.sigmoid(logits).mul(255).round().numpy()
    assert np.abs(expected - found).max() <= 1


def test_auto_is_bfloat16_only_where_it_was_measured(monkeypatch) -> None:
    import torch

    from mome.inference import precision as module
    from mome.modeling import MoME

    cpu, bundled, other = torch.device("cpu"), MoME.from_pretrained("mome-ct-tiny"), Contrast()
    assert all(LOWEST_DICE <= value <= 1 for value in MEASURED_IN_BFLOAT16.values())
    assert weights_sha256(bundled)[:16] in MEASURED_IN_BFLOAT16
    monkeypatch.setattr(module, "multiplies_bfloat16", lambda: True)
    assert chosen_precision("auto", bundled, cpu) == "bf16" and chosen_precision("auto", other, cpu) == "fp32"
    assert chosen_precision("fp32", bundled, cpu) == "fp32" and chosen_precision("bf16", other, cpu) == "bf16"
    monkeypatch.setattr(module, "LOWEST_DICE", 1.0)
    assert chosen_precision("auto", bundled, cpu) == "fp32"
    monkeypatch.setattr(module, "multiplies_bfloat16", lambda: False)
    assert chosen_precision("auto", bundled, cpu) == "fp32"
    with pytest.raises(InputError, match="precision is one of auto, fp32, bf16, fp16, got 'fp31', did you mean"):
        chosen_precision("fp31", bundled, cpu)


@pytest.mark.wide
def test_on_real_scans_the_default_differs_little_from_exact_mode(ct_data: Path) -> None:
    """The bundled model on two heads: masks of the default mode and of exact mode, both in float32."""
    default, exact = (Segmenter("mome-ct-tiny", precision="fp32", exact=mode) for mode in (False, True))
    for path in sorted((ct_data / "openkbp" / "val" / "images").glob("*.nii.gz"))[:2]:
        scan = read_volume(path)
        masks = [made.segment(scan, ["spinal cord", "mandible"]).masks for made in (default, exact)]
        for name in masks[0]:
            assert dice(masks[0][name], masks[1][name]) > 0.95
