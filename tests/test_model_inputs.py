"""What a model and a segmenter are given: other types and shapes, and models in other forms."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from small_models import liver_and_spleen, small, volume
from small_scans import patient_affine, patient_hu, patient_image

from mome import MoME, segment
from mome.errors import InputError
from mome.inference import Segmenter
from mome.inference.fingerprint import model_fingerprint, predictor_settings
from mome.inference.predictor import ModelPredictor
from mome.processing import MoMEProcessor
from mome.volumes import Volume
from mome.volumes.dicom import DicomOptions

PROCESSOR = MoMEProcessor(spacing=[16, 16, 16])  # the patient is one tile


def refused(words: str, call: Any) -> None:
    with pytest.raises(InputError, match=words) as caught:
        call()
    assert len(str(caught.value).splitlines()) <= 3


# -- segment ----------------------------------------------------------------------------------------------------------


def test_a_scan_of_another_type_is_refused() -> None:
    model = liver_and_spleen()
    hint = r"Volume\(array, affine\)"
    for scan, words in (
        (patient_hu(), rf"got ndarray of shape \(24, 22, 20\)\n.*{hint}"),
        (torch.zeros(4, 4, 4), r"got Tensor of shape \(4, 4, 4\)"),
        (patient_image(), r"got Nifti1Image of shape .*\n.*image.affine"),
        (None, "got NoneType"),
        (["ct.nii.gz"], "got list"),
        (Volume(np.zeros((4, 4, 4, 2), np.float32), np.eye(4)), "three dimensions"),
    ):
        refused(words, lambda scan=scan: segment(scan, ["liver"], model, PROCESSOR))
    ct = Volume(patient_hu(), patient_affine())
    refused("a Volume was given", lambda: segment(ct, ["liver"], model, PROCESSOR, frame=0))
    refused("a Volume was given", lambda: segment(ct, ["liver"], model, PROCESSOR, dicom=DicomOptions(series=1)))


def test_tensors_of_another_shape_are_refused() -> None:
    model = small()
    text, x = torch.rand(2, 12), volume()
    target = torch.zeros(1, 2, 16, 16, 16)
    for words, call in (
        (r"\(B, 1, D, H, W\), got \(1, 16, 16, 16\)", lambda: model(x[0], text)),
        (r"\(B, 1, D, H, W\), got \(1, 2, 16, 16, 16\)", lambda: model(x.expand(1, 2, -1, -1, -1), text)),
        ("tensor of torch.int16", lambda: model(x.to(torch.int16), text)),
        ("got ndarray", lambda: model(x.numpy(), text)),
        ("not multiples", lambda: model(x[..., :15], text)),
        (r"no volume, got \(0, 1, 16, 16, 16\)", lambda: model(x[:0], text, target[:0])),
        (r"text_PT is \(P, 12\).*got \(2, 13\)", lambda: model(x, torch.rand(2, 13))),
        (r"got \(12,\)", lambda: model(x, torch.rand(12))),
        (r"got \(0, 12\)", lambda: model(x, torch.rand(0, 12))),
        ("got list", lambda: model(x, ["liver"])),
        (r"\(1, 2, 16, 16, 16\), got \(1, 3, 16, 16, 16\)", lambda: model(x, text, torch.zeros(1, 3, 16, 16, 16))),
        (r"got \(16, 16, 16\)", lambda: model(x, text, target[0, 0])),
        (r"supervised_BP is .*\(1, 2\), got \(2,\)", lambda: model(x, text, target, torch.ones(2, dtype=torch.bool))),
        (r"got \(2, 13\)", lambda: model.decode(model.encode(x), torch.rand(2, 13))),
    ):
        refused(words, call)
    assert torch.isfinite(model(x, text, target, torch.ones(1, 2, dtype=torch.bool)).loss)


# -- models in other forms --------------------------------------------------------------------------------------------


def test_a_model_without_values_is_refused() -> None:
    config = liver_and_spleen().config
    with torch.device("meta"):
        empty = MoME(config)
    refused("built on the meta device", lambda: Segmenter(empty, PROCESSOR))
    part = liver_and_spleen()
    part.head.to("meta")
    refused("built on the meta device", lambda: Segmenter(part, PROCESSOR))


def test_wrapped_models_are_unwrapped_and_others_refused() -> None:
    model = liver_and_spleen()
    ct = Volume(patient_hu(), patient_affine())
    wanted = Segmenter(model, PROCESSOR).segment(ct, ["spleen"]).masks["spleen"]
    wrapped = Segmenter(torch.nn.DataParallel(model), PROCESSOR)
    assert wrapped.model is model and np.array_equal(wrapped.segment(ct, ["spleen"]).masks["spleen"], wanted)
    for other in (torch.nn.Linear(2, 2), SimpleNamespace(config=1, encode=1), 3, None):
        refused("a model is a MoME", lambda other=other: Segmenter(other, PROCESSOR))


def test_an_offloaded_model_segments() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = liver_and_spleen()
    ct = Volume(patient_hu(), patient_affine())
    wanted = Segmenter(model, PROCESSOR).segment(ct, ["spleen"]).masks["spleen"]
    accelerate.cpu_offload(model, execution_device="cpu")
    assert any(parameter.is_meta for parameter in model.parameters())
    assert np.array_equal(Segmenter(model, PROCESSOR).segment(ct, ["spleen"]).masks["spleen"], wanted)


def test_float16_on_a_cpu_computes_in_float32_and_says_so() -> None:
    ct = Volume(patient_hu(), patient_affine())
    model = liver_and_spleen().half()
    made = Segmenter(model, PROCESSOR)
    assert model.dtype == torch.float16 and made.model.dtype == torch.float32
    assert any("float16" in note for note in made.segment(ct, ["spleen"]).notes)
    made = Segmenter(liver_and_spleen(), PROCESSOR, precision="fp16")
    assert made.predictor.autocast is None and any("float16" in note for note in made.segment(ct, ["spleen"]).notes)
    assert Segmenter(liver_and_spleen(), PROCESSOR, precision="bf16").notes == ()


# -- what decides the masks of a folder run ---------------------------------------------------------------------------


def test_everything_in_memory_that_decides_masks_is_compared() -> None:
    model = liver_and_spleen()
    first = model_fingerprint(model)
    assert model_fingerprint(model) == first
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] += 1e-3
    assert model_fingerprint(model) != first
    second = model_fingerprint(model)
    model.register_buffer("threshold", torch.zeros(()), persistent=False)
    assert model_fingerprint(model) != second
    assert model_fingerprint(model.double()) != second


class Flipped:
    """A predictor around another, with settings of its own."""

    def __init__(self, inner: Any, axes: tuple[int, ...], shift: Any = None) -> None:
        self.inner, self.axes, self.shift = inner, axes, shift


def test_settings_of_a_predictor_are_compared() -> None:
    model = liver_and_spleen()

    def settings(predictor: Any) -> Any:
        return predictor_settings(predictor, model)

    plain = ModelPredictor(model)
    assert settings(plain) == settings(ModelPredictor(model))
    others = [
        plain,
        ModelPredictor(model, torch.bfloat16),
        Flipped(plain, (0,)),
        Flipped(plain, (1,)),
        Flipped(ModelPredictor(model, torch.bfloat16), (0,)),
        Flipped(plain, (0,), torch.zeros(2)),
        Flipped(plain, (0,), torch.ones(2)),
        Flipped(plain, (0,), torch.nn.Linear(2, 2)),
    ]
    described = [str(settings(other)) for other in others]
    assert len(set(described)) == len(others)
    assert described == [str(settings(other)) for other in others]
    secret = Flipped(plain, (0,), lambda x: x)  # a function cannot be compared, so no run is like another
    assert settings(secret) != settings(secret)


def test_a_nibabel_image_becomes_a_volume_as_the_error_says() -> None:
    image: nib.Nifti1Image = patient_image()
    result = Segmenter(liver_and_spleen(), PROCESSOR).segment(Volume(image.get_fdata(), image.affine), ["liver"])
    assert result.masks["liver"].shape == image.shape


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"strides": ((1, 1, 1), (2, 2, 2))}, r"map 0 of encoder UNet is .*; by its channels and strides"),
        ({"channels": (8, 5)}, "map 1 of encoder UNet"),
        ({"channels": (8,)}, "a Pyramid of 1 maps and a bottleneck, got 2 maps"),
    ],
)
def test_an_encoder_that_is_not_what_it_says(change: dict, message: str, monkeypatch) -> None:
    model = small()
    for name, value in change.items():
        monkeypatch.setattr(model.encoder, name, value)
    refused(message, lambda: model.encode(volume()))


def test_an_encoder_that_returns_no_pyramid(monkeypatch) -> None:
    model = small()
    monkeypatch.setattr(model.encoder, "forward", lambda volume, context: (volume, volume))
    refused("returns a Pyramid of 2 maps and a bottleneck, got tuple", lambda: model.encode(volume()))


def test_a_loss_that_is_no_scalar(monkeypatch) -> None:
    model = small()
    monkeypatch.setattr(model.segmentation_loss, "forward", lambda logits, targets, supervised=None: logits.mean(-1))
    text_PT = torch.randn(2, model.config.text_dim)
    refused(
        "loss BCEDice.* returns one number, a tensor without dimensions, got shape",
        lambda: model(volume(), text_PT, targets=torch.zeros(1, 2, 16, 16, 16)),
    )


@pytest.mark.parametrize(
    ("array", "affine", "message"),
    [
        (np.zeros((8, 8, 8)), np.eye(3), r"the affine is of shape \(3, 3\), not \(4, 4\)"),
        (np.zeros((8, 8, 8)), None, r"the affine is missing, not \(4, 4\)"),
        (np.zeros((1, 8, 8, 8)), np.eye(4), r"(?s)shape \(1, 8, 8, 8\).*array\[0\], without the axis"),
        (np.zeros((8, 8, 8, 1)), np.eye(4), r"(?s)shape \(8, 8, 8, 1\).*array\[\.\.\., 0\]"),
    ],
)
def test_arrays_and_affines_of_another_shape(array: np.ndarray, affine: Any, message: str) -> None:
    refused(message, lambda: segment(Volume(array, affine), ["liver"], model=liver_and_spleen(), processor=PROCESSOR))
