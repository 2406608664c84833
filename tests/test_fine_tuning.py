"""Fine-tuning: adapters on experts, and new labels that leave the logits of the old ones as they are."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from small_models import small
from training_runs import losses, write_recipe

from mome import MoME, create_model
from mome.errors import InputError
from mome.processing import MoMEProcessor
from mome.registry import TEXT_ENCODERS
from mome.training import adapters, loop
from mome.training.adapters import Adapters, expert_matrices
from mome.training.config import LoraSettings, RunConfig
from mome.training.config_file import load_run_config
from mome.training.setup import build_model, build_model_of_init
from mome.training.text_rows import TextRows, text_rows
from mome.zoo import preset_processor

# -- adapters ------------------------------------------------------------------------------------------------


def test_the_matrices_of_experts() -> None:
    found = expert_matrices(small(experts="swiglu(n=2, hidden=4)", router="topk(k=1)"))
    assert len(found) == 4 and all(name.endswith(("experts.gate_up_proj", "experts.down_proj")) for name in found)
    assert len(expert_matrices(small(experts="linear"))) == 2
    shared = small(experts="shared(routed=mlp(n=2, hidden=4), shared=mlp(hidden=4))", router="topk(k=1)")
    found = expert_matrices(shared)  # of two scales: two matrices of each kind and the gate, though they are nested
    assert len(found) == len(set(found)) == 10
    inside = small(encoder="unet(channels=[4, 8, 8], layer=moe(experts=mlp(n=2, hidden=4), router=topk(k=1)))")
    assert any(name.startswith("encoder.") for name in expert_matrices(inside))


def test_adapters_freeze_all_else_and_change_nothing_at_first() -> None:
    pytest.importorskip("peft", reason="peft is not installed")
    model = small(experts="swiglu(n=2, hidden=4)", router="topk(k=1)")
    volume, text = torch.rand(1, 1, 16, 16, 16), torch.randn(2, 12)
    with torch.no_grad():
        before = model(volume, text).logits
        weights = {name: value.clone() for name, value in model.state_dict().items()}
        made = Adapters(model, LoraSettings(rank=2, also_train=("head",)))
        torch.testing.assert_close(model(volume, text).logits, before, rtol=0, atol=1e-6)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained and all("lora_" in name or name.startswith("head.") for name in trained)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
        changed = model(volume, text).logits
        plain = made.merged(model)
        torch.testing.assert_close(plain(volume, text).logits, changed, rtol=1e-4, atol=1e-5)
    assert plain.state_dict().keys() == weights.keys()
    differ = {name for name, value in plain.state_dict().items() if not torch.equal(value, weights[name])}
    assert differ == set(expert_matrices(plain))


def test_fine_tuning_with_adapters_saves_plain_models_and_resumes(tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="peft is not installed")
    recipe = write_recipe(tmp_path)
    first = loop.train(load_run_config(recipe, [f"train.out={tmp_path / 'first'}", "train.steps=2"]))
    tuned = [
        f"init={first}",
        "lora.rank=2",
        "train.steps=6",
        "train.validate_every=3",
        f"train.out={tmp_path / 'tuned'}",
    ]
    folder = loop.train(load_run_config(recipe, tuned))
    before, after = (MoME.from_pretrained(path).state_dict() for path in (first, folder))
    assert before.keys() == after.keys()
    differ = {name for name in before if not torch.equal(before[name], after[name])}
    assert set(expert_matrices(MoME.from_pretrained(folder))) <= differ
    assert not any(name.startswith("encoder.") for name in differ) and any("head." in name for name in differ)
    assert (tmp_path / "tuned" / "best" / "model.safetensors").is_file()
    whole, weights = losses(tmp_path / "tuned"), (folder / "model.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "tuned" / "checkpoints" / "step_00000006")
    shutil.rmtree(folder)
    loop.train(load_run_config(recipe, tuned))
    assert losses(tmp_path / "tuned") == whole and (folder / "model.safetensors").read_bytes() == weights


@pytest.fixture
def another_precision() -> Iterator[None]:
    """Lets Accelerate forget the precision of this process, which it fixes at the first run."""
    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()


@pytest.mark.parametrize("rank", [0, 2])
def test_models_that_train_in_bfloat16_are_saved_while_they_train(
    tmp_path: Path, rank: int, another_precision: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """Accelerate replaces the forward of such a model, which the copies must survive; without a moving average."""
    if rank:
        pytest.importorskip("peft", reason="peft is not installed")
    options = [
        f"lora.rank={rank}",
        "train.mixed_precision=bf16",
        "train.ema=0",
        "train.steps=2",
        "train.validate_every=1",
    ]
    folder = loop.train(load_run_config(write_recipe(tmp_path), [f"train.out={tmp_path / 'r'}", *options]))
    best, last = (MoME.from_pretrained(path) for path in (tmp_path / "r" / "best", folder))
    assert best.state_dict().keys() == last.state_dict().keys() and best.dtype == torch.float32
    first = (tmp_path / "r" / "validation.jsonl").read_text().splitlines()
    assert len(first) == 2
    said = "note: without init, lora.rank=2 freezes weights that were never trained on CT" in capsys.readouterr().out
    assert said == bool(rank)


def test_adapters_that_cannot_be_made(monkeypatch) -> None:
    settings = LoraSettings(rank=2)
    with pytest.raises(InputError, match="experts=conv.* have no matrices"):
        Adapters(small(experts="conv(n=2)", router="topk(k=1)"), settings)
    with pytest.raises(InputError, match="'heat', no module of the model, did you mean 'head'"):
        Adapters(small(experts="linear"), LoraSettings(rank=2, also_train=("heat",)))
    monkeypatch.setattr(adapters.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="needs the package peft") as caught:
        Adapters(small(experts="linear"), settings)
    assert 'pip install "mome[peft]"' in str(caught.value)


def test_fine_tuning_keeps_the_voxels_and_the_window_of_the_weights() -> None:
    torso = "mome-ct-torso-tiny"
    saved = MoMEProcessor.from_pretrained(torso).settings()
    assert saved != preset_processor("mome_ct_tiny").settings()
    run = RunConfig(preset="mome_ct_tiny", init=torso, labels=("liver",))
    assert build_model(run)[1].settings() == saved
    other = dataclasses.replace(run, processor={"spacing": [2.0, 2.0, 2.0]})
    assert build_model(other)[1].settings() == {**saved, "spacing": [2.0, 2.0, 2.0]}


def test_the_overlap_of_tiles_is_that_of_the_run() -> None:
    """That of the first weights was chosen for them."""
    run = RunConfig(preset="mome_ct_tiny", init="mome-ct-tiny", labels=("mandible",))
    assert MoMEProcessor.from_pretrained("mome-ct-tiny").overlap == 0.25 and build_model(run)[1].overlap == 0.5
    assert build_model(dataclasses.replace(run, processor={"overlap": 0.375}))[1].overlap == 0.375
    run = dataclasses.replace(run, init="mome-ct-torso-tiny", labels=("liver",))
    assert MoMEProcessor.from_pretrained("mome-ct-torso-tiny").extend_mm == 15 and build_model(run)[1].extend_mm == 0
    assert build_model(dataclasses.replace(run, processor={"extend_mm": 10}))[1].extend_mm == 10


# -- new labels ----------------------------------------------------------------------------------------------


class Tower:
    """Stands for a text tower: the rows depend on the letters."""

    needs_tower = True
    shift = 0.0

    def width(self, num_labels: int) -> int:
        return 384

    def encode(self, texts: list[str]) -> torch.Tensor:
        letters = [torch.Generator().manual_seed(sum(map(ord, text))) for text in texts]
        return torch.stack([torch.randn(384, generator=one) + 3 for one in letters]) + self.shift

    def stored_labels(self) -> list[str]:
        return []


def test_settings_of_the_text_that_change_nothing_are_said(tmp_path: Path) -> None:
    labels = ["mandible", "larynx"]
    shape = {"encoder": "unet(channels=[4, 8])", "dim": 8, "patch_size": [16, 16, 16], "text_encoder": "learned"}
    model = create_model("mome_ct_tiny", labels=labels, trained_labels=labels, **shape)
    assert TextRows(model, labels, 0.0, 0).notes == []
    (note,) = TextRows(model, labels, 0.5, 0, 0.3).notes
    assert note.startswith("train.synonyms and sampling.templates: without effect") and "learned" in note
    model.save_pretrained(tmp_path / "first")
    run = RunConfig(init=str(tmp_path / "first"), labels=tuple(labels), bank="trained", text_rows="new")
    with pytest.raises(InputError, match="no text tower to embed them"):
        text_rows(build_model(run)[0], run)


def logits(model: MoME, names: list[str]) -> torch.Tensor:
    volume = torch.rand(1, 1, 16, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model.eval()(volume, model.text_bank.rows(names)).logits


def test_a_new_label_leaves_the_logits_of_the_old_ones(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(TEXT_ENCODERS, "build", lambda spec: Tower())
    old = ["mandible", "larynx"]
    shape = {"encoder": "unet(channels=[4, 8])", "dim": 8, "patch_size": [16, 16, 16]}
    first = create_model("mome_ct_tiny", labels=old, trained_labels=old, **shape)
    text_rows(first, RunConfig(labels=tuple(old)))
    before = logits(first, old)
    first.save_pretrained(tmp_path / "first")
    run = RunConfig(init=str(tmp_path / "first"), labels=("liver", *old), bank="trained")
    model, _ = build_model(run)
    rows = text_rows(model, run)
    assert torch.equal(logits(model, old), before)
    assert torch.isfinite(logits(model, ["liver"])).all()
    assert torch.equal(rows.at(0)[1:], model.text_bank.rows(old)) and model.config.trained_labels == ["liver", *old]
    torch.testing.assert_close(model.text_bank.rows(["liver"]), Tower().encode(["liver"]))
    # Rows that are centred anew change the logits.
    again = RunConfig(init=str(tmp_path / "first"), labels=("liver", *old), bank="trained", text_rows="new")
    recentred, _, known = build_model_of_init(again)
    text_rows(recentred, again)
    assert known == set() and build_model_of_init(run)[2] == set(old)  # the weights know the rows that are kept
    assert not torch.allclose(logits(recentred, old), before)
    monkeypatch.setattr(Tower, "shift", 1.0)
    with pytest.raises(InputError, match="gives 'mandible' another row|another row than the model's bank") as caught:
        text_rows(build_model(run)[0], run)
    assert "text_rows: new" in str(caught.value)


def test_a_label_that_no_case_annotates_is_not_said_to_be_trained(tmp_path: Path) -> None:
    """A segmentation of it would come without a warning; labels that `init` was trained on stay known."""
    recipe, options = write_recipe(tmp_path), ["train.steps=1", "train.validate_every=0"]
    labels = "labels=[mandible, larynx, liver]"
    first = loop.train(load_run_config(recipe, [labels, f"train.out={tmp_path / 'a'}", *options]))
    assert MoME.from_pretrained(first).config.trained_labels == ["mandible"]
    model = MoME.from_pretrained(first)
    model.relabel(list(model.config.labels), ["larynx"])
    model.processor = MoMEProcessor.from_pretrained(first)
    model.save_pretrained(tmp_path / "knows")
    more = [labels, f"init={tmp_path / 'knows'}", f"train.out={tmp_path / 'b'}"]
    second = loop.train(load_run_config(recipe, [*more, *options]))
    assert MoME.from_pretrained(second).config.trained_labels == ["mandible", "larynx"]
