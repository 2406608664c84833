"""Test-time mirroring: the average over mirrored copies, prompts of the other side, the places of mirrored tiles."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from stand_in_models import Contrast, StandIn

from mome.errors import InputError
from mome.inference.mirror import MirrorPredictor, mirrored_name, read_axes, with_mirrored_rows
from mome.inference.predictor import ModelPredictor
from mome.inference.stream import stream_logits
from mome.prompts import embed_prompts, understand

PATCH = (8, 8, 8)
CPU = torch.device("cpu")
PAIR = ("kidney_left", "kidney_right", "liver")


class Pointwise:
    """The logit of prompt p is the voxel's value times its row, a function that is exactly equivariant."""

    patch_size, device = PATCH, CPU

    def encode(self, tile_B1DHW, origin):
        return tile_B1DHW

    def decode(self, features, text_PT):
        return features * text_PT[:, 0, None, None, None]


class Leaning(Pointwise):
    """The logit also grows along the first axis of the tile: it treats left and right differently."""

    def decode(self, features, text_PT):
        ramp = torch.arange(8.0)[:, None, None]
        return super().decode(features, text_PT) + ramp + torch.tanh(features)


class Placed(Pointwise):
    """Records the origins; the logit is the place of the voxel on the network grid along the first axis."""

    def __init__(self) -> None:
        self.origins: list[tuple[int, int, int]] = []

    def encode(self, tile_B1DHW, origin):
        self.origins.append(origin)
        return (torch.arange(8.0) + origin[0])[:, None, None].expand(8, 8, 8)

    def decode(self, features, text_PT):
        return features.expand(1, len(text_PT), 8, 8, 8)


class Sided(StandIn):
    """Prompt p is where a ramp along the first axis times its number (left 1, right −1, liver 0) is high."""

    def __init__(self, labels, trained, patch) -> None:
        super().__init__(labels, trained, patch)
        self.none = torch.nn.Parameter(torch.zeros(1))  # tells the device

    def decode(self, features, text_PT):
        sign = text_PT @ torch.tensor([1.0, -1.0, 0.0])
        ramp = torch.linspace(-1, 1, features.shape[2])[:, None, None]
        return features + sign[None, :, None, None, None] * ramp


def values(*shape: int) -> torch.Tensor:
    return torch.rand(1, 1, *shape, generator=torch.Generator().manual_seed(0))


def logits(predictor, volume, text, overlap=0.5) -> torch.Tensor:
    return torch.cat([planes for _, planes in stream_logits(predictor, volume, text, overlap=overlap)], dim=1)


def twice(rows: torch.Tensor) -> torch.Tensor:
    return torch.stack([rows, rows], dim=1)


@pytest.mark.parametrize("axes", ["lr", "ap", "si", "lr,ap", "all"])
def test_an_equivariant_predictor_gives_what_it_gives_without_mirroring(axes: str) -> None:
    volume, text = values(13, 9, 11), torch.tensor([[1.0], [-2.5]])
    mirrored = MirrorPredictor(Pointwise(), read_axes(axes), "RAS").for_volume(volume.shape[2:])
    assert len(mirrored.flips) == 2 ** len(read_axes(axes))
    plain = logits(Pointwise(), volume, text)
    got = logits(mirrored, volume, twice(text))
    assert torch.allclose(got, plain, rtol=1e-6, atol=0)  # a sum of more than two equal numbers is rounded
    if len(mirrored.flips) == 2:
        assert torch.equal(got, plain)


