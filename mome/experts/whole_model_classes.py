"""The classes of a whole-model expert, and the prompts that their names are joined to."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from mome.errors import InputError
from mome.experts.whole_model_reference import MAX_CLASSES
from mome.labels import load_table


def channels_by_name(classes: Sequence[str]) -> dict[str, list[int]]:
    """The channels of every name that a prompt can have; the background has none.

    A class that names several labels, such as a pair of organs, is joined to none of them, with a warning.

    Args:
        classes: The names of a model's maps, in order.
    """
    table, found = load_table(), dict[str, list[int]]()
    for channel, name in enumerate(classes):
        if name.strip().lower() == "background":
            continue
        labels = table.names_of(name)
        if len(labels) > 1:  # a pair or a group, whose map is that of a union
            warnings.warn(
                f"class {name!r:.80} of a whole-model expert names {len(labels)} labels and is joined to none of them",
                stacklevel=3,
            )
        found.setdefault(labels[0] if len(labels) == 1 else name.strip(), []).append(channel)
    return found


def checked_classes(classes: Any) -> tuple[str, ...]:
    """The names of a model's maps as a tuple.

    Raises:
        InputError: They are no list of names, or too many.
    """
    names = () if isinstance(classes, str) else tuple(classes)
    if not names or not all(isinstance(name, str) and name.strip() for name in names):
        raise InputError(
            f"classes is a list of names, one for each map, got {classes!r:.60}",
            hint="classes=['background', 'liver', 'spleen']",
        )
    if len(names) > MAX_CLASSES:
        raise InputError(
            f"a whole-model expert has at most {MAX_CLASSES} classes, got {len(names)}",
            hint="several experts, each with a part of the maps",
        )
    return names
