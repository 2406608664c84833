"""Text rows of a run without a text tower: a stored bank is kept, and what does not fit is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_text_models import save_tiny

from mome import MoME, MoMEConfig
from mome.errors import InputError
from mome.training.config import RunConfig, TrainConfig
from mome.training.setup import build_model
from mome.training.text_rows import TextRows, text_rows

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


@pytest.fixture
def tuned_offline(tmp_path: Path) -> Path:
    """A checkpoint whose text tower made the rows of its three labels and is gone."""
    tower = save_tiny("bert", tmp_path / "tower")
    model = small(f"hf(model={tower!r}, width=16)")
    TextRows(model, LABELS, 0.0, seed=0)
    model.save_pretrained(tmp_path / "first")
    (tmp_path / "tower").rename(tmp_path / "elsewhere")
    return tmp_path / "first"


def test_kept_rows_need_no_tower(tuned_offline: Path) -> None:
    run = RunConfig(
        init=str(tuned_offline), labels=("spleen", "liver"), bank="trained", processor={"spacing": [4, 4, 4]}
    )
    model, _ = build_model(run)
    stored, scale = model.text_bank.rows(["spleen", "liver"]).clone(), model.text_bank.scale.clone()
    text = text_rows(model, run)
    assert torch.equal(text.at(0), stored) and torch.equal(text.at(5), stored) and text.notes == []
    assert torch.equal(model.text_bank.rows_LT, stored) and torch.equal(model.text_bank.scale, scale)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"train": TrainConfig(synonyms=0.5)}, "or train.synonyms=0, which trains without a text tower"),
        ({"text_rows": "new"}, "or text_rows=kept, which trains without"),
        ({"bank": "table"}, "or bank=trained, which trains without"),  # the class table's other labels have no rows
        ({"labels": ("liver", "heart")}, "use known labels only"),  # no setting makes up for the missing row
    ],
)
def test_a_missing_tower_names_the_settings_that_need_none(tuned_offline: Path, settings: dict, words: str) -> None:
    run = RunConfig(
        **{
            "init": str(tuned_offline), "labels": ("liver",), "bank": "trained",
            "processor": {"spacing": [4, 4, 4]}, **settings,
        }
    )  # fmt: skip
    model, _ = build_model(run)
    with pytest.raises(InputError, match="cannot be loaded") as caught:
        text_rows(model, run)
    assert str(caught.value).split("; ")[-1].startswith(words) or str(caught.value).endswith(words)
    assert len(str(caught.value).splitlines()) <= 3
