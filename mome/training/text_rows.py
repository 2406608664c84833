"""The text rows that a run trains on: one row per label, sometimes of a synonym or in a sentence."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from mome.embedding import check_same_rows
from mome.encoders.text.base import check_width
from mome.errors import InputError
from mome.labels import load_table
from mome.labels.vocabulary import prompt_templates
from mome.registry import TEXT_ENCODERS
from mome.spec import brief
from mome.training.config import RunConfig

if TYPE_CHECKING:
    from mome.modeling import MoME

_STREAM = 7919  # keeps these draws apart from the sampler's, which also start from the run's seed


class TextRows:
    """Rows of the trained labels at any step, as `MoME.prompt_rows` makes them.

    With a text tower, the rows are embeddings of the labels' names and synonyms, and the model's bank is filled with
    the embeddings of the names. Without a tower, the rows are those of the model's bank; an empty bank is first filled
    from the text encoder's file, or with one-hot rows where it has none. A tower is opened only where something must be
    embedded: kept rows of names alone are read from the bank.

    A model trained on one wording of a label gives other masks for other wordings. Training on synonyms makes the masks
    agree. Our choice.

    Args:
        model: The model to train; its bank may be filled.
        names: The trained labels, which come first in the model's bank.
        synonyms: Probability that a row is drawn from those of all words for the label, its name among them; without a
            tower it has no effect.
        seed: Seed of the run. The rows of a step depend on the seed and the step alone.
        templates: Probability that a wording stands in a sentence of `prompt_templates`, likewise.
        keep: Leaves the rows that the bank holds, their mean and their scale as they are, so that the model's logits
            do not change. Only labels without a row are embedded.
        own: Other words for trained labels that the class table does not have.

    Attributes:
        notes: Sentences for the user, about settings without an effect.

    Raises:
        InputError: The bank or the file has no row for one of the labels, the bank is too narrow for one-hot rows, or
            the text encoder gives rows of another width than the model reads, or other rows than the kept ones, or its
            tower is needed and cannot be loaded.
    """

    def __init__(
        self,
        model: MoME,
        names: list[str],
        synonyms: float,
        seed: int,
        templates: float = 0.0,
        *,
        keep: bool = False,
        own: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        self.seed, self.templates = seed, templates
        self.notes: list[str] = []
        encoder = TEXT_ENCODERS.build(model.config.text_encoder)
        without_tower = _settings_without_tower(model, names, synonyms, templates, keep)
        if encoder.needs_tower and without_tower != []:
            self.probability = synonyms
            with _says_what_needs_no_tower(without_tower):
                self.wordings = _embed_wordings(model, encoder, names, ["{}"], own or {})
            # For each wording of a label, the rows of all sentences one after the other.
            self.sentences = (
                _embed_wordings(model, encoder, names, list(prompt_templates()), own or {}) if templates else []
            )
            if keep and not model.text_bank.is_empty:
                _check_kept(model, encoder)
                _fill_missing(model, encoder)
                # The name of a label is its stored row, which the tower gives up to rounding.
                kept_PT = _stored_rows(model, names)
                self.wordings = [torch.cat([kept_PT[i : i + 1], r[1:]]) for i, r in enumerate(self.wordings)]
            self.names_PT = torch.stack([rows_WT[0] for rows_WT in self.wordings])
            if not keep or model.text_bank.is_empty:
                _fill_bank(model, encoder, names, self.names_PT)
        else:
            without = {"train.synonyms": synonyms, "sampling.templates": templates}  # both 0 for a tower left closed
            if unused := [key for key, probability in without.items() if probability]:
                self.notes.append(
                    f"{' and '.join(unused)}: without effect, as text_encoder {brief(model.config.text_encoder)} has "
                    "no tower that embeds other wordings"
                )
            self.probability, self.templates = 0.0, 0.0
            _fill_from_file(model, encoder, names)
            self.names_PT = _stored_rows(model, names)
            self.wordings = list(self.names_PT.split(1))
        width = self.names_PT.shape[1]
        # The numbers of the classes of whole-model experts belong to a label, not to its wording.
        self.numbers_PE = model.prompt_rows(self.names_PT, names)[:, width:]

    def at(self, step: int, prompts: Sequence[int] | None = None) -> Tensor:
        """Returns the rows for one step.

        Args:
            step: Number of the step.
            prompts: Indices of the labels that are asked; None asks all.
        """
        rows = torch.cat([self._text_at(step), self.numbers_PE], dim=1)
        return rows if prompts is None else rows[list(prompts)]

    def _text_at(self, step: int) -> Tensor:
        if self.probability == 0 and self.templates == 0:
            return self.names_PT
        rng = np.random.default_rng([self.seed, _STREAM, step])
        rows = []
        for label, rows_WT in enumerate(self.wordings):
            pick = int(rng.integers(len(rows_WT))) if rng.random() < self.probability else 0
            row = rows_WT[pick]
            if self.templates and rng.random() < self.templates:
                count = len(self.sentences[label]) // len(rows_WT)
                row = self.sentences[label][pick * count + int(rng.integers(count))]
            rows.append(row)
        return torch.stack(rows)


def text_rows(model: MoME, run: RunConfig) -> TextRows:
    """Returns the text rows of a run; see `RunConfig.text_rows`.

    Raises:
        InputError: `text_rows: new` is asked for, and no text tower could embed the labels again; see `TextRows`, too.
    """
    embeds_again = run.init is not None and run.text_rows == "new"
    if embeds_again and not TEXT_ENCODERS.build(model.config.text_encoder).needs_tower:
        raise InputError(
            f"text_rows: new embeds all labels again, and text_encoder {brief(model.config.text_encoder)} has no text "
            "tower to embed them",
            hint="text_rows: kept, or another text_encoder",
        )
    keep = run.init is not None and run.text_rows == "kept"
    settings = run.train.synonyms, run.train.seed, run.sampling.templates
    return TextRows(model, list(run.labels), *settings, keep=keep, own=run.own_structures)


def _settings_without_tower(
    model: MoME, names: list[str], synonyms: float, templates: float, keep: bool
) -> list[str] | None:
    """Returns the changes of settings with which a run needs no text tower.

    Returns:
        None if only a tower can give the rows; an empty list if the run needs none as it is.
    """
    known = model.text_bank.known()
    if not all(name in known for name in names):
        return None
    changes = {
        "text_rows=kept": not keep,
        "train.synonyms=0": synonyms > 0,
        "sampling.templates=0": templates > 0,
        "bank=trained": not all(label in known for label in model.config.labels),
    }
    return [setting for setting, is_needed in changes.items() if is_needed]


@contextlib.contextmanager
def _says_what_needs_no_tower(settings: list[str] | None) -> Iterator[None]:
    """Adds to an error of the text tower the settings that train without one, if there are any."""
    try:
        yield
    except InputError as error:
        if settings is None:
            raise
        hint = f"{' '.join(settings)}, which trains without a text tower"
        raise InputError(
            error.what, where=error.where, hint=f"{error.hint}; or {hint}" if error.hint else hint
        ) from error


def _check_kept(model: MoME, encoder: Any) -> None:
    """Checks that the text encoder gives the rows that the bank holds.

    Raises:
        InputError: It does not.
    """
    try:
        check_same_rows(model, model.config.text_encoder, encoder)
    except InputError as error:
        raise InputError(error.what, where=error.where, hint="text_rows: new embeds all labels again") from error


def _fill_missing(model: MoME, encoder: Any) -> None:
    """Embeds the labels of the bank that have no row; all else of the bank stays as it is."""
    known = model.text_bank.known()
    missing = [label for label in model.config.labels if label not in known]
    if missing:
        model.text_bank.set_rows(missing, _checked(model, encoder.encode([_words(label) for label in missing])))


def _embed_wordings(
    model: MoME, encoder: Any, names: list[str], templates: list[str], own: Mapping[str, Sequence[str]]
) -> list[Tensor]:
    """Returns for every label the embeddings (W · K, T) of its W wordings (name, then synonyms) in K templates."""
    table = load_table()
    others = [table[name].synonyms if name in table else own.get(name, ()) for name in names]
    wordings = [[_words(name), *words] for name, words in zip(names, others, strict=True)]
    texts = [[template.format(text) for text in words for template in templates] for words in wordings]
    rows = _checked(model, encoder.encode([text for some in texts for text in some]))
    return list(rows.split([len(some) for some in texts]))


def _fill_bank(model: MoME, encoder: Any, names: list[str], names_PT: Tensor) -> None:
    """Fills the model's bank with the embeddings of all its labels; text rows are centred on the trained ones."""
    others = [_words(label) for label in model.config.labels[len(names) :]]
    bank_LT = torch.cat([names_PT, encoder.encode(others)]) if others else names_PT
    model.text_bank.set(bank_LT, centre_on=names_PT)