@pytest.mark.parametrize("axes", ["lr", "all"])
def test_the_average_of_an_asymmetric_predictor_is_symmetric(axes: str) -> None:
    tile, text = values(*PATCH), torch.tensor([[1.0], [-2.5]])
    leaning = Leaning()
    mirrored = MirrorPredictor(leaning, read_axes(axes), "RAS").for_volume(PATCH)

    def of(predictor, x, rows):
        return predictor.decode(predictor.encode(x, (0, 0, 0)), rows)

    assert not torch.allclose(of(leaning, tile.flip(2), text).flip(2), of(leaning, tile, text))
    average = of(mirrored, tile, twice(text))
    assert torch.allclose(of(mirrored, tile.flip(2), twice(text)).flip(2), average, atol=1e-5)
    if axes == "lr":
        expected = (of(leaning, tile, text) + of(leaning, tile.flip(2), text).flip(2)) / 2
        assert torch.allclose(average, expected)


def test_left_is_asked_as_right_in_the_mirrored_copy() -> None:
    """The model finds the left at one end and the right at the other; only exchanged prompts keep them apart."""
    model = Sided(PAIR, PAIR, 8)
    prompts = understand(["left kidney", "kidney_right", "liver"], model)
    rows = embed_prompts(prompts, model)
    text = with_mirrored_rows(rows, prompts, model, ("lr",))
    assert torch.equal(text[:, 0], rows) and torch.equal(text[:, 1], rows[[1, 0, 2]])
    volume = torch.zeros(1, 1, 8, 8, 8)
    plain = logits(ModelPredictor(model), volume, rows)
    mirrored = MirrorPredictor(ModelPredictor(model), ("lr",), "RAS").for_volume((8, 8, 8))
    assert torch.allclose(logits(mirrored, volume, text), plain, atol=1e-6)
    wrong = logits(mirrored, volume, twice(rows))
    assert wrong[:2].abs().max() < 1e-6 < plain[:2].abs().max()  # without the exchange, both sides cancel
    assert torch.equal(with_mirrored_rows(rows, prompts, model, ("ap", "si")), twice(rows))
    # one prompt alone needs the row of the other side, too
    only = with_mirrored_rows(rows[:1], prompts[:1], model, ("lr",))
    assert torch.equal(only[0], text[0])


def test_the_left_right_axis_follows_the_orientation() -> None:
    volume = values(8, 8, 8)
    for orientation, axis in (("RAS", 0), ("ALS", 1), ("SPL", 2)):
        mirrored = MirrorPredictor(Pointwise(), ("lr",), orientation).for_volume((8, 8, 8))
        assert mirrored.flips == [(), (axis,)] and mirrored.left_right == axis
        text = torch.tensor([[[1.0], [0.0]]])  # the mirrored row gives 0
        tile = mirrored.encode(volume, (0, 0, 0))
        assert torch.equal(tile[1], volume.flip(axis + 2))
        assert torch.allclose(mirrored.decode(tile, text)[0, 0], volume[0, 0] / 2)


@pytest.mark.parametrize("side", [5, 8, 13, 20])
def test_tiles_lie_where_they_lie_in_the_mirrored_volume(side: int) -> None:
    inner = Placed()
    volume, size = values(side, 9, 8), max(side, 8)
    mirrored = MirrorPredictor(inner, ("lr",), "RAS").for_volume(volume.shape[2:])
    got = logits(mirrored, volume, torch.zeros(1, 2, 1))
    pairs = list(zip(inner.origins[::2], inner.origins[1::2], strict=True))
    assert all(a[0] + b[0] + 8 == size and a[1:] == b[1:] and min(b) >= 0 for a, b in pairs)
    # voxel p of the volume is voxel size − 1 − p of the mirrored one
    assert torch.allclose(got, torch.full_like(got, (size - 1) / 2))
    with pytest.raises(RuntimeError, match="for_volume"):
        MirrorPredictor(inner, ("lr",), "RAS").encode(volume, (0, 0, 0))


