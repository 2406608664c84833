"""Chooses the bundled checkpoint for prompts where no model was named; no model is loaded for that."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from mome.errors import InputError
from mome.labels import load_table
from mome.labels.all_labels import asks_all
from mome.labels.own import own_label
from mome.pretrained import bundled_labels

DEFAULT_MODEL = "mome-ct-tiny"


@dataclass(frozen=True)
class Choice:
    """A chosen checkpoint.

    Attributes:
        model: Its bundled name.
        note: A sentence for the user where it is not `DEFAULT_MODEL`, else None.
    """

    model: str
    note: str | None


def known_labels() -> dict[str, frozenset[str]]:
    """Returns the labels that each bundled checkpoint was trained on; the default checkpoint comes first."""
    found = bundled_labels()
    return {model: found[model] for model in sorted(found, key=lambda name: name != DEFAULT_MODEL)}


def choose_model(prompts: str | Sequence[str], hint: str = "segment twice, with -m {} and with -m {}") -> Choice:
    """Returns the bundled checkpoint that knows most of the structures that the prompts name.

    Of equally good ones, the first of `known_labels` is taken. So a prompt that no checkpoint knows goes to the
    default one, which warns about it.

    Args:
        prompts: Texts.
        hint: As for `best_model`.

    Raises:
        InputError: Two checkpoints each know a structure that the other does not know, or all is asked for.
    """
    model, found = best_model(prompts, known_labels(), "bundled model", hint)
    if model == DEFAULT_MODEL:
        return Choice(model, None)
    return Choice(model, chosen_note(model, found))


def best_model(
    prompts: str | Sequence[str], known: Mapping[str, Collection[str]], kind: str, hint: str
) -> tuple[str, list[str]]:
    """Returns the model that knows most of the structures that the prompts name, the first of equals.

    Args:
        prompts: Texts.
        known: Model → labels that it was trained on, or a mapping of them to other words for them.
        kind: What the models are called in an error, as in "bundled model".
        hint: What to do where no model suffices, with two `{}` for the names of models.

    Returns:
        Its name, and the asked structures that it knows.

    Raises:
        InputError: Two models each know a structure that the other does not know, or all is asked for and there are
            several models.
    """
    table = load_table()
    words: dict[str, list[str]] = {}
    for labels in known.values():
        for label in labels:
            words.setdefault(label, []).extend(labels[label] if isinstance(labels, Mapping) else ())
    wanted: list[str] = []
    for prompt in [prompts] if isinstance(prompts, str) else list(prompts or ()):
        if isinstance(prompt, str):  # anything else is refused where prompts are understood
            if asks_all(prompt):
                wanted += _all_of(prompt, known, kind, hint)
                continue
            # Models read their own labels first, too; the class table may take one for a structure of its own.
            own = own_label(prompt, words) if prompt.strip() else None
            wanted += (own,) if own else table.resolve(prompt).names or (prompt.strip(),)
    found = {model: [name for name in dict.fromkeys(wanted) if name in labels] for model, labels in known.items()}
    model = max(found, key=lambda name: len(found[name]))  # max keeps the first of equals
    for other, names in found.items():
        missing = [name for name in names if name not in found[model]]
        if missing:
            own = next(name for name in found[model] if name not in known[other])
            raise InputError(
                f"no {kind} knows both {own!r} and {missing[0]!r}",
                where=f"{model} knows {own}, {other} knows {missing[0]}",
                hint=hint.format(model, other),
            )
    return model, found[model]


def _all_of(prompt: str, known: Mapping[str, Collection[str]], kind: str, hint: str) -> Collection[str]:
    """Returns what the only model was trained on.

    Raises:
        InputError: There are several.
    """
    if len(known) > 1:
        raise InputError(
            f"{prompt!r:.60} asks for every structure that a model was trained on, and no model is named",
            where=f"each {kind}: {', '.join(known)}",
            hint=hint.format(*list(known)[:2]),
        )
    return next(iter(known.values()))


def chosen_note(model: str, found: Sequence[str]) -> str:
    """Returns the sentence that says which model was chosen, and which of the asked structures it knows."""
    return f"the model is {model}, which was trained on {', '.join(found)}"
