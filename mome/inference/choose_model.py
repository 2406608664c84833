"""Chooses the bundled checkpoint for prompts where no model was named; no model is loaded for that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mome.errors import InputError
from mome.labels import load_table
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


def choose_model(prompts: str | Sequence[str]) -> Choice:
    """Returns the bundled checkpoint that knows most of the structures that the prompts name.

    Of equally good ones, the first of `known_labels` is taken. So a prompt that no checkpoint knows goes to the
    default one, which warns about it.

    Raises:
        InputError: Two checkpoints each know a structure that the other does not know.
    """
    table = load_table()
    wanted: list[str] = []
    for prompt in [prompts] if isinstance(prompts, str) else list(prompts or ()):
        if isinstance(prompt, str):  # anything else is refused where prompts are understood
            wanted += table.resolve(prompt).names or (prompt.strip(),)
    known = known_labels()
    found = {model: [name for name in dict.fromkeys(wanted) if name in labels] for model, labels in known.items()}
    model = max(found, key=lambda name: len(found[name]))  # max keeps the first of equals
    for other, names in found.items():
        missing = [name for name in names if name not in found[model]]
        if missing:
            own = next(name for name in found[model] if name not in known[other])
            raise InputError(
                f"no bundled model knows both {own!r} and {missing[0]!r}",
                where=f"{model} knows {own}, {other} knows {missing[0]}",
                hint=f"segment twice, with -m {model} and with -m {other}",
            )
    if model == DEFAULT_MODEL:
        return Choice(model, None)
    return Choice(model, f"the model is {model}, which was trained on {', '.join(found[model])}")
