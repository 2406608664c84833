"""Text towers of tiny random models: pooling, padding, batches, instructions, templates, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_text_models import save_tiny, spec

from mome.encoders.text import hub_tower
from mome.encoders.text.templates import NAMED_TEMPLATES, TEMPLATE
from mome.errors import InputError
from mome.registry import TEXT_ENCODERS

TEXTS = ["liver", "the upper lobe of the left lung", "spleen", "left adrenal gland", "lesion in the pancreas"]


@pytest.fixture(scope="module")
def towers(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("towers")
    return {kind: save_tiny(kind, folder / kind) for kind in ("bert", "clip", "qwen3")}


def build(name: str, folder: str, **arguments: object):
    return TEXT_ENCODERS.build(spec(name, folder, **arguments))


def hidden_of(folder: str, sentence: str) -> tuple[torch.Tensor, list[int]]:
    """Hidden states (N, D) and tokens of one sentence, run alone."""
    from transformers import AutoModel, AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(folder)(sentence, return_tensors="pt")
    with torch.no_grad():
        hidden = AutoModel.from_pretrained(folder).eval()(**tokens).last_hidden_state[0]
    return hidden, tokens["input_ids"][0].tolist()


# -- pooling ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "pooling"),
    [("bert", "mean"), ("bert", "cls"), ("bert", "last"), ("bert", "pooler"), ("qwen3", "mean"),
     ("qwen3", "last_token"), ("qwen3", "eos")],
)  # fmt: skip
def test_pooling_against_a_literal_reference(towers: dict[str, str], kind: str, pooling: str) -> None:
    rows = build("hf", towers[kind], pooling=pooling, normalize=False, template="a CT of the {}").encode(TEXTS[:3])
    for text, row in zip(TEXTS, rows, strict=False):
        hidden, ids = hidden_of(towers[kind], f"a CT of the {text}")
        if pooling == "mean":
            expected = sum(hidden) / len(ids)
        elif pooling == "cls":
            expected = hidden[0]
        elif pooling == "eos":
            expected = hidden[ids.index(4)]
        elif pooling == "pooler":
            from transformers import AutoModel

            pooler = AutoModel.from_pretrained(towers[kind]).pooler.dense
            expected = torch.tanh(hidden[0] @ pooler.weight.T + pooler.bias).detach()
        else:
            expected = hidden[len(ids) - 1]
        torch.testing.assert_close(row, expected, atol=1e-6, rtol=1e-5)


def test_eos_is_the_first_end_token(towers: dict[str, str]) -> None:
    """A text may itself hold an end token; hidden states behind it belong to no sentence."""
    row = build("hf", towers["qwen3"], pooling="eos", normalize=False, template="{}").encode(["liver [END] spleen"])[0]
    hidden, ids = hidden_of(towers["qwen3"], "liver [END] spleen")
    assert ids.count(4) == 2
    torch.testing.assert_close(row, hidden[ids.index(4)], atol=1e-6, rtol=1e-5)


def test_clip_reads_its_width_and_projects(towers: dict[str, str]) -> None:
    from transformers import AutoTokenizer, CLIPTextModelWithProjection

    tower = build("clip", towers["clip"], width=0)
    assert tower.width(3) == 8
    model = CLIPTextModelWithProjection.from_pretrained(towers["clip"]).eval()
    tokens = AutoTokenizer.from_pretrained(towers["clip"])(TEMPLATE.format("left kidney"), return_tensors="pt")
    with torch.no_grad():
        expected = model(**tokens).text_embeds[0]
    torch.testing.assert_close(tower.encode(["liver", "left kidney"])[1], expected, atol=1e-6, rtol=1e-5)


def _small_clip(folder: Path) -> str:
    """A whole CLIP model of width 8, whose text half states no width of its own, with its tokenizer."""
    from transformers import AutoTokenizer, CLIPConfig, CLIPModel

    save_tiny("clip", folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**shape, "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "bos_token_id": 2}
    torch.manual_seed(0)
    config = CLIPConfig(
        text_config={**text, "initializer_range": 0.5},
        vision_config={**shape, "image_size": 32, "patch_size": 16},
        projection_dim=8,
    )
    CLIPModel(config).save_pretrained(folder)
    return str(folder)


def test_the_text_half_of_a_whole_clip_model_has_the_width_of_the_model(tmp_path: Path) -> None:
    from transformers import AutoTokenizer, CLIPModel

    folder = _small_clip(tmp_path / "clip")
    got = build("clip", folder, width=0).encode(["left kidney"])
    tokens = AutoTokenizer.from_pretrained(folder)(TEMPLATE.format("left kidney"), return_tensors="pt")
    model = CLIPModel.from_pretrained(folder).eval()
    with torch.no_grad():
        expected = model.text_projection(model.text_model(**tokens).pooler_output)
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)


def test_a_model_that_reads_more_than_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"(?s)CLIPModel does not run on text alone.*try: clip\(model=…\)") as caught:
        build("hf", _small_clip(tmp_path / "clip")).encode(["liver"])
    assert len(str(caught.value).splitlines()) <= 3


# -- padding and batches ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "pooling"), [("bert", "mean"), ("bert", "cls"), ("qwen3", "last_token")])
def test_the_padding_side_of_a_tokenizer_changes_nothing(tmp_path: Path, kind: str, pooling: str) -> None:
    rows = [
        build("hf", save_tiny(kind, tmp_path / side, padding_side=side), pooling=pooling).encode(TEXTS)
        for side in ("left", "right")
    ]
    assert torch.equal(rows[0], rows[1])


@pytest.mark.parametrize(("kind", "name"), [("bert", "hf"), ("qwen3", "hf"), ("clip", "clip")])
def test_the_batch_never_changes_a_row(towers: dict[str, str], kind: str, name: str, monkeypatch) -> None:
    arguments = {"width": 8} if name == "clip" else {"pooling": "last_token"}
    tower = build(name, towers[kind], **arguments)
    together = tower.encode(TEXTS * 9)
    alone = torch.cat([tower.encode([text]) for text in TEXTS])
    torch.testing.assert_close(together, alone.repeat(9, 1), atol=1e-6, rtol=0)
    monkeypatch.setattr(hub_tower, "_BATCH", 2)
    torch.testing.assert_close(tower.encode(TEXTS * 9), together, atol=1e-6, rtol=0)
    assert together.dtype == torch.float32 and not together.requires_grad and len(set(map(tuple, alone.tolist()))) == 5
    assert tower.encode([]).shape == (0, together.shape[1])


def test_weights_are_computed_in_float32(tmp_path: Path) -> None:
    from transformers import AutoModel

    folder = save_tiny("qwen3", tmp_path)
    AutoModel.from_pretrained(folder).bfloat16().save_pretrained(folder)
    tower = build("hf", folder, pooling="last_token", normalize=False)
    row = tower.encode(["liver"])[0]
    assert not torch.equal(row, row.bfloat16().float())


# -- instructions and templates ---------------------------------------------------------------------------------------


def test_an_instruction_stands_before_every_sentence(towers: dict[str, str]) -> None:
    instruction = "Instruct: name the organ\nQuery:"
    text = TEXT_ENCODERS.canonical(spec("hf", towers["qwen3"], instruction=instruction, pooling="last_token"))
    from mome.spec import dump

    row = TEXT_ENCODERS.build(dump({**text, "template": "{}", "normalize": False})).encode(["spleen"])[0]
    hidden, _ = hidden_of(towers["qwen3"], "Instruct: name the organ\nQuery:spleen")
    torch.testing.assert_close(row, hidden[-1], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("normalize", [True, False])
def test_an_ensemble_is_the_mean_of_normalised_rows(towers: dict[str, str], normalize: bool) -> None:
    templates = ["universal_model", "{}", "a CT image of the {}"]
    sentences = ["A computerized tomography of a {}", "{}", "a CT image of the {}"]
    rows = build("hf", towers["bert"], templates=templates, normalize=normalize).encode(["liver", "spleen"])
    for text, row in zip(("liver", "spleen"), rows, strict=True):
        expected = torch.zeros(16)
        for sentence in sentences:
            pooled = hidden_of(towers["bert"], sentence.format(text))[0].mean(0)
            expected += pooled / pooled.norm() / 3
        expected = expected / expected.norm() if normalize else expected
        torch.testing.assert_close(row, expected, atol=1e-6, rtol=1e-5)


def test_templates_by_name_and_alone_give_the_same_rows(towers: dict[str, str]) -> None:
    assert NAMED_TEMPLATES["universal_model"] == TEMPLATE
    rows = [
        build("hf", towers["bert"], **arguments).encode(["liver"])
        for arguments in ({}, {"template": "universal_model"}, {"templates": [TEMPLATE]})
    ]
    assert torch.equal(rows[0], rows[1]) and torch.equal(rows[0], rows[2])


def test_the_config_stores_the_templates(towers: dict[str, str]) -> None:
    from mome import MoMEConfig

    text = f"hf(model={towers['bert']!r}, templates=['a CT of a {{}}', '{{}}'])"
    config = MoMEConfig(encoder="unet(channels=[4, 8])", text_encoder=text, labels=["liver"], patch_size=[16, 16, 16])
    assert config.text_dim == 16 and config.text_encoder["templates"] == ["a CT of a {}", "{}"]
    again = MoMEConfig.from_dict(config.to_dict())
    assert (
        again.text_encoder == config.text_encoder
        and "templates=['a CT of a {}', '{}']" in again.part_strings()["text_encoder"]
    )


def test_specs_of_older_checkpoints_are_still_read() -> None:
    old = {
        "name": "hf", "model": "a/b", "revision": "main", "pooling": "last", "normalize": True, "template": TEMPLATE,
        "max_length": 77, "width": 384,
    }  # fmt: skip
    tower = TEXT_ENCODERS.build(old)
    assert tower.templates == (TEMPLATE,) and tower.instruction == "" and tower.width(0) == 384


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"templates": ["a CT"]}, "no {} for the prompt"),
        ({"templates": ["{} and {}"]}, "no {} for the prompt"),
        ({"template": "universal_modl"}, "did you mean 'universal_model'?"),
        ({"templates": ["{}", "prompt_only"]}, "stands twice in templates"),
        ({"templates": ["{}"], "template": "a {}"}, "both template and templates"),
        ({"pooling": "last_tokn"}, "did you mean 'last_token'?"),
        ({"width": -1}, "at least 0"),
        ({"max_length": 0}, "at least 1"),
        ({"templates": "{}"}, "is a list of str"),
        ({"trust_remote_code": True}, "no argument 'trust_remote_code'"),
    ],
)
def test_impossible_settings(arguments: dict[str, object], words: str) -> None:
    with pytest.raises(InputError) as caught:
        build("hf", "org/tower", **arguments)
    assert words in str(caught.value) and len(str(caught.value).splitlines()) <= 3


@pytest.mark.parametrize(
    ("kind", "name", "arguments", "texts", "words"),
    [
        ("bert", "hf", {"width": 12}, ["liver"], "rows of width 16, this model reads rows of width 12"),
        ("clip", "clip", {}, ["liver"], "rows of width 8, this model reads rows of width 512"),
        ("bert", "hf", {"max_length": 12}, ["liver " * 20], "reads at most 12"),
        ("bert", "hf", {}, ["liver " * 60], "reads at most 40"),
        ("clip", "clip", {"width": 8}, ["liver " * 60], "reads at most 40"),
        ("bert", "hf", {"template": "{}"}, ["qwertz"], "knows nothing of 'qwertz'"),
        ("bert", "hf", {"pooling": "eos"}, ["liver"], "has no end token"),
        ("qwen3", "hf", {"pooling": "pooler"}, ["liver"], "has no pooler"),
        ("qwen3", "hf", {"pooling": "cls"}, ["liver"], "the same row"),
    ],
)
def test_towers_that_do_not_fit(
    towers: dict[str, str], kind: str, name: str, arguments: dict, texts: list[str], words: str
) -> None:
    with pytest.raises(InputError) as caught:
        build(name, towers[kind], **arguments).encode(texts)
    assert words in str(caught.value) and len(str(caught.value).splitlines()) <= 3
    assert towers[kind] in str(caught.value)


def test_code_of_a_repository_is_never_run(tmp_path: Path) -> None:
    folder = tmp_path / "tower"
    save_tiny("bert", folder)
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nclass Evil: pass\n")
    (folder / "config.json").write_text(
        '{"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil"}}'
    )
    with pytest.raises(InputError, match="cannot be loaded"):
        build("hf", str(folder)).encode(["liver"])
    assert not (tmp_path / "ran").exists()


def test_pickles_are_read_as_weights_only(tmp_path: Path) -> None:
    """A pickle of tensors gives the same rows; one that runs code is refused."""
    import os
    import pickle

    folder = tmp_path / "tower"
    save_tiny("bert", folder)
    expected = build("hf", str(folder)).encode(["liver"])
    from safetensors.torch import load_file

    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert torch.equal(build("hf", str(folder)).encode(["liver"]), expected)

    class Evil:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(tmp_path / "ran"),)

    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(InputError, match="cannot be loaded"):
        build("hf", str(folder)).encode(["liver"])
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut"])
def test_damaged_torch_files(content: bytes, tmp_path: Path) -> None:
    save_tiny("bert", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(InputError, match="cannot be loaded"):
        build("hf", str(tmp_path)).encode(["liver"])


def test_damaged_weights_in_the_cache(tmp_path: Path, monkeypatch) -> None:
    """A pinned commit is read from the cache alone, where a download may have left a part of a file."""
    folder = tmp_path / "tower"
    save_tiny("bert", folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    monkeypatch.setattr(hub_tower.HubTower, "_is_cached", lambda self: True)
    with pytest.raises(InputError, match="cannot be loaded"):
        build("hf", str(folder)).encode(["liver"])


def test_a_changed_tower_has_another_fingerprint(tmp_path: Path, towers: dict[str, str]) -> None:
    first = build("hf", towers["bert"]).fingerprint()
    assert first == build("hf", towers["bert"]).fingerprint() and len(first) == 64
    assert first != build("hf", save_tiny("bert", tmp_path, seed=1)).fingerprint()


def test_free_text_at_another_width_is_refused_by_name(towers: dict[str, str]) -> None:
    """The checkpoint's tower moved to another model: said before any mask is made, and before any step of training."""
    from small_models import small

    from mome.prompts import embed_prompts, understand
    from mome.training.text_rows import TextRows

    model = small(text_encoder=f"hf(model={towers['bert']!r})", text_dim=12)
    for embed in (
        lambda: embed_prompts(understand(["lesion"], model), model),
        lambda: TextRows(model, ["liver", "spleen"], 0.0, seed=0),
    ):
        with pytest.raises(InputError, match="rows of width 16, this model reads rows of width 12") as caught:
            embed()
        assert "hf" in str(caught.value) and len(str(caught.value).splitlines()) <= 3
