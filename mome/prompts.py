"""Turns what a user types into text rows: known labels come from the model's bank, free text from its tower."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mome.encoders.text.base import check_width
from mome.encoders.text.stored import StoredText
from mome.errors import InputError, did_you_mean
from mome.labels import Resolved, load_table
from mome.labels.all_labels import asks_all
from mome.labels.own import own_label
from mome.pretrained import bundled_model_of
from mome.registry import TEXT_ENCODERS
from mome.spec import brief

if TYPE_CHECKING:
    from mome.modeling import MoME


@dataclass(frozen=True)
class Prompt:
    """A prompt that was resolved against the label table.

    Attributes:
        text: What the user typed.
        name: The label's name, or the text itself where it is free text.
        resolved: How the label table understood the text.
        trained: Whether the weights were trained on this label.
        warning: What the user should know, or None.
        number: A number, from 1, where the class table has no such structure, else None. That of a label of the model
            is its place among such labels; free text has the numbers above all of them.
    """

    text: str
    name: str
    resolved: Resolved
    trained: bool
    warning: str | None
    number: int | None = None


def understand(texts: list[str], model: MoME) -> list[Prompt]:
    """Resolves prompts against the label table and says what the model was not trained on.

    `all` stands for every label that the model was trained on; see `mome.labels.all_labels`. A text that names a pair
    or a group ("kidneys", "ribs") becomes one prompt per label, so that every mask has one label of the class table.
    Each label is prompted once, also where several texts name it. The warning about a text stands on the first of its
    labels that no earlier text named. The labels of a text that the model was not trained on have one warning in
    common, so that whoever leaves out repeated lines shows it once.

    Raises:
        InputError: There is no prompt, or one is empty, is no text, or is refused: it names a side or uses an
            abbreviation that the class table cannot read, or asks an untrained model for all.
    """
    if isinstance(texts, str):
        texts = [texts]
    if not texts:
        raise InputError("no prompt was given", hint="name at least one structure, as in -p liver")
    table = load_table()
    words = model.config.synonyms or {}
    own_labels = {label: words.get(label, []) for label in model.config.labels if label not in table}
    outside = [*own_labels]  # of the class table
    prompts: list[Prompt] = []
    has_shown_labels = False
    for text in _without_all(texts, model):
        own = own_label(text, own_labels) if text.strip() else None
        resolved = Resolved(text, own, None, "exact", None) if own else table.resolve(text)
        close = did_you_mean(text.strip().replace(" ", "_").lower(), own_labels)
        if resolved.how == "refused":
            raise InputError(str(resolved.warning) + close, hint=resolved.hint)
        names = resolved.names or (resolved.name or text.strip(),)
        earlier = {prompt.name for prompt in prompts}
        first_new = next((name for name in names if name not in earlier), None)
        about_text = [resolved.warning + (close if resolved.how == "free" else "")] if resolved.warning else []
        untrained = [name for name in names if name not in model.config.trained_labels]
        shows_labels = not has_shown_labels
        not_trained = [_not_trained(untrained, len(names), model, shows_labels=shows_labels)] if untrained else []
        has_shown_labels = has_shown_labels or bool(untrained)
        for name in names:
            trained = name not in untrained
            is_told = name == first_new or (not trained and first_new in untrained)
            notes = (about_text if is_told else []) + ([] if trained else not_trained)
            if name not in table and name not in outside:
                outside.append(name)
            number = outside.index(name) + 1 if name in outside else None
            prompts.append(Prompt(text, name, resolved, trained, "; ".join(notes) or None, number))
    # The first prompt of each label is kept, at the place of the last one.
    return list({prompt.name: prompt for prompt in reversed(prompts)}.values())[::-1]


def _without_all(texts: list[str], model: MoME) -> list[str]:
    """Returns the texts, with the labels that the model was trained on in the place of `all`."""
    found: list[str] = []
    for text in texts:
        if not isinstance(text, str):
            raise InputError(f"a prompt is a text, got {text!r:.60}", hint="segment(scan, ['liver'])")
        if asks_all(text) and not model.config.trained_labels:
            raise InputError(
                f"{text!r:.60} asks for what the model was trained on, and its weights are random",
                hint="name at least one structure, as in -p liver",
            )
        found += model.config.trained_labels if asks_all(text) else [text]
    return found


def _not_trained(names: list[str], of: int, model: MoME, *, shows_labels: bool) -> str:
    """The warning about labels of one text, which names `of` labels, that the model was not trained on."""
    shown = [repr(name) for name in names]
    count = f"{of} labels" if len(names) == of else f"{len(names)} of {of} labels"
    listed = ", ".join(shown) if len(names) <= 3 else f"{shown[0]}, …, {shown[-1]} ({count})"
    others = {bundled_model_of(name) for name in names}
    better = f" (the bundled {others.pop()} was)" if len(others) == 1 and None not in others else ""
    known = ", ".join(model.config.trained_labels) or "nothing: its weights are random"
    return f"this model was not trained on {listed}{better}" + (f"; it was trained on {known}" if shows_labels else "")


def embed_prompts(prompts: list[Prompt], model: MoME) -> Tensor:
    """Rows of prompts, float32, as `MoME.prompt_rows` makes them.

    Labels that the bank stores come from it; all other prompts go through the text tower. A file that the config of a
    checkpoint names (`bank(file=…)`) is not read: its rows fill the bank in training, and a file of that name on
    another machine is another one.

    Raises:
        InputError: Free text, and the model's text encoder has no tower, it cannot be loaded, or its rows have another
            width than the model reads.
    """
    rows = model.text_bank.known()
    outside = [p for p in prompts if p.name not in rows]
    if outside:
        try:
            encoder = _tower(model.config.text_encoder)
            embed = encoder.encode if encoder.needs_tower else StoredText().encode
            encoded = embed([_wording(p) for p in outside])
            check_width(encoded, model.text_bank.rows_LT.shape[1], f"text_encoder {brief(model.config.text_encoder)}")
        except InputError as error:
            # The advice of the class table, such as "ask for kidney_left and kidney_right", often needs no tower.
            advice = dict.fromkeys(p.resolved.warning for p in outside if p.resolved.warning)
            others = [f"the bundled {other}" for p in outside if (other := bundled_model_of(p.name))]
            hint = "; or ".join([*advice, *dict.fromkeys(others), *([error.hint] if error.hint else [])]) or None
            raise InputError(error.what, where=error.where, hint=hint) from error
        rows |= {p.name: row for p, row in zip(outside, encoded, strict=True)}
    return model.prompt_rows(torch.stack([rows[p.name] for p in prompts]), [p.name for p in prompts])


def _wording(prompt: Prompt) -> str:
    """The text that stands for a prompt in the text tower."""
    return prompt.resolved.free_text or prompt.name.replace("_", " ")


def _tower(spec: Any) -> Any:
    from mome.spec import dump

    return _build_tower(dump(spec))


@lru_cache(maxsize=2)
def _build_tower(spec: str) -> Any:
    return TEXT_ENCODERS.build(spec)
