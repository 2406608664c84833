"""Tiny random text models of transformers, saved to a folder as the Hub holds them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

WORDS = (
    "a an of the ct computerized tomography liver spleen aorta thymus left right upper lobe lung kidney gland adrenal "
    "organ name query instruct : heart pancreas stomach lesion in magnetic resonance image to sigmoid "
    "spinal cord brainstem esophagus parotid mandible larynx my"
).split()
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[END]"]
_TEMPLATES = {
    "bert": "[CLS] $A [SEP]",
    "clip": "[CLS] $A [END]",
    "qwen3": "$A [END]",
}


def save_tiny(kind: str, folder: Path, *, padding_side: str = "right", hidden: int = 16, seed: int = 0) -> str:
    """Saves a model and its tokenizer and returns the folder.

    Args:
        kind: `bert`, `clip` (text half with its projection to width 8) or `qwen3`.
        folder: Where to.
        padding_side: Side on which the tokenizer pads.
        hidden: Width of the hidden states.
        seed: Of the random weights.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import (
        BertConfig,
        BertModel,
        CLIPTextConfig,
        CLIPTextModelWithProjection,
        PreTrainedTokenizerFast,
        Qwen3Config,
        Qwen3Model,
    )

    vocabulary = {word: i for i, word in enumerate(SPECIAL + WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=_TEMPLATES[kind], special_tokens=[(token, vocabulary[token]) for token in ("[CLS]", "[SEP]", "[END]")]
    )
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    if kind != "bert":
        special["eos_token"] = "[END]"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side=padding_side, **special).save_pretrained(folder)
    shape = {
        "vocab_size": len(vocabulary), "hidden_size": hidden, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 2, "max_position_embeddings": 40,
    }  # fmt: skip
    torch.manual_seed(seed)
    if kind == "bert":
        model = BertModel(BertConfig(**shape, pad_token_id=0, initializer_range=0.5))
    elif kind == "clip":
        model = CLIPTextModelWithProjection(
            CLIPTextConfig(**shape, projection_dim=8, pad_token_id=0, eos_token_id=vocabulary["[END]"])
        )
    else:
        model = Qwen3Model(
            Qwen3Config(**shape, num_key_value_heads=1, head_dim=8, pad_token_id=0, initializer_range=0.5)
        )
    model.save_pretrained(folder)
    return str(folder)


def spec(name: str, folder: str, **arguments: object) -> dict[str, object]:
    """The dict of a text encoder of `folder`."""
    return {"name": name, "model": folder, **arguments}


def save_open_clip(folder: Path, text: dict[str, object], seed: int = 0) -> str:
    """Saves a random model as its Hub repository holds it, and returns the folder. It takes texts of 12 tokens."""
    open_clip = pytest.importorskip("open_clip", reason="the extra open_clip is not installed")
    torch.manual_seed(seed)
    vision = {"image_size": 16, "layers": 1, "width": 64, "patch_size": 8}
    shape = {"embed_dim": 8, "vision_cfg": vision, "text_cfg": {"context_length": 12, **text}}
    model_class = open_clip.CustomTextCLIP if "hf_model_name" in text else open_clip.CLIP
    model = model_class(**json.loads(json.dumps(shape)))
    folder.mkdir(exist_ok=True)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": shape, "preprocess_cfg": {}}))
    return str(folder)