def test_names_in_a_mirrored_scan() -> None:
    own = ("my_left_thing", "my_right_thing", "Left-Lobe", "leftover")
    model = Contrast(own, [0.1] * 4, 8)
    table = understand(["left kidney", "liver", "lung_middle_lobe_right"], model)
    assert [mirrored_name(p, model) for p in table[:2]] == ["kidney_right", "liver"]
    with pytest.raises(InputError, match="lies on one side only"):
        mirrored_name(table[2], model)
    ours = understand(list(own), model)
    assert mirrored_name(ours[0], model) == "my_right_thing" and mirrored_name(ours[3], model) == "leftover"
    with pytest.raises(InputError, match="Left-Lobe.*no label"):
        mirrored_name(ours[2], model)


def test_a_side_that_the_model_does_not_know_is_refused() -> None:
    one_sided = Contrast(("kidney_left", "liver"), (0.1, 0.2), 8)
    prompts = understand(["kidney_left"], one_sided)
    with pytest.raises(InputError, match="not trained on it") as error:
        with_mirrored_rows(embed_prompts(prompts, one_sided), prompts, one_sided, ("lr",))
    assert "ap,si" in str(error.value)
    for wrong in ("left", "l r", "", "lr;ap", "ALL"):
        with pytest.raises(InputError, match="axes lr, ap and si"):
            read_axes(wrong)
    assert read_axes("si,lr") == ("lr", "si") and read_axes("all") == ("lr", "ap", "si")


def test_mirroring_a_scan_and_its_prompts_mirrors_the_masks(tmp_path) -> None:
    """The bundled kind of network, with mirroring, on a scan and its mirror image: the same masks, sides exchanged."""
    from small_models import liver_and_spleen

    model = liver_and_spleen()
    patch = model.config.patch_size
    volume = values(*patch)
    prompts = understand(["liver", "spleen"], model)
    text = with_mirrored_rows(embed_prompts(prompts, model), prompts, model, ("lr",))
    mirrored = MirrorPredictor(ModelPredictor(model.eval()), ("lr",), "RAS").for_volume(patch)
    one, other = logits(mirrored, volume, text), logits(mirrored, volume.flip(2), text)
    assert np.abs(one.numpy()).max() > 0
    assert torch.allclose(one, other.flip(1), atol=1e-4)


def test_a_segmenter_mirrors_and_says_so_in_its_settings(tmp_path) -> None:
    """A pointwise model gives the same masks with mirroring, one prompt of a pair alone too."""
    from small_scans import patient_affine, patient_hu

    from mome.inference import Segmenter
    from mome.inference.fingerprint import predictor_settings
    from mome.inspection.inspect import inspect
    from mome.processing import MoMEProcessor
    from mome.volumes import Volume

    model = Contrast(("kidney_left", "kidney_right", "liver"), (0.2, 0.5, 0.7), 16)
    processor = MoMEProcessor(spacing=[9, 9, 9], hu_window=(-1000, 1000))
    volume = Volume(patient_hu().astype(np.float32), patient_affine())
    plain = Segmenter(model, processor).segment(volume, ["kidney_right", "liver"])
    segmenter = Segmenter(model, processor, mirror="lr,si")
    mirrored = segmenter.segment(volume, ["kidney_right", "liver"])
    assert np.array_equal(plain.masks["liver"], mirrored.masks["liver"]) and plain.masks["liver"].any()
    # the mirrored copy was asked for the left kidney, whose threshold is lower: the mean of both thresholds decides
    between = Contrast(("kidney_right",), (0.35,), 16)
    expected = Segmenter(between, processor).segment(volume, ["kidney_right"])
    assert np.array_equal(mirrored.masks["kidney_right"], expected.masks["kidney_right"])
    assert mirrored.masks["kidney_right"].sum() > plain.masks["kidney_right"].sum()
    settings = [predictor_settings(s.predictor, model) for s in (segmenter, Segmenter(model, processor, mirror="lr"))]
    assert settings[0] != settings[1] and "not comparable" not in str(settings)
    with pytest.raises(InputError, match="one pass"):
        inspect(segmenter, tmp_path / "ct.nii.gz", ["liver"])
