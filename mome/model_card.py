"""The README.md of a saved model: what it segments, how it is used, and what is known of its training.

The Hub shows this file as the model's page. A card that somebody has written or changed is never replaced: a line in
each of ours holds a checksum of the rest.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mome.configuration import MoMEConfig
from mome.printable import printable
from mome.processing import MoMEProcessor
from mome.registry import PARTS

CARD_FILE = "README.md"
MARK = re.compile(r"<!-- Written by mome, and again .* Checksum: (?P<checksum>[0-9a-f]{16}) -->\n")
_MARK_TEXT = "<!-- Written by mome, and again whenever the model is saved here, until you change it. Checksum: {} -->\n"
# Written as huggingface_hub writes it, so that a card that comes back from the Hub has the same checksum.
_HEAD = """---
library_name: mome
pipeline_tag: image-segmentation
tags:
- medical-imaging
- ct
- segmentation
- mixture-of-experts
---
"""
# The sentences in the empty card that transformers writes into a folder before it uploads it.
_EMPTY = (
    "This is the model card of a 🤗 transformers model that has been pushed on the Hub. "
    "This model card has been automatically generated."
)
_ORIGIN, _TRAINING = "## Origin", "## Training"
_LONGEST = 200_000  # characters of a card that is read


def model_card(
    config: MoMEConfig, processor: MoMEProcessor | None, parameters: int, sections: Iterable[str] = ()
) -> str:
    """Returns a card in Markdown.

    Args:
        config: The model's config.
        processor: The model's processor; None where it has none.
        parameters: The number of its parameters.
        sections: What is known of where the weights come from; each starts with a heading.
    """
    trained = list(config.trained_labels)
    first = (trained or list(config.labels) or ["liver"])[0].replace("_", " ")
    body = "\n".join(
        [
            "",
            f"# MoME for CT, {_count(len(trained), 'structure')}",
            "",
            f"A text-prompted segmenter for CT with {_millions(parameters)} parameters, made with `mome`. Research",
            "software, not a medical device: do not use it for diagnosis or treatment.",
            "",
            "## What it segments",
            *_what_it_segments(config, trained),
            "",
            "## Use",
            "`MODEL` is this folder, or the model's name on the Hub, as in `org/name`.",
            "```",
            f"mome segment ct.nii.gz -m MODEL -p {plain(first)!r} -o out/",
            "```",
            "```python",
            "from mome import segment",
            "",
            f'result = segment("ct.nii.gz", [{plain(first)!r}], model="MODEL")',
            "```",
            "",
            "## Design",
            "| | |",
            "|---|---|",
            *(f"| {what} | {cell(value)} |" for what, value in _design(config, processor)),
            "",
            *(line for section in sections for line in (section.strip(), "")),
            "## What is not said here",
            "The licence of these weights, which the terms of the training data may limit; who the patients were; and",
            "what the model cannot do. Whoever publishes it adds that.",
            "",
        ]
    )
    return _HEAD + _MARK_TEXT.format(_checksum(_HEAD + body)) + body


def write_card(folder: Path, before: Path, text: str) -> None:
    """Writes a card into a folder with a saved model, unless somebody's own card stands there.

    Args:
        folder: The folder that the model was written to.
        before: The folder that it will replace; it may be the same.
        text: What `model_card` returns.
    """
    if own_card(folder) is None and own_card(before) is None:
        (folder / CARD_FILE).write_text(text, encoding="utf-8")


def own_card(folder: Path) -> bytes | None:
    """Returns the card of a folder if somebody has written or changed it; else None."""
    path = folder / CARD_FILE
    if not path.is_file():
        return None
    card = path.read_bytes()
    start = card[: 4 * _LONGEST].decode("utf-8", "replace")
    return None if _is_unchanged(start) or _is_empty(start) else card


def _is_empty(card: str) -> bool:
    """Says whether a card is the form of transformers, in which nobody has filled in anything."""
    if _EMPTY not in card:
        return False
    from huggingface_hub import ModelCard, ModelCardData

    form = ModelCard.from_template(ModelCardData(tags=[], library_name="transformers"), model_description=_EMPTY)
    return card.split() == str(form).split()


def _is_unchanged(card: str) -> bool:
    """Says whether a card is as `model_card` returned it."""
    found = MARK.search(card)
    return found is not None and found["checksum"] == _checksum(MARK.sub("", card, count=1))


def _checksum(card: str) -> str:
    """Returns a checksum of the words of a card; systems and editors end lines in other ways."""
    return hashlib.sha256(" ".join(card.split()).encode()).hexdigest()[:16]


def sections_of_loaded(name: str | None, folder: Path | None) -> tuple[str, ...]:
    """Returns what a card says of weights that were loaded and may have changed since.

    Args:
        name: What the model is called for everyone, such as "mome-ct-tiny" or a Hub id; None for a folder of one's own.
        folder: The folder that it was loaded from, whose card tells of its training and origin; None for a model of the
            Hub.
    """
    origin = f"`{plain(name)}`" if name else "another model"
    text = f"{_ORIGIN}\nThe weights were loaded from {origin}. What was changed since is not recorded here."
    card = "" if folder is None else _read(folder / CARD_FILE)
    told = [part for part in re.split(r"^(?=## )", card, flags=re.MULTILINE) if part.startswith((_TRAINING, _ORIGIN))]
    if MARK.search(card) is None or not told:
        return (text,)
    below = re.sub(r"^(#{2,5}) ", r"#\1 ", "".join(told), flags=re.MULTILINE)
    return (f"{text}\nThe card of the loaded model says:\n\n{below.strip()}",)


def _read(path: Path) -> str:
    """Returns the text of a card, and an empty one where none can be read: a model loads whatever its card is."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            return file.read(_LONGEST)
    except OSError:
        return ""


