"""Checkpoints whose files are whole and whose numbers are not: NaN, zeros, left-over tensors, odd settings."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import liver_and_spleen, remove_checksums
from small_scans import patient_affine, patient_hu

from mome import MoME
from mome.errors import InputError
from mome.inference import Segmenter
from mome.loaded_weights import damage_of
from mome.processing import MoMEProcessor
from mome.volumes import Volume

Tensors = dict[str, torch.Tensor]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    liver_and_spleen().save_pretrained(tmp_path / "model")
    MoMEProcessor(spacing=[8, 9, 10]).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def change(folder: Path, replace: Callable[[Tensors], Tensors]) -> None:
    remove_checksums(folder)
    path = folder / "model.safetensors"
    save_file(replace(load_file(path)), path, {"format": "pt"})


def matrices(folder: Path) -> list[str]:
    return [name for name, t in load_file(folder / "model.safetensors").items() if name.endswith("weight") and t.any()]


def test_whole_checkpoints_have_nothing_to_say(folder: Path) -> None:
    assert MoME.from_pretrained(folder).load_notes == () == MoME.from_pretrained("mome-ct-tiny").load_notes
    assert MoME.from_pretrained(folder, experts="mlp(n=2)").load_notes == ()  # an override replaces tensors on purpose


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_one_number_that_is_not_finite_is_refused(folder: Path, value: float) -> None:
    name = matrices(folder)[-1]
    change(folder, lambda tensors: {**tensors, name: tensors[name].index_fill(0, torch.tensor([0]), value)})
    with pytest.raises(InputError, match=f"NaN or infinite numbers: {name}"):
        MoME.from_pretrained(folder)
    MoME.from_pretrained(folder, allow_damaged=True)


def test_weights_of_zeros_are_refused_and_biases_are_not(folder: Path) -> None:
    names = matrices(folder)
    for name in (names[0], names[len(names) // 2], names[-1], "text_bank.scale"):
        before = (folder / "model.safetensors").read_bytes()
        change(folder, lambda tensors, name=name: {**tensors, name: torch.zeros_like(tensors[name])})
        with pytest.raises(InputError, match=f"zeros only: {name}"):
            MoME.from_pretrained(folder)
        (folder / "model.safetensors").write_bytes(before)
    change(folder, lambda tensors: {k: torch.zeros_like(v) if k.endswith("bias") else v for k, v in tensors.items()})
    model = MoME.from_pretrained(folder)
    state = torch.random.get_rng_state()
    with torch.no_grad():
        model.head.controller.weight.zero_()
    assert "head.controller.weight" in str(damage_of(model, model.state_dict(), lambda: MoME(model.config)))
    assert torch.equal(state, torch.random.get_rng_state())  # comparing with a new model draws no random number


def test_a_lost_block_of_a_file_is_refused_and_pruned_rows_are_not(folder: Path) -> None:
    name = max(matrices(folder), key=lambda name: load_file(folder / "model.safetensors")[name].numel())
    before = (folder / "model.safetensors").read_bytes()

    def zeros(first: int, count: int) -> Callable[[Tensors], Tensors]:
        def replace(tensors: Tensors) -> Tensors:
            tensors[name].view(-1)[first : first + count] = 0
            return tensors

        return replace

    tensor = load_file(folder / "model.safetensors")[name]
    unit = tensor[0].numel()
    assert tensor.numel() > 1100 + unit
    change(folder, zeros(13, 1024))
    with pytest.raises(InputError, match=f"1 of .* tensors hold a block of zeros, as a damaged disk leaves: {name}"):
        MoME.from_pretrained(folder)
    MoME.from_pretrained(folder, allow_damaged=True)
    for first, count in ((unit, -(-1000 // unit) * unit), (13, 900)):
        (folder / "model.safetensors").write_bytes(before)
        change(folder, zeros(first, count))
        assert MoME.from_pretrained(folder).load_notes == ()


def test_left_over_tensors_and_unknown_names_reach_the_result(folder: Path) -> None:
    change(folder, lambda tensors: {**tensors, "encoder.stage9.weight": torch.ones(3)})
    config = json.loads((folder / "config.json").read_text())
    config["labels"][1] = config["trained_labels"][0] = "splene"
    (folder / "config.json").write_text(json.dumps(config))
    model = MoME.from_pretrained(folder)
    assert "encoder.stage9.weight" in model.load_notes[0] and "did you mean 'spleen'?" in model.load_notes[1]
    result = Segmenter(model).segment(Volume(patient_hu(), patient_affine()), ["liver"])
    assert all(note in result.notes for note in model.load_notes)


@pytest.mark.parametrize(
    ("setting", "value", "words"),
    [
        ("spacing", [400, 400, 400], "0.1 to 30 mm"),
        ("spacing", [1.5, 1.5, 0.01], "0.1 to 30 mm"),
        ("hu_window", [0, 1], "hu_window"),
        ("hu_window", [-1e9, 1e9], "hu_window"),
        ("hu_window", [5000, 6000], "hu_window"),
        ("padding_hu", 1e9, "padding_hu"),
    ],
)
def test_settings_that_no_segmenter_has_are_refused(folder: Path, setting: str, value: object, words: str) -> None:
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), setting: value}))
    for load in (MoMEProcessor.from_pretrained, Segmenter):
        with pytest.raises(InputError, match=words):
            load(folder)
    with pytest.raises(InputError, match=words):
        Segmenter(MoME.from_pretrained(folder))
    good = {"spacing": [2, 2, 2], "hu_window": [-200, 300], "padding_hu": -1000}[setting]
    assert MoMEProcessor.from_pretrained(folder, **{setting: good}).settings()[setting] == good


def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch) -> None:
    asked = []

    def answers() -> bool:
        asked.append(1)
        return False

    monkeypatch.setattr("mome.hub_connection.hub_answers", answers)
    with pytest.raises(InputError, match="'org/missing' cannot be loaded"):
        MoME.from_pretrained("org/missing")
    assert len(asked) == 1
    with pytest.raises(InputError, match="cannot be loaded"):
        MoMEProcessor.from_pretrained("org/missing")
    assert MoME.from_pretrained("mome-ct-tiny") is not None and len(asked) == 2  # a folder needs no network
