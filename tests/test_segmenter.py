"""What the Segmenter accepts: models with and without processors, volumes passed as arrays, prompts and errors."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from small_models import liver_and_spleen

import mome
from mome import MoMEConfig
from mome.errors import InputError
from mome.inference import Segmenter, segment
from mome.inference.eval_mode import evaluating
from mome.modeling import MoME
from mome.processing import MoMEProcessor
from mome.prompts import embed_prompts, understand
from mome.volumes import Volume


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    """The folder of a small random model without a processor. Tests write into it, so each has its own."""
    folder = tmp_path / "model"
    liver_and_spleen().save_pretrained(folder)
    return folder


def scan() -> Volume:
    return Volume(np.random.default_rng(0).normal(0, 80, (12, 14, 10)).astype(np.float32), np.diag([4.0, 4, 4, 1]))


def test_a_loaded_model_brings_its_processor(model_folder: Path, tmp_path: Path) -> None:
    """`from_pretrained` and then `segment(path, prompts=…, model=model)` work without naming a processor."""
    model = MoME.from_pretrained(model_folder)
    with pytest.raises(InputError, match="preprocessor_config.json is not there"):
        Segmenter(model)
    MoMEProcessor(spacing=[5, 5, 5]).save_pretrained(model_folder)
    assert Segmenter(model).processor.spacing == [5, 5, 5]
    MoME.from_pretrained(model_folder).save_pretrained(tmp_path / "again")
    assert Segmenter(tmp_path / "again").processor.spacing == [5, 5, 5]
    volume, path = scan(), tmp_path / "ct.nii.gz"
    nib.save(nib.Nifti1Image(volume.array, volume.affine), path)
    assert segment(str(path), prompts=["liver", "spleen"], model=model).masks["liver"].shape == volume.shape
    model.processor = MoMEProcessor(spacing=[3, 3, 3])
    assert Segmenter(model).processor.spacing == [3, 3, 3]
    assert Segmenter(model, MoMEProcessor(spacing=[2, 2, 2])).processor.spacing == [2, 2, 2]
    assert Segmenter(mome.MoME.from_pretrained("mome-ct-tiny")).processor.spacing == [3.90625, 3.90625, 2.5]


def test_a_saved_model_keeps_the_right_processor(model_folder: Path, tmp_path: Path, monkeypatch) -> None:
    MoMEProcessor(spacing=[5, 5, 5]).save_pretrained(model_folder)
    monkeypatch.chdir(model_folder.parent)
    model = MoME.from_pretrained(Path(model_folder.name))
    monkeypatch.chdir(tmp_path)  # the relative name does not lead to the model from here
    model.save_pretrained("copy")
    assert Segmenter("copy").processor.spacing == [5, 5, 5]
    MoMEProcessor(spacing=[2, 2, 2]).save_pretrained("chosen")
    model.save_pretrained("chosen")  # saving keeps the processor that is in the folder already
    assert Segmenter("chosen").processor.spacing == [2, 2, 2]
    model.processor = MoMEProcessor(spacing=[3, 3, 3])
    model.save_pretrained("chosen")
    assert Segmenter("chosen").processor.spacing == [3, 3, 3]


def test_masks_are_found_in_other_words(model_folder: Path) -> None:
    segmenter = Segmenter(MoME.from_pretrained(model_folder), MoMEProcessor(spacing=[4, 4, 4]))
    result = segmenter.segment(scan(), ["Liver", "lien"])
    assert list(result.masks) == ["liver", "spleen"]
    np.testing.assert_array_equal(result.masks["lien"], result.masks["spleen"])
    assert result.volume_ml("Liver") == result.volume_ml("liver")
    assert f"liver {result.volume_ml('liver'):.1f} ml" in repr(result) and len(repr(result)) < 200
    assert "spleen" in result.masks and not any(key in result.masks for key in ("mandible", 3, "-", "", None, "livver"))
    for find in (result.masks.__getitem__, result.volume_ml):
        with pytest.raises(KeyError, match="no mask of 'mandible', only of liver, spleen"):
            find("mandible")
    with pytest.raises(InputError, match="a prompt is a text, got 3"):
        segmenter.segment(scan(), [3])


def test_a_model_made_here_has_no_processor_of_its_own(model_folder: Path) -> None:
    config = MoMEConfig.from_pretrained(model_folder)
    config.name_or_path = ""
    with pytest.raises(InputError, match="without its processor"):
        Segmenter(MoME(config))


def test_a_wrong_model_is_not_blamed_on_its_processor(tmp_path: Path, monkeypatch) -> None:
    # Without a connection the requests to the Hub would be repeated for half a minute.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(InputError, match="a checkpoint of 'bert', not of mome"):
        Segmenter(tmp_path)
    with pytest.raises(InputError, match="'org/missing' cannot be loaded"):
        Segmenter("org/missing")


def test_nan_in_a_passed_volume_is_read_as_air_and_said(model_folder: Path) -> None:
    model, volume = MoME.from_pretrained(model_folder), scan()
    segmenter = Segmenter(model, MoMEProcessor(spacing=[4, 4, 4]))
    odd, air = volume.array.copy(), volume.array.copy()
    odd[3, 4, 5], air[3, 4, 5] = np.nan, -1024
    result = segmenter.segment(Volume(odd, volume.affine), ["liver"])
    assert "NaN is read as air" in result.warnings[0]
    same = segmenter.segment(Volume(air, volume.affine), ["liver"])
    assert np.array_equal(result.masks["liver"], same.masks["liver"])


def test_logits_that_are_not_finite_are_an_error(model_folder: Path) -> None:
    model = MoME.from_pretrained(model_folder)
    with torch.no_grad():
        next(model.encoder.parameters()).fill_(float("nan"))
    with pytest.raises(InputError, match="not finite"):
        Segmenter(model, MoMEProcessor(spacing=[4, 4, 4])).segment(scan(), ["liver"])


def test_advice_about_sides_is_not_lost_without_a_tower(model_folder: Path) -> None:
    model = MoME.from_pretrained(model_folder)
    with pytest.raises(InputError, match="ask for kidney_left and kidney_right") as caught:
        embed_prompts(understand(["kidney"], model), model)
    assert "embeddings only" in caught.value.what and "mome info" in caught.value.hint
    assert len(str(caught.value).splitlines()) <= 3


def test_prompts_of_another_model_are_refused(model_folder: Path) -> None:
    """Their rows fit, so that the masks would be wrong without a word."""
    model, processor = liver_and_spleen(), MoMEProcessor(spacing=[5, 5, 5])
    other = liver_and_spleen()
    with torch.no_grad():
        next(other.parameters()).add_(1)
    made, same = Segmenter(model, processor), Segmenter(model, processor, overlap=0.25)
    prepared = made.prepare(["liver"])
    same.segment(scan(), prepared)
    with pytest.raises(InputError, match="prepared for another model"):
        Segmenter(other, processor).segment(scan(), prepared)
    with pytest.raises(InputError, match="prepared with other mirrored axes"):
        Segmenter(model, processor, mirror="ap").segment(scan(), prepared)


def test_the_processor_says_how_far_tiles_overlap(model_folder: Path) -> None:
    model = MoME.from_pretrained(model_folder)
    usual, less = MoMEProcessor(spacing=[2, 2, 2]), MoMEProcessor(spacing=[2, 2, 2], overlap=0.25)

    def tiles(processor: MoMEProcessor, overlap: float | None = None) -> int:
        return Segmenter(model, processor, overlap=overlap).segment(scan(), ["liver"]).tiles[1]

    assert tiles(less) == tiles(usual, 0.25) < tiles(usual) == tiles(less, 0.5)
    # A report holds it as JSON.
    assert json.loads(json.dumps(Segmenter(model, usual, overlap=np.float32(0.25)).mask_settings()))["overlap"] == 0.25


def test_a_model_that_trains_is_segmented_in_evaluation_mode_and_trains_on(model_folder: Path) -> None:
    """A validation between two steps left the model in evaluation mode, without the routers' losses."""
    model = MoME.from_pretrained(model_folder)
    model.train()
    model.encoder.eval()  # a part that is frozen
    modes = {name: module.training for name, module in model.named_modules()}
    seen = []
    model.scale_experts[0].register_forward_hook(lambda module, given, found: seen.append(module.training))
    made = Segmenter(model, MoMEProcessor(spacing=[5, 5, 5]))
    for _ in range(2):
        made.segment(scan(), ["liver"])
        assert {name: module.training for name, module in model.named_modules()} == modes
    assert seen and not any(seen)
    with evaluating(model), evaluating(model):
        assert not any(module.training for module in model.modules())
    assert {name: module.training for name, module in model.named_modules()} == modes
    with pytest.raises(InputError):
        made.segment(scan(), ["no such thing"])
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert not any(module.training for module in Segmenter(model_folder, MoMEProcessor()).model.modules())


def test_probabilities_are_found_in_other_words(model_folder: Path) -> None:
    made = Segmenter(model_folder, MoMEProcessor(spacing=[5, 5, 5]))
    result = made.segment(scan(), ["liver", "spleen"], probabilities=["lien"])
    assert list(result.probabilities) == ["spleen"] and result.probabilities["lien"].dtype == np.uint8
    with pytest.raises(KeyError, match="no map of probabilities of 'liver', only of spleen"):
        result.probabilities["liver"]
