"""Text rows in a file, for a training on a machine without the text tower.

    python benchmarks/stored_texts.py texts.safetensors benchmarks/neck_study.yaml examples/configs/mome_ct_tiny.yaml

writes the rows of every text that a training of these recipes embeds. `use_stored_texts` makes the text encoder of
this process read them.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mome.encoders.text.hf import HuggingFaceText
from mome.labels import load_table
from mome.training.config_file import load_run_config
from mome.training.setup import build_model
from mome.training.text_rows import TextRows


def use_stored_texts(file: Path) -> None:
    """Replaces the text tower by the rows of a file; a text that it lacks raises KeyError."""
    rows = load_file(file)

    def encode(encoder: HuggingFaceText, texts: list[str]) -> Tensor:
        return torch.stack([rows[text].float() for text in texts])

    HuggingFaceText.encode = encode  # type: ignore[method-assign]


def write_texts(file: Path, recipes: list[str]) -> None:
    """Writes the rows of all texts that trainings of the recipes embed, and of the whole class table."""
    rows: dict[str, Tensor] = {}
    embed = HuggingFaceText.encode

    def recording(encoder: HuggingFaceText, texts: list[str]) -> Tensor:
        made = embed(encoder, texts)
        rows.update(zip(texts, made.clone(), strict=True))
        return made

    HuggingFaceText.encode = recording  # type: ignore[method-assign]
    for path in recipes:
        run = load_run_config(Path(path), [])
        TextRows(build_model(run)[0], list(run.labels), 0.5, 0)
    missing = [text for name in load_table().names() if (text := name.replace("_", " ")) not in rows]
    if missing:
        raise SystemExit(f"no row of {missing[0]}")
    save_file({text: row.contiguous() for text, row in rows.items()}, file)


if __name__ == "__main__":
    write_texts(Path(sys.argv[1]), sys.argv[2:])
