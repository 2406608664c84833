"""The predictor seam: the tile loop and the Segmenter work with any predictor, not only with a MoME."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small_models import liver_and_spleen

from mome.errors import InputError
from mome.inference import PreparedPrompts, Segmenter
from mome.inference.masks import predict_masks
from mome.inference.predictor import ModelPredictor, Predictor
from mome.inference.stream import stream_logits
from mome.labels import Resolved
from mome.processing import MoMEProcessor
from mome.prompts import Prompt
from mome.volumes import Grid, Volume

PATCH = (8, 8, 8)
CPU = torch.device("cpu")


class Bands:
    """Prompt p is where the voxel's value lies between the two numbers of its text row. It has no weights."""

    patch_size, device = PATCH, CPU

    def encode(self, tile_B1DHW: torch.Tensor, origin: tuple[int, int, int]) -> torch.Tensor:
        return tile_B1DHW

    def decode(self, features: torch.Tensor, text_PT: torch.Tensor) -> torch.Tensor:
        low, high = text_PT[:, 0, None, None, None], text_PT[:, 1, None, None, None]
        return torch.minimum(features - low, high - features)


class Place:
    """The logit is a linear function of the voxel's place on the network grid; the voxels are not read."""

    patch_size, device = PATCH, CPU

    def encode(self, tile_B1DHW: torch.Tensor, origin: tuple[int, int, int]) -> torch.Tensor:
        axes = [torch.arange(first, first + side) for first, side in zip(origin, PATCH, strict=True)]
        return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).float()

    def decode(self, features: torch.Tensor, text_PT: torch.Tensor) -> torch.Tensor:
        return (features @ text_PT.T).movedim(-1, 0)[None]


class Mirrored:
    """Wraps a predictor and averages its logits over a flip of the last axis, as test-time mirroring does."""

    def __init__(self, inner: Predictor) -> None:
        self.inner, self.patch_size, self.device = inner, inner.patch_size, inner.device

    def encode(self, tile_B1DHW: torch.Tensor, origin: tuple[int, int, int]) -> list[object]:
        return [self.inner.encode(tile, origin) for tile in (tile_B1DHW, tile_B1DHW.flip(-1))]

    def decode(self, features: list[object], text_PT: torch.Tensor) -> torch.Tensor:
        straight, flipped = (self.inner.decode(one, text_PT) for one in features)
        return (straight + flipped.flip(-1)) / 2


def prepared(**rows: list[float]) -> PreparedPrompts:
    prompts = [Prompt(name, name, Resolved(name, None, None, "free", None), True, None) for name in rows]
    return PreparedPrompts(prompts, torch.tensor(list(rows.values())))


def values(shape: tuple[int, int, int] = (19, 13, 6)) -> torch.Tensor:
    return torch.rand(1, 1, *shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("wrap", [lambda predictor: predictor, Mirrored], ids=["plain", "mirrored"])
def test_any_predictor_makes_the_masks(wrap) -> None:
    """One tile per voxel, or two flips of it, give the function itself; overlapping tiles average equal logits."""
    volume, bands = values(), {"dark": [-1.0, 0.3], "middle": [0.25, 0.7], "odd words": [0.6, 2.0]}
    grid = Grid(tuple(volume.shape[2:]), np.eye(4))
    for overlap, chunk in ((0.0, 32), (0.5, 2)):
        masks = predict_masks(wrap(Bands()), volume, grid, grid, prepared(**bands), overlap=overlap, prompt_chunk=chunk)
        assert list(masks) == list(bands)
        for name, (low, high) in bands.items():
            inside = (volume[0, 0] > low) & (volume[0, 0] < high)
            assert np.array_equal(masks[name].astype(bool), inside.numpy()) and masks[name].any()


def test_a_predictor_knows_where_its_tile_lies() -> None:
    volume, rows = values(), torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, -2, 3]])
    stream = stream_logits(Place(), volume, rows, overlap=0.5)
    logits = torch.cat([planes for _, planes in stream], dim=1)
    index = torch.stack(torch.meshgrid(*map(torch.arange, volume.shape[2:]), indexing="ij"), -1).float()
    torch.testing.assert_close(logits, (index @ rows.T).movedim(-1, 0), rtol=1e-4, atol=1e-4)


def test_the_segmenter_uses_its_predictor() -> None:
    """Only the prompts come from the model; the masks come from a function of the voxels."""
    hu = np.random.default_rng(0).normal(0, 60, (12, 14, 10)).astype(np.float32)
    scan = Volume(hu, np.diag([2.0, 2, 2, 1]))
    model, progress = liver_and_spleen(), []
    segmenter = Segmenter(model, MoMEProcessor(spacing=[2, 2, 2], hu_window=[-100, 100]))
    assert isinstance(segmenter.predictor, ModelPredictor) and segmenter.predictor.patch_size == (16, 16, 16)
    model.encode = model.decode = None  # the network cannot run
    segmenter.predictor = Bands()
    prompts = PreparedPrompts(segmenter.understand(["liver"]), torch.tensor([[0.5, 2.0]]))
    result = segmenter.segment(scan, prompts, progress=lambda *tiles: progress.append(tiles))
    assert np.array_equal(result.masks["liver"].astype(bool), hu > 0)
    assert result.prompts[0].trained and progress[-1] == (len(progress), len(progress)) and len(progress) > 8


def test_bfloat16_is_inside_the_network_only() -> None:
    model, text, tile = liver_and_spleen().eval(), torch.randn(3, 6), values((16, 16, 16))
    seen = []
    model.encoder.register_forward_hook(lambda *call: seen.append(call[2].maps[-1].dtype))
    logits = {}
    with torch.inference_mode():
        for dtype in (None, torch.bfloat16):
            predictor = ModelPredictor(model, dtype)
            logits[dtype] = predictor.decode(predictor.encode(tile, (0, 0, 0)), text)
        expected = model(tile, text).logits
    assert seen == [torch.float32, torch.bfloat16, torch.float32]
    assert logits[torch.bfloat16].dtype == torch.float32
    # oneDNN computes the predictor's small convolutions, in another order of sums than the model's own.
    torch.testing.assert_close(logits[None], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits[torch.bfloat16], expected, rtol=0.1, atol=0.1)


def test_prompts_are_prepared_once_and_mean_the_same() -> None:
    scan = Volume(np.random.default_rng(0).normal(0, 60, (12, 14, 10)).astype(np.float32), np.diag([4.0, 4, 4, 1]))
    segmenter = Segmenter(liver_and_spleen(), MoMEProcessor(spacing=[4, 4, 4]))
    prompts = segmenter.prepare(["spleen", "Liver", "lien"])
    assert prompts.names == ["liver", "spleen"]
    assert segmenter.prepare(prompts.prompts).names == prompts.names
    assert segmenter.prepare("liver").names == ["liver"] and segmenter.prepare(iter(["liver"])).names == ["liver"]
    once, again = segmenter.segment(scan, prompts), segmenter.segment(scan, ["spleen", "Liver", "lien"])
    assert once.summary() == again.summary()
    assert all(np.array_equal(once.masks[name], again.masks[name]) for name in once.masks)
    with pytest.raises(InputError, match="no prompt"):
        segmenter.prepare([])
