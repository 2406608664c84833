"""Prompts and the rows of the bank that go with them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_models import small, volume

from mome import MoME
from mome.errors import InputError
from mome.prompts import embed_prompts, understand


def test_prompts_of_a_bank() -> None:
    model = small(trained_labels=["liver"])
    model.text_bank.set(torch.randn(3, 12))
    prompts = understand(["Liver", "lien"], model)
    assert [p.name for p in prompts] == ["liver", "spleen"]
    assert prompts[0].warning is None and "was not trained on 'spleen'" in prompts[1].warning
    assert torch.equal(embed_prompts(prompts, model), model.text_bank.rows_LT[:2])
    with pytest.raises(InputError, match="stores its labels' embeddings only"):
        embed_prompts(understand(["some lesion"], model), model)
    with pytest.raises(InputError, match="the bank has shape"):
        model.text_bank.set(torch.randn(2, 12))
    with pytest.raises(InputError, match="not one of the 3 labels"):
        model.text_bank.rows(["heart"])


def test_the_labels_of_a_group_have_one_warning() -> None:
    """A line for each of 24 ribs would hide what else is said."""
    model = small(labels=["liver", "kidney_left", "kidney_right"], trained_labels=["liver", "kidney_left"])
    ribs = understand(["ribs", "kidneys", "spleen"], model)
    warnings = list(dict.fromkeys(prompt.warning for prompt in ribs))
    assert len(ribs) == 27 and [str(warning).partition(";")[0] for warning in warnings] == [
        "'ribs' names 24 labels: rib_left_1, …, rib_right_12",
        "'kidneys' has two sides and is read as both, as if you ask for kidney_left and kidney_right",
        "this model was not trained on 'kidney_right' (the bundled mome-ct-torso-tiny was)",
        "this model was not trained on 'spleen' (the bundled mome-ct-torso-tiny was)",
    ]
    assert "not trained on 'rib_left_1', …, 'rib_right_12' (24 labels); it was trained on liver, kid" in str(
        warnings[0]
    )
    assert [prompt.name for prompt in ribs if prompt.trained] == ["kidney_left"]
    model = small(labels=["liver", "rib_left_5"], trained_labels=["rib_left_5"])
    (warning,) = {prompt.warning for prompt in understand(["ribs"], model) if not prompt.trained}
    assert "'rib_left_1', …, 'rib_right_12' (23 of 24 labels)" in str(warning)  # not all between the two


def test_a_bundled_model_that_knows_the_structure_is_named() -> None:
    model = small(labels=["liver", "mandible", "femur_left"])
    model.text_bank.set(torch.randn(3, 12))
    liver, mandible, femur = [str(p.warning) for p in understand(["hepar", "mandible", "femur_left"], model)]
    assert "not trained on 'liver' (the bundled mome-ct-torso-tiny was); it was trained on nothing" in liver
    assert mandible.endswith("not trained on 'mandible' (the bundled mome-ct-tiny was)") and "bundled" not in femur
    with pytest.raises(InputError, match="not among them") as caught:  # the bank lacks them, so the model cannot run
        embed_prompts(understand(["kidneys", "brainstem"], model), model)
    assert "the bundled mome-ct-torso-tiny; or the bundled mome-ct-tiny; or prompt one" in str(caught.value.hint)
    assert len(str(caught.value).splitlines()) <= 3


@pytest.mark.parametrize("encoder", ["learned", "none"])
def test_one_hot_encoders_start_with_one_hot_rows(encoder: str) -> None:
    plain = {"head": "plain", "fusion": "last"} if encoder == "none" else {}
    model = small(text_encoder=encoder, **plain)
    assert torch.equal(model.text_bank.rows(["liver", "spleen", "aorta"]), torch.eye(3))
    model.train()(volume(), model.text_bank.rows(["spleen"]), torch.ones(1, 1, 16, 16, 16)).loss.backward()
    if encoder == "none":
        assert model.head.weight_LC.grad[1].abs().sum() > 0 and model.head.weight_LC.grad[0].abs().sum() == 0


def test_rows_that_were_never_set_are_refused() -> None:
    with pytest.raises(InputError, match="no embedding of 'spleen' yet") as caught:
        small().text_bank.rows(["spleen"])
    assert len(str(caught.value).splitlines()) <= 3


def test_rows_follow_their_names(tmp_path: Path, caplog) -> None:
    model = small(trained_labels=["liver", "aorta"])
    rows = torch.randn(3, 12)
    model.text_bank.set(rows, centre_on=rows)
    model.save_pretrained(tmp_path)
    with caplog.at_level("WARNING"):
        again = MoME.from_pretrained(tmp_path, labels=["aorta", "spleen"])
        assert not caplog.records
        other = MoME.from_pretrained(tmp_path, labels=["heart", "liver"], trained_labels=[])
    assert torch.equal(again.text_bank.rows_LT, rows[[2, 1]]) and again.config.trained_labels == ["aorta"]
    assert torch.equal(again.text_bank.mean_T, model.text_bank.mean_T) and torch.equal(
        again.text_bank.scale, model.text_bank.scale
    )
    assert torch.equal(other.text_bank.rows_LT[1], rows[0]) and "no row in the checkpoint's bank: heart" in caplog.text
    with pytest.raises(InputError, match="no embedding of 'heart'"):
        other.text_bank.rows(["heart"])
    again.save_pretrained(tmp_path / "again")
    assert torch.equal(MoME.from_pretrained(tmp_path / "again").text_bank.rows_LT, again.text_bank.rows_LT)
    with pytest.raises(InputError, match="stands twice"):
        again.relabel(["liver", "liver"])
    assert again.config.labels == ["aorta", "spleen"]


def test_one_hot_rows_never_share_a_column(tmp_path: Path) -> None:
    small(text_encoder="learned").save_pretrained(tmp_path)
    model = MoME.from_pretrained(tmp_path, labels=["spleen", "heart"])
    assert torch.equal(model.text_bank.rows(["spleen"])[0], torch.eye(3)[1])
    assert torch.equal(model.text_bank.rows(["heart"])[0], torch.eye(3)[0])
    with pytest.raises(InputError, match="tells text_dim=3 labels apart, got 4"):
        MoME.from_pretrained(tmp_path, labels=["liver", "spleen", "aorta", "heart"])


def test_another_text_encoder_begins_a_new_bank(tmp_path: Path, caplog) -> None:
    model = small(trained_labels=["liver"])
    model.text_bank.set(torch.randn(3, 12), centre_on=torch.randn(4, 12))
    model.save_pretrained(tmp_path)
    again = MoME.from_pretrained(tmp_path, text_encoder="learned", labels=["spleen", "aorta"])
    assert (
        torch.equal(again.text_bank.rows_LT, torch.eye(2))
        and again.text_bank.scale == 1
        and again.config.trained_labels == []
    )
    assert "text_bank" in caplog.text
    told = MoME.from_pretrained(tmp_path, text_encoder="learned", labels=["spleen", "aorta"], trained_labels=["aorta"])
    assert told.config.trained_labels == ["aorta"] and torch.equal(told.text_bank.rows_LT, torch.eye(2))


def test_a_cast_to_half_precision_leaves_the_rows_as_they_are(tmp_path: Path) -> None:
    model = small()
    rows = torch.randn(3, 12, generator=torch.Generator().manual_seed(0))
    model.text_bank.set(rows, centre_on=rows)
    scaled = model.text_bank(rows)
    for cast in (model.half, model.bfloat16, lambda: model.to(torch.float16)):
        cast()
        assert all(tensor.dtype == torch.float32 for tensor in model.text_bank.state_dict().values())
        assert torch.equal(model.text_bank(rows), scaled) and model.dtype != torch.float32
    model.save_pretrained(tmp_path)
    assert torch.equal(MoME.from_pretrained(tmp_path).text_bank.rows_LT, rows)
    assert model.double().float().half().text_bank.mean_T.dtype == torch.float32
    assert model.text_bank.double().mean_T.dtype == torch.float64
    assert model.text_bank.to("meta").rows_LT.is_meta
