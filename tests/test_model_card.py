"""The README.md that is saved with a model: what it says, and that nobody's own words are replaced."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.errors import LocalEntryNotFoundError
from small_models import small
from training_runs import NAMES, write_recipe
from transformers.utils import PushToHubMixin
from transformers.utils.hub import create_and_tag_model_card

from mome import MoME, MoMEProcessor
from mome.model_card import CARD_FILE, MARK, cell, model_card, plain, sections_of_loaded
from mome.training.config_file import load_run_config
from mome.training.loop import train


def card_of(folder: Path) -> str:
    return (folder / CARD_FILE).read_text()


def headings(card: str) -> list[str]:
    return re.findall(r"^## (.*)$", card, re.MULTILINE)


def test_a_saved_model_has_a_card(tmp_path: Path) -> None:
    model = small(experts="swiglu(n=4)", labels=["liver", "spleen", "aorta"], trained_labels=["liver", "spleen"])
    model.processor = MoMEProcessor(spacing=[2.0, 2.0, 3.0])
    model.save_pretrained(tmp_path)
    card = card_of(tmp_path)
    assert card.startswith("---\nlibrary_name: mome\n") and card.count("\n---\n") == 1
    assert "liver, spleen.\n" in card and "text rows of 1 other structure," in card
    assert "mome segment ct.nii.gz -m MODEL -p 'liver'" in card
    assert "| voxel spacing of the network | 2 × 2 × 3 mm, RAS |" in card and "| experts | `swiglu` |" in card
    assert headings(card) == ["What it segments", "Use", "Design", "What is not said here"]
    assert max(map(len, card.splitlines())) <= 120


def test_a_model_that_knows_nothing_says_so() -> None:
    model = small(labels=["liver"], trained_labels=[])
    assert "trained on no structure, and its masks mean nothing" in model_card(model.config, None, 10)


def test_words_of_ones_own_stay(tmp_path: Path) -> None:
    model = small(labels=["liver"], trained_labels=["liver"])
    (tmp_path / CARD_FILE).write_text("# Ours\n")
    model.save_pretrained(tmp_path)
    assert card_of(tmp_path) == "# Ours\n"
    (tmp_path / CARD_FILE).unlink()
    model.save_pretrained(tmp_path)
    assert "MoME for CT, 1 structure\n" in card_of(tmp_path)
    first = card_of(tmp_path)
    model.config.trained_labels = []
    model.save_pretrained(tmp_path)
    assert "MoME for CT, 0 structures\n" in card_of(tmp_path)
    for old, new in (("\n---\n", "\nlicense: apache-2.0\n---\n"), ("## What is not", "We add this.\n\n## What is not")):
        changed = first.replace(old, new, 1)
        (tmp_path / CARD_FILE).write_text(changed)
        model.save_pretrained(tmp_path)
        assert card_of(tmp_path) == changed != first


def test_a_card_that_comes_back_from_the_hub_is_not_a_changed_one(tmp_path: Path) -> None:
    """transformers reads the card of the Hub and writes it again before it uploads."""
    model = small(labels=["liver"], trained_labels=["liver"])
    model.save_pretrained(tmp_path)
    ModelCard.load(tmp_path / CARD_FILE).save(tmp_path / CARD_FILE)
    model.config.trained_labels = []
    model.save_pretrained(tmp_path)
    assert "MoME for CT, 0 structures\n" in card_of(tmp_path)


@pytest.mark.parametrize("words", ["Für uns".encode("latin-1"), "ours".encode("utf-16")])
def test_words_of_ones_own_need_not_be_utf8(words: bytes, tmp_path: Path) -> None:
    """A model loads whatever its card is: the card is no part of it."""
    small(labels=["liver"], trained_labels=["liver"]).save_pretrained(tmp_path)
    (tmp_path / CARD_FILE).write_bytes(words)
    MoME.from_pretrained(tmp_path).save_pretrained(tmp_path)
    assert (tmp_path / CARD_FILE).read_bytes() == words


def test_loaded_weights_name_where_they_come_from_and_no_folder(tmp_path: Path) -> None:
    MoME.from_pretrained("mome-ct-tiny").save_pretrained(tmp_path / "patients-of-ward-7")
    assert "loaded from `mome-ct-tiny`" in card_of(tmp_path / "patients-of-ward-7")
    for name in (f"local-dir:{tmp_path / 'patients-of-ward-7'}", tmp_path / "patients-of-ward-7"):
        MoME.from_pretrained(name).save_pretrained(tmp_path / "again")
        again = card_of(tmp_path / "again")
        assert "loaded from another model" in again and "ward" not in again
    # Whatever the number of copies, the card says whose weights the first one had, and so whose terms hold.
    MoME.from_pretrained(tmp_path / "again").save_pretrained(tmp_path / "third")
    for card, depth in ((again, "###"), (card_of(tmp_path / "third"), "####")):
        assert f"\n{depth} Origin\nThe weights were loaded from `mome-ct-tiny`." in card
    assert sections_of_loaded("org/name", None)[0].startswith("## Origin\nThe weights were loaded from `org/name`.")


def test_labels_cannot_write_markdown_or_code(tmp_path: Path) -> None:
    label = "x'`</td><script>|$(rm)\n# y"
    model = small(labels=[label], trained_labels=[label])
    model.save_pretrained(tmp_path)
    shown = MARK.sub("", card_of(tmp_path))
    assert "<" not in shown and "$(" not in shown and "\n# y" not in shown
    assert shown.count("`") % 2 == 0 and shown.count("'") == 5  # two prompts and a genitive
    assert plain("a|b") == "a b" and cell("a|b <i>\n c") == r"a\|b &lt;i> c"
    assert cell("![a](https://example.org/a.png)") == r"!\[a](https://example.org/a.png)"
    assert cell(r"\[a](https://example.org) \| b") == r"\\\[a](https://example.org) \\\| b"
    model = small(labels=["[a](https://example.org)"], trained_labels=["[a](https://example.org)"])
    assert "\n\\[a](https://example.org).\n" in model_card(model.config, None, 10)


def test_a_trained_model_says_what_it_was_trained_on(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    settings = ["train.steps=2", "train.validate_every=1", "train.learning_rate=0.02", f"train.out={tmp_path / 'run'}"]
    folder = train(load_run_config(recipe, settings))
    card = card_of(folder)
    assert "At most 2 steps of 4 patches, seed 0, precision float32, loss `bce_dice`." in card
    assert re.search(r"^\| OpenKBP structures \| 3 \| MIT \| Babier et al", card, re.MULTILINE)
    counts = dict(re.findall(r"^\| ([a-z ]+) \| (\d) \|$", card, re.MULTILINE))
    assert counts == {name.replace("_", " "): "2" if name == "mandible" else "3" for name in NAMES}
    assert str(tmp_path) not in card and "c0" not in card
    assert "## Validation" not in card
    (folder / CARD_FILE).write_text(card + "We add this.\n")  # the finished run is started again
    train(load_run_config(recipe, settings))
    assert card_of(folder) == card + "We add this.\n"
    best = tmp_path / "run" / "best"
    assert re.search(r"^Mean Dice 0\.\d{3} after [12] steps", card_of(best), re.MULTILINE)
    # The model goes on: its card tells of the training that it started from, and of the new one.
    again = [*settings[:-1], f"init={best}", f"train.out={tmp_path / 'second'}", "model={}", "train.ema=0"]
    second = card_of(train(load_run_config(recipe, again)))
    assert headings(second)[3:] == ["Training", "Origin", "What is not said here"]
    assert second.count("Babier et al") == 2 and second.index("## Origin") < second.index("### Training\n")


OWN = "# A card of somebody's own\n"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A Hub that holds the card `there`, or none, and receives the card `uploaded`."""
    hub = SimpleNamespace(there=None, uploaded=None, create_repo=lambda repo_id, **_: SimpleNamespace(repo_id=repo_id))

    def load(*_, **__):
        if hub.there is None:
            raise LocalEntryNotFoundError("no card")
        return ModelCard(hub.there)

    def upload(self, working_dir, *args, **kwargs):
        hub.uploaded = card_of(Path(working_dir))

    monkeypatch.setattr("transformers.utils.hub.hf_api", lambda: hub, raising=False)
    monkeypatch.setattr("transformers.modeling_utils.hf_api", lambda: hub, raising=False)
    for module in ("transformers.utils.hub", "transformers.modeling_utils"):  # of earlier releases
        monkeypatch.setattr(f"{module}.create_repo", hub.create_repo, raising=False)
    monkeypatch.setattr(ModelCard, "load", load)
    monkeypatch.setattr(PushToHubMixin, "_upload_modified_files", upload)
    return hub


def test_the_hub_gets_the_card_and_not_an_empty_one(hub: SimpleNamespace) -> None:
    """transformers lays a card into the folder that it uploads: that of the Hub, or an empty one."""
    model = small(labels=["liver"], trained_labels=["liver"])
    model.push_to_hub("org/x")
    assert "MoME for CT, 1 structure" in hub.uploaded
    filled = create_and_tag_model_card("org/x").content.replace("[More Information Needed]", "MIT", 1)
    for hub.there in (f"---\nlicense: mit\n---\n{OWN}", filled):
        model.push_to_hub("org/x")
        assert hub.uploaded.split() == hub.there.split()


def test_a_card_of_a_folder_is_uploaded_with_it(hub: SimpleNamespace, tmp_path: Path) -> None:
    """Before, it was replaced on the disk by that of the Hub."""
    model = small(labels=["liver"], trained_labels=["liver"])
    (tmp_path / CARD_FILE).write_text(OWN)
    model.save_pretrained(tmp_path, push_to_hub=True, repo_id="org/x")
    assert hub.uploaded == card_of(tmp_path) == OWN
    model.push_to_hub("org/x")
    assert "MoME for CT, 1 structure" in hub.uploaded
