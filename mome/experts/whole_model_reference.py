"""What a saved config says about a whole-model expert: its kind, classes, spacing and hash. Imports no torch."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from mome.errors import InputError

# Class numbers travel beside text rows and must stay exact in bfloat16, which has 8 bits: whole numbers up to 256.
MAX_CLASSES = 255
KINDS = ("module", "function", "export", "mome", "nnunet")
_KEYS = {"name", "class", "sha256", "kind", "classes", "spacing", "frozen"}


def references(given: Any) -> list[dict[str, Any]]:
    """The references of a config's `extra_experts`.

    Args:
        given: A list of `WholeModel` objects, or of what their `reference` returned, perhaps read from a file.

    Raises:
        InputError: It is no list, or an entry is neither.
    """
    if not isinstance(given, list | tuple):
        raise InputError(
            f"extra_experts is a list of whole-model experts, got {type(given).__name__}",
            hint="extra_experts=[WholeModel(network, classes, spacing=…)]",
        )
    return [_reference(entry) for entry in given]


def same_experts(saved: Sequence[Any], given: Sequence[Any]) -> None:
    """Checks that the frozen experts that are passed again are those that the fusion was trained with.

    Args:
        saved: The references in the saved config.
        given: The references of the objects that were passed; there may be more of them.

    Raises:
        InputError: A frozen expert has other weights or other settings, or another expert other classes.
    """
    for old, new in zip(references(list(saved)), references(list(given)), strict=False):
        if old["classes"] != new["classes"]:
            raise InputError(
                f"the fusion was trained with an expert of classes {', '.join(old['classes'])!r:.80}, "
                f"got one of {', '.join(new['classes'])!r:.80}",
                hint="pass the experts in the order of the saved config",
            )
        if old["frozen"] and old["sha256"] != new["sha256"]:
            raise InputError(
                f"the fusion was trained with another expert than this {new['kind']} of classes "
                f"{', '.join(new['classes'])!r:.80} (hash {old['sha256']}, got {new['sha256']})",
                hint="pass the same weights and settings; train a new fusion for other ones",
            )


def checked_spacing(value: Any, owner: str) -> list[float]:
    """Three lengths in mm.

    Raises:
        InputError: It is something else.
    """
    sides = list(value) if isinstance(value, list | tuple) else []
    numbers = [side for side in sides if isinstance(side, int | float) and not isinstance(side, bool)]
    if len(sides) != 3 or len(numbers) != 3 or not all(math.isfinite(n) and n > 0 for n in numbers):
        raise InputError(
            f"spacing of {owner} is three positive numbers of mm, got {value!r:.60}", hint="[1.5, 1.5, 1.5]"
        )
    return [float(number) for number in numbers]


def _reference(entry: Any) -> dict[str, Any]:
    if hasattr(entry, "reference") and not isinstance(entry, type):
        return entry.reference()
    if not isinstance(entry, dict):
        raise InputError(
            f"an extra expert is a WholeModel, got {type(entry).__name__}",
            hint="extra_experts=[WholeModel(network, classes, spacing=…)]",
        )
    classes = entry.get("classes")
    is_reference = (
        set(entry) == _KEYS
        and entry["name"] == "object"
        and entry["class"] == "WholeModel"
        and isinstance(entry["sha256"], str)
        and re.fullmatch(r"[0-9a-f]{16}", entry["sha256"]) is not None
        and entry["kind"] in KINDS
        and isinstance(classes, list)
        and 0 < len(classes) <= MAX_CLASSES
        and all(isinstance(name, str) and 0 < len(name) <= 200 for name in classes)
        and isinstance(entry["frozen"], bool)
    )
    if not is_reference:
        raise InputError(
            f"extra_experts holds what is no reference of a whole-model expert: {str(entry)!r:.60}",
            hint="is the config damaged? WholeModel(…).reference() makes one",
        )
    return {**entry, "spacing": checked_spacing(entry["spacing"], "a whole-model expert")}
