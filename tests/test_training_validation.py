"""Validation during training, and the text rows of a step."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from stand_in_models import LetterTower
from training_runs import NAMES, write_recipe

from mome import MoME
from mome.data.label_codes import mask_of
from mome.training import validation
from mome.training.config_file import load_run_config
from mome.training.loop import train
from mome.training.setup import build_model
from mome.training.sources import open_all_sources
from mome.training.text_rows import TextRows
from mome.training.validation_history import ValidationHistory
from mome.training.weight_average import RECORD


@pytest.fixture
def ready(tmp_path: Path) -> tuple:
    """A run on the small data set with its model, its bank filled, and its validation cases."""
    run = load_run_config(write_recipe(tmp_path), [])
    model, processor = build_model(run)
    TextRows(model, list(run.labels), 0.0, 0)
    _, cases = open_all_sources(run, processor, Accelerator(cpu=True))
    return model, run, cases


def find_bright(model, volume, text, **options):
    """Replaces `stream_logits`; finds the mandible, which is brighter than all else and the last of three prompts."""
    yield 0, torch.stack([torch.full(volume.shape[2:], -1.0)] * 2 + [volume[0, 0] - 0.7])[: len(text)]


def test_validation_scores_whole_volumes(ready: tuple, monkeypatch) -> None:
    assert torch.equal(ready[0].text_bank.rows_LT, torch.eye(3))
    monkeypatch.setattr(validation, "stream_logits", find_bright)
    scores = validation.validate(*ready)
    assert scores["dice/mandible"] > 0.8 and scores["dice/parotid_gland_left"] == 0
    assert scores["dice/mean"] == pytest.approx(scores["dice/mandible"] / 3)


def test_a_structure_that_is_rightly_not_found_leaves_the_mean_defined(ready: tuple, monkeypatch) -> None:
    """Its Dice is undefined. As a part of the mean, it would keep every model from being the best."""
    monkeypatch.setattr(validation, "stream_logits", find_bright)
    monkeypatch.setattr(
        validation, "mask_of", lambda labels, codes, name: mask_of(labels, codes, name) & (name == NAMES[2])
    )
    scores = validation.validate(*ready)
    assert set(scores) == {"dice/mandible", "dice/mean"} and scores["dice/mean"] == scores["dice/mandible"] > 0.8


def test_only_prompts_that_a_case_annotates_are_asked(ready: tuple, monkeypatch) -> None:
    asked = []

    def counted(model, volume, text, **options):
        asked.append(text.argmax(dim=1).tolist())  # the rows of the bank are one-hot
        yield from find_bright(model, volume, text)

    monkeypatch.setattr(validation, "stream_logits", counted)
    ready[2][0].index[2]["annotated"] = []
    ready[2][0].index[2]["places"] = []
    monkeypatch.setattr(ready[2][0], "places", lambda number: SimpleNamespace(voxels={}))
    assert validation.validate(*ready)["dice/mandible"] > 0.8
    assert asked == [[0, 1], [0, 1, 2]]


def test_processes_share_the_validation_cases(ready: tuple, monkeypatch) -> None:
    seen = []

    def counted(model, volume, text, **options):
        seen.append(volume)
        yield from find_bright(model, volume, text)

    monkeypatch.setattr(validation, "stream_logits", counted)
    alone = validation.validate(*ready)
    assert len(seen) == 3
    parts: list[dict] = []
    monkeypatch.setattr(validation, "gather_object", lambda mine: (parts.extend(mine), list(parts))[1])
    for rank in range(2):
        shared = validation.validate(*ready, SimpleNamespace(process_index=rank, num_processes=2))
    assert len(seen) == 6 and shared == pytest.approx(alone)


def test_processes_of_a_spread_model_return_the_scores_of_the_first(ready: tuple, monkeypatch) -> None:
    """Otherwise one of them might save a best model, and wait for ever for the others."""
    monkeypatch.setattr(validation, "stream_logits", find_bright)
    monkeypatch.setattr(validation, "is_spread", lambda model: True)
    first: list[list] = []
    monkeypatch.setattr(validation, "broadcast_object_list", lambda mine: first or first.extend(mine) or mine)
    scores = [validation.validate(*ready, SimpleNamespace(process_index=0, num_processes=2))]
    monkeypatch.setattr(validation, "dice", lambda mask, truth: 0.5)
    scores.append(validation.validate(*ready, SimpleNamespace(process_index=1, num_processes=2)))
    assert scores[0] == scores[1] and scores[0]["dice/mean"] != 0.5


def test_synonyms_are_a_function_of_the_step(tmp_path: Path, monkeypatch) -> None:
    from mome.registry import TEXT_ENCODERS
    from mome.zoo import create_model

    monkeypatch.setattr(TEXT_ENCODERS, "build", lambda spec: LetterTower())
    model = create_model("mome_ct_tiny", labels=["mandible", "larynx", "liver"], trained_labels=["mandible", "larynx"])
    rows = TextRows(model, ["mandible", "larynx"], 0.7, seed=1)
    assert torch.equal(rows.at(5), rows.at(5)) and any(not torch.equal(rows.at(i), rows.at(5)) for i in range(20))
    assert torch.equal(model.text_bank.rows_LT[0], LetterTower().encode(["mandible"])[0])
    assert torch.equal(model.text_bank.rows_LT[2], LetterTower().encode(["liver"])[0]) and model.text_bank.scale != 1


def test_validation_on_training_cases_is_said(tmp_path: Path, capsys) -> None:
    run = load_run_config(write_recipe(tmp_path), [])
    _, processor = build_model(run)
    open_all_sources(run, processor, Accelerator(cpu=True))
    assert "3 validation cases are training cases, too, such as 'c0'" in capsys.readouterr().out
    apart = "validation=[{kind: phantom, count: 1}]"
    open_all_sources(load_run_config(tmp_path / "run.yaml", [apart]), processor, Accelerator(cpu=True))
    assert "are training cases" not in capsys.readouterr().out


def test_scores_of_other_validation_cases_are_not_compared(tmp_path: Path) -> None:
    """The best of one easy case stayed the best for ever, and ended the run early."""
    accelerator = Accelerator(cpu=True)
    first = ValidationHistory(accelerator, tmp_path, 0, "easy")
    first.add(2, {"dice/mean": 0.95})
    again = ValidationHistory(accelerator, tmp_path, 2, "easy")
    assert again.best == (2, 0.95) and not again.is_improvement({"dice/mean": 0.8})
    other = ValidationHistory(accelerator, tmp_path, 2, "all of them")
    assert other.best is None and other.is_improvement({"dice/mean": 0.7})
    assert ValidationHistory(accelerator, tmp_path, 2).best == (2, 0.95)  # a run that does not validate


def test_the_best_model_of_a_later_step_stays_the_best(tmp_path: Path) -> None:
    """A run was killed after the validation of step 6, and goes on from the checkpoint of step 4."""
    accelerator = Accelerator(cpu=True)
    history = ValidationHistory(accelerator, tmp_path, 0, "cases")
    history.add(4, {"dice/mean": 0.4})
    record = history.record(6, {"dice/mean": 0.5})
    (tmp_path / "best").mkdir()
    (tmp_path / "best" / RECORD).write_text(json.dumps(record))
    history.add(6, {"dice/mean": 0.5})
    resumed = ValidationHistory(accelerator, tmp_path, 4, "cases")
    assert resumed.best == (6, 0.5) and resumed.without_improvement == 0
    assert not resumed.is_improvement({"dice/mean": 0.5})
    resumed.add(5, {"dice/mean": 0.45})  # repeated: an uninterrupted run was not without improvement here
    assert resumed.without_improvement == 0
    assert ValidationHistory(accelerator, tmp_path, 0, "cases").best is None
    resumed = ValidationHistory(accelerator, tmp_path, 4, "cases")
    resumed.add(6, {"dice/mean": 0.5})
    assert resumed.without_improvement == 0


def test_the_best_model_has_a_record_of_its_validation(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    train(load_run_config(recipe, ["train.steps=2", "train.validate_every=1", f"train.out={tmp_path / 'r'}"]))
    lines = [json.loads(line) for line in (tmp_path / "r" / "validation.jsonl").read_text().splitlines()]
    record = json.loads((tmp_path / "r" / "best" / RECORD).read_text())
    assert record["dice/mean"] == max(line["dice/mean"] for line in lines) and record["cases"] == lines[0]["cases"]
    MoME.from_pretrained(tmp_path / "r" / "best")
