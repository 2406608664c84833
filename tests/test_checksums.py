"""Checksums of a checkpoint: what was changed after it was saved is refused, and what writers do is not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import liver_and_spleen, remove_checksums, small
from transformers import AutoModel
from transformers.utils.hub import PushToHubMixin

from mome import MoME, MoMEConfig
from mome.changed_files import changes_of_folder
from mome.checksums import weights_sum
from mome.cli.main import main
from mome.errors import InputError
from mome.inference import Segmenter
from mome.processing import MoMEProcessor

WEIGHTS = "model.safetensors"
PROCESSOR = "preprocessor_config.json"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    liver_and_spleen().save_pretrained(folder)
    MoMEProcessor(spacing=[8, 9, 10]).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values, indent=7))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


@pytest.mark.parametrize("text", ['{"model_type": "mo', "[]", "[" * 70 + "]" * 70])
def test_a_broken_settings_file_has_a_hint(folder: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "config.json").write_text(text)
    for command in ("checksum", "info"):
        assert main([command, str(folder)]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert lines[0].startswith("config.json ") and lines[2] == "  try: copy or download it again", lines


def test_a_model_without_its_labels_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Masks do not depend on it, so that the model is used; the command says that it is missing, and makes it anew."""
    before = json.loads((folder / "labels.json").read_text())
    (folder / "labels.json").unlink()
    assert MoME.from_pretrained(folder).config.labels
    assert main(["checksum", str(folder)]) == 0
    assert "note: labels.json is missing" in capsys.readouterr().out
    assert main(["checksum", str(folder), "--write"]) == 0
    assert json.loads((folder / "labels.json").read_text()) == before
    capsys.readouterr()
    assert main(["checksum", str(folder)]) == 0
    assert "labels.json" not in capsys.readouterr().out


def test_the_labels_file_of_a_model_without_labels(tmp_path: Path) -> None:
    small(labels=[]).save_pretrained(tmp_path)
    before = (tmp_path / "labels.json").read_text()
    (tmp_path / "labels.json").unlink()
    assert main(["checksum", str(tmp_path), "--write"]) == 0
    assert json.loads((tmp_path / "labels.json").read_text()) == json.loads(before)


def refused(words: str, load: Callable[[], Any]) -> None:
    with pytest.raises(InputError, match=f"changed after it was saved: .*{words}") as caught:
        load()
    text = str(caught.value)
    assert "mome checksum FOLDER --write" in text and len(text.splitlines()) == 3, text


def transpose_a_square(tensors: dict[str, torch.Tensor]) -> None:
    name = next(n for n, t in tensors.items() if t.ndim == 2 and t.shape[0] == t.shape[1] and not torch.equal(t, t.T))
    tensors[name] = tensors[name].T.contiguous()


def swap_rows(tensors: dict[str, torch.Tensor]) -> None:
    tensors["text_bank.rows_LT"] = tensors["text_bank.rows_LT"].flip(0).contiguous()


def add_a_little(tensors: dict[str, torch.Tensor]) -> None:
    tensors["head.controller.weight"][0, 0] += 1e-3


EDITS: dict[str, tuple[str, Callable[[Any], Any], str]] = {
    "labels swapped": ("config.json", lambda c: c["labels"].reverse(), "labels in config.json"),
    "another trained label": ("config.json", lambda c: c["trained_labels"].append("spleen"), "trained_labels in"),
    "another patch": ("config.json", lambda c: c.update(patch_size=[16, 16, 32]), "patch_size in config.json"),
    "a part's argument": ("config.json", lambda c: c["head"].update(negative_slope=0.1), "head in config.json"),
    "a default left out": ("config.json", lambda c: c.pop("head_channels"), "head_channels in config.json"),
    "window": (PROCESSOR, lambda c: c.update(hu_window=[-150.0, 250.0]), f"hu_window in {PROCESSOR}"),
    "orientation": (PROCESSOR, lambda c: c.update(orientation="LAS"), f"orientation in {PROCESSOR}"),
    "spacing left out": (PROCESSOR, lambda c: c.pop("spacing"), f"spacing in {PROCESSOR}"),
    "table": ("labels.json", lambda c: c["labels"][0].update(snomed="1"), "labels in labels.json"),
    "trained in the table": ("labels.json", lambda c: c["trained"].append("spleen"), "trained in labels.json"),
}
WEIGHT_EDITS = {"transposed": transpose_a_square, "rows": swap_rows, "a little": add_a_little}


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_by_hand_is_refused_and_named(folder: Path, name: str) -> None:
    file, change, words = EDITS[name]
    edit(folder / file, change)
    refused(words, lambda: MoME.from_pretrained(folder))
    refused(words, lambda: Segmenter(folder))
    if file == "config.json":
        refused(words, lambda: MoMEConfig.from_pretrained(folder))
    if file != "labels.json":  # nothing reads it
        refused(words, lambda: AutoModel.from_pretrained(folder))
    assert MoME.from_pretrained(folder, allow_damaged=True) is not None