def training_section(lines: Sequence[str]) -> str:
    """Returns the section on a training."""
    return "\n".join([_TRAINING, *lines])


def plain(text: Any) -> str:
    """Returns a text without what Markdown, HTML or a shell would read as theirs."""
    return printable(re.sub(r"[`<>|\\\"'$\n\r]", " ", str(text))).strip()


def cell(text: Any) -> str:
    """Returns a text for a cell of a table, where it is no HTML, link or image."""
    return re.sub(r"([\\|[])", r"\\\1", printable(re.sub(r"\s+", " ", str(text)))).replace("<", "&lt;")


def _what_it_segments(config: MoMEConfig, trained: list[str]) -> list[str]:
    if not trained:
        return ["Nothing yet: its weights were trained on no structure, and its masks mean nothing."]
    lines = [", ".join(cell(plain(name.replace("_", " "))) for name in trained) + "."]
    others = len(set(config.labels) - set(trained))
    if others:
        lines += ["", f"It has text rows of {_count(others, 'other structure')}, which it was not trained on: their",
                  "masks mean nothing, and a note says so."]  # fmt: skip
    return lines


def _design(config: MoMEConfig, processor: MoMEProcessor | None) -> list[tuple[str, str]]:
    """The rows of the table: what, and its value."""
    rows = []
    if processor is not None:
        spacing = " × ".join(f"{value:.4g}" for value in processor.spacing)
        low, high = processor.hu_window
        rows += [
            ("voxel spacing of the network", f"{spacing} mm, {processor.orientation}"),
            ("HU window", f"{low:g} to {high:g}"),
        ]
    rows.append(("patch", " × ".join(map(str, config.patch_size)) + " voxels"))
    rows += [(part.replace("_", " "), f"`{plain(_name(getattr(config, part)))}`") for part in PARTS]
    return [*rows, ("arguments of the parts", "in `config.json`")]


def _name(spec: Any) -> str:
    return str(spec["name"] if isinstance(spec, dict) else spec).partition("(")[0]


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _millions(number: int) -> str:
    return f"{number / 1e6:.1f} M" if number >= 1e5 else f"{number:,}"
