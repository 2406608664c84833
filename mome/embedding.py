"""Embeds labels without training: adds them to a model, or makes a file of text rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from mome.encoders.text.bank_file import BankFile
from mome.encoders.text.base import check_width
from mome.errors import InputError
from mome.labels import dataset_names, load_dataset, load_table
from mome.labels.all_labels import asks_all
from mome.labels.dataset_file import is_dataset_file, open_dataset
from mome.registry import TEXT_ENCODERS
from mome.spec import brief, dump

if TYPE_CHECKING:
    from mome.modeling import MoME

# Rows of the same tower differ by the rounding of the stored rows only (float16: about 0.0005). Our choice.
_LARGEST_DIFFERENCE = 0.01
_COMPARED = 4


class NewLabel(NamedTuple):
    """A label that is to be embedded.

    Attributes:
        name: Its name in the class table, or the free text.
        wording: The text that the text encoder embeds.
        note: What the user should know of how the text was read, or None.
    """

    name: str
    wording: str
    note: str | None = None


def read_labels(texts: Iterable[str]) -> list[NewLabel]:
    """Reads names, synonyms, pairs, groups and free text as labels, each of them once.

    Raises:
        InputError: A text is empty, names a side that cannot be read, or is a name with a typo; a typo would be stored
            for good, so it is not corrected.
    """
    table = load_table()
    found: dict[str, NewLabel] = {}
    for text in texts:
        resolved = table.resolve(text)
        if asks_all(text):
            raise InputError(f"{text!r:.80} asks for what a model was trained on, and names no label", hint="name one")
        if resolved.how == "refused":
            raise InputError(str(resolved.warning), hint=resolved.hint)
        if resolved.how == "close":
            raise InputError(f"{text!r:.80} is not a label, but close to {resolved.names[0]!r}", hint="write its name")
        if resolved.names:
            found |= {name: NewLabel(name, _words(name), resolved.warning) for name in resolved.names}
        else:
            name = text.strip()
            found.setdefault(name, NewLabel(name, resolved.free_text or _words(name), resolved.warning))
    return list(found.values())


def labels_of(name: str) -> list[str]:
    """Returns the labels of a data set, or all of the class table for `table`.

    Args:
        name: `table`, a data set of the package, or a YAML file of one's own; see `mome.labels.dataset_file`.

    Raises:
        InputError: There is no such data set.
    """
    if name == "table":
        return load_table().names()
    if is_dataset_file(name):
        return list(open_dataset(name).annotated)
    try:
        return list(load_dataset(name).annotated)
    except InputError as error:
        raise InputError(error.what, hint="known: table, " + ", ".join(dataset_names())) from error


def embed_labels(texts: Sequence[str], text_encoder: Any) -> BankFile:
    """Embeds labels as rows that need no tower afterwards; `write_bank_file` stores them.

    Args:
        texts: See `read_labels`.
        text_encoder: A spec, as in "hf(model='…')".

    Raises:
        InputError: There is no label, a text cannot be read, or the text encoder has no rows for it.
    """
    labels = read_labels(texts)
    if not labels:
        raise InputError("there is no label to embed", hint="--labels totalsegmentator_v2, or --add 'liver'")
    spec = TEXT_ENCODERS.canonical(text_encoder)
    encoder = TEXT_ENCODERS.build(spec)
    _check_embeds(spec, encoder)
    rows_LT = check_width(encoder.encode([label.wording for label in labels]), encoder.width(0), dump(spec))
    identity = encoder.fingerprint() if hasattr(encoder, "fingerprint") else ""
    return BankFile(tuple(label.name for label in labels), rows_LT, dump(spec, TEXT_ENCODERS), identity)


def add_labels(model: MoME, texts: Sequence[str], text_encoder: Any = None) -> list[str]:
    """Adds labels to a model, which segments them as structures that it was not trained on.

    The rows of its other labels, and the mean and scale of its bank, stay as they are, so that their logits are equal
    bit for bit.

    Args:
        model: A model whose bank holds embeddings.
        texts: See `read_labels`.
        text_encoder: Where the new rows come from; None stands for the model's own text encoder.

    Returns:
        The names of the new labels.

    Raises:
        InputError: A label is there already, a text cannot be read, the text encoder has no rows for it, or its rows
            are not those of the encoder that the bank was made with. The model is then as it was.
    """
    if model.config.has_one_hot_text:
        raise InputError(
            f"text encoder '{model.config.text_encoder['name']}' has a row for every label that was trained, "
            "a new label has none",
            hint="train a model with a text tower, or train this one on the label",
        )
    labels = read_labels(texts)
    if not labels:
        raise InputError("there is no label to add", hint="--add 'thymus'")
    held = [label.name for label in labels if label.name in model.config.labels]
    if held:
        raise InputError(f"the model has the label {held[0]!r} already", hint="mome info MODEL lists its labels")
    spec = model.config.text_encoder if text_encoder is None else TEXT_ENCODERS.canonical(text_encoder)
    encoder = TEXT_ENCODERS.build(spec)
    if text_encoder is None and not encoder.needs_tower:  # files that a checkpoint names are not read
        raise InputError(
            f"text encoder '{spec['name']}' of the model has neither a tower nor a file that you named",
            hint="--text-encoder \"hf(model='…')\" or \"bank(file='labels.safetensors', width=…)\"",
        )
    _check_embeds(spec, encoder)
    check_same_rows(model, spec, encoder)
    width = model.text_bank.rows_LT.shape[1]
    rows_PT = check_width(encoder.encode([label.wording for label in labels]), width, dump(spec))
    names = [label.name for label in labels]
    model.relabel([*model.config.labels, *names])
    model.text_bank.set_rows(names, rows_PT)
    return names


def _check_embeds(spec: dict[str, Any], encoder: Any) -> None:
    """Checks that a text encoder has a tower or a file."""
    if not encoder.needs_tower and not encoder.stored_labels():
        raise InputError(
            f"text encoder '{spec['name']}' has neither a tower nor a file, so it cannot embed a label",
            hint="--text-encoder \"hf(model='…')\" or \"bank(file='labels.safetensors', width=…)\"",
        )


def check_same_rows(model: MoME, spec: dict[str, Any], encoder: Any) -> None:
    """Embeds labels that the bank holds and compares the rows, because another tower would make other masks.

    Raises:
        InputError: The rows differ, or no label can be compared.
    """
    table, stored, known = load_table(), set(encoder.stored_labels()), model.text_bank.known()
    usable = [name for name in known if name in stored or encoder.needs_tower]
    names = sorted(usable, key=lambda name: name not in table)[:_COMPARED]
    if not names:
        raise InputError(
            "no label of the model's bank can be embedded again, so nothing shows that the rows belong together",
            where=brief(spec),
            hint="train the model first, or use a bank that holds some of its labels",
        )
    width = model.text_bank.rows_LT.shape[1]
    rows = check_width(encoder.encode([_words(name) for name in names]), width, f"text_encoder {brief(spec)}")
    for name, row in zip(names, rows, strict=True):
        difference = float((row - known[name]).norm() / known[name].norm())
        if not difference <= _LARGEST_DIFFERENCE:
            raise InputError(
                f"the text encoder gives {name!r} another row than the model's bank has (they differ by "
                f"{difference:.0%}): it is another tower, revision or template",
                where=brief(spec),
                hint="--text-encoder with the model, revision and templates that the bank was made with",
            )


def _words(name: str) -> str:
    return name.replace("_", " ")
