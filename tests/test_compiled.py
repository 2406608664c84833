"""The compiled encoder and head: the same masks, weights that are shared, and an error where it cannot be compiled."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from mome_kernels.torch_impl import head_compiled
from torch.utils._pytree import tree_leaves

from mome import create_model
from mome.errors import InputError
from mome.inference import Segmenter, compiled
from mome.inference.disagreement import RouterWatch
from mome.inference.mirror import MirrorPredictor
from mome.inference.predictor import ModelPredictor
from mome.processing import MoMEProcessor
from mome.volumes import Volume

TINY = "unet(channels=[4, 8], depth=1)"


def model_of(**parts):
    torch.manual_seed(0)
    return create_model("mome_ct_tiny", encoder=TINY, patch_size=[16, 16, 16], **parts).eval()


def features_of(predictor, tile):
    with torch.inference_mode():
        return [each for each in tree_leaves(predictor.encode(tile, (0, 0, 0))) if isinstance(each, torch.Tensor)]


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.wide)])
def test_features_are_those_of_the_model(backend, monkeypatch) -> None:
    monkeypatch.setattr(compiled, "BACKEND", backend)
    model = model_of()
    predictor = compiled.CompiledPredictor(model)
    assert predictor.model.encoder is not model.encoder and model.encoder._compiled_call_impl is None
    assert next(predictor.model.parameters()) is next(model.parameters())
    planes = torch.randn(1, 1, 16, 20, 24)
    expected, found = (features_of(each, planes[..., 2:18, 3:19]) for each in (ModelPredictor(model), predictor))
    assert len(expected) == len(found) > 0
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_an_encoder_in_bfloat16_is_not_compiled(monkeypatch) -> None:
    monkeypatch.setattr(compiled, "BACKEND", "no such backend")
    model = model_of()
    predictor = compiled.CompiledPredictor(model, torch.bfloat16)
    tile = torch.randn(1, 1, 16, 16, 16)
    assert predictor.model is model
    for one, other in zip(
        features_of(predictor, tile), features_of(ModelPredictor(model, torch.bfloat16), tile), strict=True
    ):
        assert torch.equal(one, other)


def test_tiles_of_any_strides_are_compiled_once(monkeypatch) -> None:
    seen = []

    def backend(graph, inputs):
        seen.append([tuple(each.stride()) for each in inputs if isinstance(each, torch.Tensor) and each.ndim == 5])
        return graph

    monkeypatch.setattr(compiled, "BACKEND", backend)
    predictor = compiled.CompiledPredictor(model_of())
    graphs = len(seen)
    assert graphs > 0
    with torch.inference_mode():
        for side in (16, 19, 30):
            predictor.encode(torch.zeros(1, 1, 16, side, side)[..., :16, :16], (0, 0, 0))
    assert len(seen) == graphs


def test_a_failed_compilation_is_refused(monkeypatch) -> None:
    def backend(graph, inputs):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(compiled, "BACKEND", backend)
    with pytest.raises(InputError, match="the encoder cannot be compiled here: .*no compiler here"):
        compiled.CompiledPredictor(model_of())
    model = model_of()
    del model.encoder
    with pytest.raises(InputError, match="no encoder that could be compiled"):
        compiled._with_compiled_encoder(model)


def test_a_segmenter_compiles_and_says_so(monkeypatch) -> None:
    for module in (compiled, head_compiled):
        monkeypatch.setattr(module, "BACKEND", "eager")
    model = model_of(head_channels=2)  # few, so that the compilation is short
    processor = MoMEProcessor(spacing=[4.0, 4.0, 4.0])
    plain, fast = (Segmenter(model, processor, precision="fp32", compile=each) for each in (False, True))
    assert plain.mask_settings() != fast.mask_settings()
    volume = Volume(np.random.default_rng(0).normal(0, 300, (24, 20, 18)).astype("float32"), np.diag([4.0, 4, 4, 1]))
    heads, forward = [], head_compiled.forward
    monkeypatch.setattr(head_compiled, "forward", lambda *given: (heads.append(None), forward(*given))[1])
    first = plain.segment(volume, ["mandible"]).masks["mandible"]
    assert not heads
    second = fast.segment(volume, ["mandible"]).masks["mandible"]
    assert np.array_equal(first, second) and heads

    def backend(graph, inputs):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(head_compiled, "BACKEND", backend)
    with pytest.raises(InputError, match="the head cannot be compiled here: .*no compiler here") as caught:
        fast.segment(volume, ["mandible"])
    assert len(str(caught.value).splitlines()) <= 3


def test_routers_of_a_compiled_encoder_cannot_disagree(monkeypatch) -> None:
    """Their calls are not seen: the map lacked them without a word, or its error spoke of tokens."""
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    patch, experts = (16, 16, 16), "swiglu(n=4)"
    model = model_of(experts=experts)
    assert RouterWatch(compiled.CompiledPredictor(model), model, patch)
    encoder = f"unet(channels=[4, 8], depth=1, layer=moe(experts={experts}, router=topk(k=2)), layer_stages=[0])"
    model = create_model("mome_ct_tiny", encoder=encoder, patch_size=[16, 16, 16], experts=experts).eval()
    assert RouterWatch(ModelPredictor(model), model, patch)
    predictor = compiled.CompiledPredictor(model)
    for each in (predictor, MirrorPredictor(predictor, ("ap",), "RAS")):
        with pytest.raises(InputError, match="cannot be seen\n  in: encoder.*\n.*leave out compile"):
            RouterWatch(each, model, patch)