def _fill_from_file(model: MoME, encoder: Any, names: list[str]) -> None:
    """Fills an empty bank from the file of the text encoder; rows of labels that the file lacks stay unset."""
    held = encoder.stored_labels() if model.text_bank.is_empty else []
    if not held:
        return
    names_PT = _checked(model, encoder.encode([_words(name) for name in names]))
    bank_LT = torch.zeros(len(model.config.labels), names_PT.shape[1])
    known = [i for i, label in enumerate(model.config.labels) if label in held]
    bank_LT[known] = encoder.encode([_words(model.config.labels[i]) for i in known])
    model.text_bank.set(bank_LT, centre_on=names_PT)


def _checked(model: MoME, rows_PT: Tensor) -> Tensor:
    """Returns rows of the width that the model reads; a tower may have changed since the model was built."""
    return check_width(rows_PT, model.text_bank.rows_LT.shape[1], f"text_encoder {brief(model.config.text_encoder)}")


def _stored_rows(model: MoME, names: list[str]) -> Tensor:
    """Returns rows (P, T) of the model's bank, which is filled with one-hot rows if it is empty."""
    if model.text_bank.is_empty:
        labels, width = model.text_bank.rows_LT.shape
        if labels > width:
            raise InputError(
                f"{labels} labels do not fit one-hot rows of width {width}", hint=f"text_encoder='bank(width={labels})'"
            )
        model.text_bank.set(torch.eye(labels, width))
    return model.text_bank.rows(names).detach().float().cpu()


def _words(name: str) -> str:
    """Returns a label's name as a text, as in "left kidney"."""
    return name.replace("_", " ")
