"""Text rows of a run without a text tower: a stored bank is kept, and what does not fit is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mome import MoME, MoMEConfig
from mome.errors import InputError
from mome.training.config import RunConfig
from mome.training.setup import build_model
from mome.training.text_rows import TextRows

LABELS = ["liver", "spleen", "aorta"]


def small(text_encoder: str) -> MoME:
    torch.manual_seed(0)
    return MoME(
        MoMEConfig(
            encoder="unet(channels=[4, 8])", text_encoder=text_encoder, labels=LABELS, dim=8, patch_size=[16, 16, 16]
        )
    )


def test_a_stored_bank_is_kept() -> None:
    model, rows = small("bank(width=5)"), torch.randn(3, 5)
    model.text_bank.set(rows, centre_on=rows)
    scale = model.text_bank.scale.clone()
    text = TextRows(model, ["spleen", "liver"], 0.5, seed=0)
    assert torch.equal(text.at(3), rows[[1, 0]])
    assert torch.equal(model.text_bank.rows_LT, rows) and torch.equal(model.text_bank.scale, scale)


def test_fine_tuning_keeps_the_stored_bank(tmp_path: Path) -> None:
    model, rows = small("bank(width=5)"), torch.randn(3, 5)
    model.text_bank.set(rows, centre_on=rows)
    model.save_pretrained(tmp_path)
    run = RunConfig(init=str(tmp_path), labels=("spleen", "liver"), processor={"spacing": [4, 4, 4]})
    tuned, processor = build_model(run)
    assert tuned.config.labels == ["spleen", "liver", "aorta"] and tuned.config.trained_labels == ["spleen", "liver"]
    assert tuned.processor is processor and processor.spacing == [4.0, 4.0, 4.0]
    text = TextRows(tuned, list(run.labels), 0.0, seed=0)
    assert torch.equal(text.at(0), rows[[1, 0]]) and torch.equal(tuned.text_bank.rows_LT, rows[[1, 0, 2]])
    other, _ = build_model(RunConfig(init=str(tmp_path), labels=("spleen", "heart")))
    with pytest.raises(InputError, match="no embedding of 'heart'"):
        TextRows(other, ["spleen", "heart"], 0.0, seed=0)


@pytest.mark.parametrize("text_encoder", ["bank(width=4)", "learned"])
def test_an_empty_bank_gets_one_hot_rows(text_encoder: str) -> None:
    model = small(text_encoder)
    text = TextRows(model, LABELS, 0.0, seed=0)
    assert torch.equal(text.at(0), torch.eye(3, model.config.text_dim)) and torch.equal(
        model.text_bank.rows_LT, text.at(0)
    )


def test_more_labels_than_columns_are_refused() -> None:
    with pytest.raises(InputError, match="3 labels do not fit one-hot rows of width 2") as caught:
        TextRows(small("bank(width=2)"), LABELS, 0.0, seed=0)
    assert len(str(caught.value).splitlines()) <= 3