@pytest.mark.parametrize("name", WEIGHT_EDITS)
def test_changed_weights_are_refused(folder: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    edit_weights(folder, WEIGHT_EDITS[name])
    for load in (MoME.from_pretrained, AutoModel.from_pretrained, Segmenter):
        refused("the weights", lambda load=load: load(folder))
    refused("the weights", lambda: MoME.from_pretrained(folder, experts="mlp(n=2)"))
    refused("the weights", lambda: MoME.from_pretrained(folder, dtype=torch.bfloat16))
    assert main(["checksum", str(folder)]) == 2 and "the weights" in capsys.readouterr().err
    MoME.from_pretrained(folder, allow_damaged=True)


def test_files_of_another_checkpoint_are_refused(folder: Path, tmp_path: Path) -> None:
    other = liver_and_spleen()
    with torch.no_grad():
        other.head.controller.weight.mul_(2)
    other.relabel(["spleen", "liver"])
    other.save_pretrained(tmp_path / "other")
    for name, words in ((WEIGHTS, "the weights"), ("config.json", "the weights"), ("labels.json", "labels in labels")):
        before = (folder / name).read_bytes()
        shutil.copy(tmp_path / "other" / name, folder / name)
        refused(words, lambda: MoME.from_pretrained(folder))
        (folder / name).write_bytes(before)
    # The settings of another model are taken on purpose, as the message on a missing processor says.
    MoMEProcessor(spacing=[2, 2, 2]).save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other" / PROCESSOR, folder / PROCESSOR)
    assert MoME.from_pretrained(folder).loaded_processor.spacing == [2.0, 2.0, 2.0]


@pytest.mark.parametrize("text", ['{"spacing": [2', "[]", '{"spacing": [0, 1, 1]}', '{"spacin": [1, 1, 1]}', ""])
def test_a_model_is_not_loaded_without_its_damaged_processor(folder: Path, tmp_path: Path, text: str) -> None:
    """Before, it was loaded as if it had none, and saving it again lost the settings."""
    (folder / PROCESSOR).write_text(text)
    with pytest.raises(InputError, match="preprocessor_config|spacing"):
        MoME.from_pretrained(folder)
    assert MoME.from_pretrained(folder, allow_damaged=True).loaded_processor is None
    (folder / PROCESSOR).unlink()
    assert MoME.from_pretrained(folder).loaded_processor is None


def test_what_does_not_change_a_mask_is_no_change(folder: Path) -> None:
    edit(folder / "config.json", lambda c: c.update(transformers_version="9.9", architectures=["Other"], _x=1))
    edit(folder / PROCESSOR, lambda c: c.update(spacing=[8, 9, 10], image_processor_type="Other"))
    (folder / "README.md").write_text("a card")
    assert changes_of_folder(folder) == []
    assert MoME.from_pretrained(folder).load_notes == ()


def test_every_writer_keeps_the_sums_right(folder: Path, tmp_path: Path) -> None:
    def holds() -> None:
        assert changes_of_folder(folder) == []
        MoME.from_pretrained(folder)

    holds()
    MoMEProcessor.from_pretrained(folder, hu_window=[-100, 300]).save_pretrained(folder)
    holds()
    config = MoMEConfig.from_pretrained(folder)
    config.trained_labels = ["liver", "spleen"]
    config.save_pretrained(folder)  # the sum of the weights stays
    assert "weights" in json.loads((folder / "config.json").read_text())["checksums"]
    model = MoME.from_pretrained(folder, config=MoMEConfig.from_pretrained(folder))
    model.save_pretrained(folder)
    holds()
    one = weights_sum([folder / WEIGHTS])
    model.save_pretrained(folder, max_shard_size="2KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 1 and weights_sum(shards) == one == weights_sum(reversed(shards))
    holds()
    edit(shards[0].with_name("model.safetensors.index.json"), lambda index: index["metadata"].clear())
    holds()
    model.half().save_pretrained(folder)
    holds()
    AutoModel.from_pretrained(folder).save_pretrained(folder, variant="fp16")  # leaves the sum of the other file
    holds()
    MoME.from_pretrained(folder, experts="mlp(n=2)").save_pretrained(tmp_path / "new")
    assert changes_of_folder(tmp_path / "new") == []


def test_a_push_uploads_right_sums(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []

    def upload(self: Any, working_dir: Any, *args: Any, **kwargs: Any) -> None:
        found.append(changes_of_folder(Path(working_dir)))

    class Hub:
        def create_repo(self, repo_id: str, **_: Any) -> Any:
            return type("Repo", (), {"repo_id": repo_id})()

    class Card:
        def save(self, path: str) -> None:
            Path(path).write_text("card")

    for module in ("transformers.modeling_utils", "transformers.utils.hub"):
        monkeypatch.setattr(f"{module}.hf_api", lambda: Hub(), raising=False)
        monkeypatch.setattr(f"{module}.create_and_tag_model_card", lambda *_, **__: Card(), raising=False)
    monkeypatch.setattr(PushToHubMixin, "_upload_modified_files", upload)
    model = small()
    model.processor = MoMEProcessor(spacing=[3, 3, 3])
    model.save_pretrained(tmp_path / "m", push_to_hub=True)
    model.push_to_hub("org/m")
    MoMEProcessor().push_to_hub("org/m")
    model.config.push_to_hub("org/m")
    assert found == [[], [], [], []]
    assert changes_of_folder(tmp_path / "m") == []


def test_overrides_excuse_what_they_replace(folder: Path) -> None:
    edit(folder / "config.json", lambda c: (c["labels"].reverse(), c["head"].update(negative_slope=0.1)))
    edit(folder / PROCESSOR, lambda c: c.update(hu_window=[-150.0, 250.0]))
    refused("hu_window", lambda: MoME.from_pretrained(folder, labels=["liver"], head="dynamic(hidden=8)"))
    assert MoMEProcessor.from_pretrained(folder, hu_window=[-100, 300]).hu_window == [-100.0, 300.0]
    refused("hu_window", lambda: MoMEProcessor.from_pretrained(folder, spacing=[2, 2, 2]))
    MoMEProcessor(spacing=[8, 9, 10]).save_pretrained(folder)
    refused("labels in config.json", lambda: MoME.from_pretrained(folder, head="dynamic(hidden=8)"))
    refused("head in config.json", lambda: MoME.from_pretrained(folder, labels=["liver"]))
    model = MoME.from_pretrained(folder, head="dynamic(hidden=8)", labels=["liver"])
    assert model.config.labels == ["liver"] and model.config.head["negative_slope"] == 0
    assert MoME.from_pretrained(folder, config=liver_and_spleen().config).config.labels == ["liver", "spleen"]


def test_a_checkpoint_without_sums_loads_as_it_is(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    remove_checksums(folder)
    edit(folder / "config.json", lambda c: c["labels"].reverse())
    edit(folder / PROCESSOR, lambda c: c.update(hu_window=[-150.0, 250.0]))
    edit_weights(folder, add_a_little)
    model = MoME.from_pretrained(folder)
    assert model.config.labels == ["spleen", "liver"] and model.loaded_processor.hu_window == [-150.0, 250.0]
    assert changes_of_folder(folder) is None and main(["checksum", str(folder)]) == 0
    assert "has no checksums" in capsys.readouterr().out


def test_an_intended_change_is_accepted(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(folder / "config.json", lambda c: c["labels"].reverse())
    edit(folder / PROCESSOR, lambda c: c.update(hu_window=[-150.0, 250.0]))
    edit_weights(folder, swap_rows)
    assert main(["checksum", str(folder)]) == 2
    assert "labels in config.json, labels in labels.json, the weights, hu_window" in capsys.readouterr().err
    assert main(["checksum", str(folder), "--write"]) == 0
    assert "accepted: the weights" in capsys.readouterr().out
    assert main(["checksum", str(folder)]) == 0 and "as it was saved" in capsys.readouterr().out
    names = [entry["name"] for entry in json.loads((folder / "labels.json").read_text())["labels"]]
    assert MoME.from_pretrained(folder).config.labels == names == ["spleen", "liver"]
    for path in (folder / WEIGHTS, folder / "config.json"):
        path.write_bytes(path.read_bytes()[:300])
        assert main(["checksum", str(folder), "--write"]) == 2
    assert main(["checksum", str(folder.parent)]) == 2 and "no config.json" in capsys.readouterr().err


@pytest.mark.parametrize("sums", [3, [], "x", {}, {"labels": 3}, {"weights": None, "x": {}}, {"weights": 5}])
def test_sums_of_another_kind_are_a_change(folder: Path, sums: Any) -> None:
    for name in ("config.json", PROCESSOR, "labels.json"):
        before = (folder / name).read_bytes()
        edit(folder / name, lambda c: c.update(checksums=sums))
        refused(name, lambda: MoME.from_pretrained(folder))
        (folder / name).write_bytes(before)


def test_a_checkpoint_in_the_hubs_cache_is_checked(folder: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "hub" / "models--org--m" / "snapshots" / ("a" * 40)
    shutil.copytree(folder, snapshot)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("a" * 40)
    hub = {"cache_dir": str(tmp_path / "hub"), "local_files_only": True}
    assert MoME.from_pretrained("org/m", **hub).loaded_processor.spacing == [8.0, 9.0, 10.0]
    for name, change, words in (EDITS["labels swapped"], EDITS["window"], EDITS["table"]):
        before = (snapshot / name).read_bytes()
        edit(snapshot / name, change)
        refused(words, lambda: MoME.from_pretrained("org/m", **hub))
        (snapshot / name).write_bytes(before)
    edit_weights(snapshot, add_a_little)
    refused("the weights", lambda: MoME.from_pretrained("org/m@main", **hub))


def test_the_bundled_checkpoint_has_sums() -> None:
    assert changes_of_folder(Path(MoME.from_pretrained("mome-ct-tiny").config.name_or_path)) == []
