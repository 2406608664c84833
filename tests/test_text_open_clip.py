"""The text half of open_clip models: tiny random ones, and what is said where the package is missing."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch
from tiny_text_models import save_open_clip, save_tiny, spec

from mome.errors import InputError
from mome.registry import TEXT_ENCODERS


@pytest.fixture(scope="module", params=["clip", "bert"])
def saved(request, tmp_path_factory) -> str:
    """A CLIP of open_clip's own, and one with a text tower of transformers, as BiomedCLIP has."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "clip":
        return save_open_clip(folder, {"width": 16, "heads": 2, "layers": 1, "vocab_size": 49408})
    name = save_tiny("bert", folder)
    (folder / "model.safetensors").unlink()
    text = {
        "hf_model_name": name, "hf_tokenizer_name": name, "hf_proj_type": "mlp",
        "hf_pooler_type": "cls_last_hidden_state_pooler", "hf_model_pretrained": False,
    }  # fmt: skip
    return save_open_clip(folder, text)


def test_rows_are_the_models_own(saved: str) -> None:
    open_clip = importlib.import_module("open_clip")
    tower = TEXT_ENCODERS.build(spec("open_clip", saved, width=0, normalize=False, template="a CT of the {}"))
    assert tower.needs_tower and tower.width(3) == 8
    texts = ["liver", "left adrenal gland", "spleen"]
    rows = tower.encode(texts)
    name = f"local-dir:{saved}"
    model = open_clip.create_model(name, require_pretrained=True, pretrained_text=False).eval()
    tokens = open_clip.get_tokenizer(name)([f"a CT of the {text}" for text in texts])
    with torch.no_grad():
        torch.testing.assert_close(rows, model.encode_text(tokens), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(tower.encode(["spleen"])[0], rows[2], atol=1e-6, rtol=1e-5)
    assert not hasattr(tower._tower[1], "visual") and len(tower.fingerprint()) == 64


def test_long_text_and_another_width_are_refused(saved: str) -> None:
    with pytest.raises(InputError, match="at most 12 tokens"):
        TEXT_ENCODERS.build(spec("open_clip", saved, width=8)).encode(["liver", "liver spleen " * 10])
    with pytest.raises(InputError, match="rows of width 8, this model reads rows of width 512"):
        TEXT_ENCODERS.build(spec("open_clip", saved)).encode(["liver"])


def test_a_folder_without_weights_is_no_random_model(saved: str, tmp_path: Path) -> None:
    for path in Path(saved).iterdir():
        if path.suffix != ".safetensors":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    with pytest.raises(InputError, match="cannot be loaded"):
        TEXT_ENCODERS.build(spec("open_clip", str(tmp_path), width=8)).encode(["liver"])


def test_a_missing_extra_is_named(tmp_path: Path, monkeypatch) -> None:
    real = importlib.import_module

    def without(name: str, *rest: object):
        if name == "open_clip":
            raise ModuleNotFoundError("No module named 'open_clip'", name="open_clip")
        return real(name, *rest)

    monkeypatch.setattr(importlib, "import_module", without)
    with pytest.raises(InputError, match="needs open_clip, which is not installed") as caught:
        TEXT_ENCODERS.build(spec("open_clip", str(tmp_path))).encode(["liver"])
    assert "pip install 'mome[open_clip]'" in str(caught.value) and len(str(caught.value).splitlines()) <= 3
