"""Weights of presets by tags: `mome_ct_tiny.openkbp` is the preset `mome_ct_tiny` trained on OpenKBP. Imports no torch.

A tag says what weights were trained on, so that one preset can have several. The first tag of a preset is its default.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from mome.errors import InputError, did_you_mean
from mome.json_file import read_json_object
from mome.patterns import Patterns, as_list, matching
from mome.presets import BUNDLED, PRESETS, bundled_models, find_name


@dataclass(frozen=True)
class Weights:
    """One checkpoint of a preset.

    Attributes:
        folder: Name of the folder in `mome/checkpoints`.
        summary: What the weights were trained on, in one line.
        licence: The licence of the weights.
    """

    folder: str
    summary: str
    licence: str

    @property
    def place(self) -> str:
        """Where the weights are, in words."""
        return f"bundled as {self.folder}"


# Preset → tag → weights.
PRETRAINED: dict[str, dict[str, Weights]] = {
    "mome_ct_tiny": {
        "openkbp": Weights(
            folder="mome-ct-tiny",
            summary="OpenKBP and synthetic phantoms, seven head-and-neck structures",
            licence="Apache-2.0",
        ),
        "torso": Weights(
            folder="mome-ct-torso-tiny",
            summary="synthetic CT of four anatomies and two real CT, seventeen structures of the torso",
            licence="Apache-2.0",
        ),
    },
}

# Names with a tag that were replaced → their new names. They work, with a warning.
DEPRECATED_TAGS: dict[str, str] = {}


def tags(preset: str) -> list[str]:
    """The tags of a preset, the default one first."""
    return list(PRETRAINED.get(preset, {}))


def pretrained_models() -> list[str]:
    """Sorted names of all weights with their tags, such as `mome_ct_tiny.openkbp`."""
    return sorted(f"{preset}.{tag}" for preset in PRETRAINED for tag in tags(preset))


def matching_models(names: Iterable[str], include: Patterns = "*", exclude: Patterns = ()) -> list[str]:
    """Sorted names of models that match any pattern and none of `exclude`; - and _ are the same.

    Inside brackets, as in `[a-z]`, - keeps its meaning.

    Raises:
        InputError: A pattern is empty or opens a bracket that it does not close.
    """
    return matching(names, [_plain(p) for p in as_list(include)], [_plain(p) for p in as_list(exclude)])


def _plain(pattern: str) -> str:
    return re.sub(r"\[[^\]]*\]|-", lambda found: "_" if found[0] == "-" else found[0], pattern)


def split_tag(name: str) -> tuple[str, str | None]:
    """`mome_ct_tiny.openkbp` → (`mome_ct_tiny`, `openkbp`); a name without a tag → (name, None).

    Raises:
        InputError: The preset is known, but has no weights of this tag.
    """
    old = find_name(name, DEPRECATED_TAGS)
    if old is not None:
        new = DEPRECATED_TAGS[old]
        warnings.warn(f"the weights '{name}' are now called '{new}'", DeprecationWarning, stacklevel=3)
        name = new
    stem, dot, tag = name.partition(".")
    found = find_name(stem, PRESETS)
    if not dot or found is None:
        return name, None
    if tag not in tags(found):
        known = ", ".join(f"{found}.{other}" for other in tags(found))
        raise InputError(
            f"preset '{found}' has no weights tagged '{tag:.60}'{did_you_mean(tag[:60], tags(found))}",
            hint=f"weights: {known}" if known else "it has no weights; mome list models --pretrained shows those",
        )
    return found, tag


def default_tag(preset: str) -> str | None:
    """The tag that `pretrained=True` means for a preset, or None where it has no weights."""
    return next(iter(tags(preset)), None)


def bundled_folder(name: str) -> Path | None:
    """The folder inside the package that a name means, or None: `mome-ct-tiny`, or a preset with a tag.

    Raises:
        InputError: See `split_tag`.
    """
    bundled = find_name(name, bundled_models())
    if bundled is None:
        preset, tag = split_tag(name)
        if tag is None:
            return None
        bundled = PRETRAINED[preset][tag].folder
    return BUNDLED / bundled


def bundled_labels() -> dict[str, frozenset[str]]:
    """Returns the labels that each bundled checkpoint was trained on; they stand in its `labels.json`."""
    return _read_labels(tuple(bundled_models()))


def bundled_model_of(label: str) -> str | None:
    """Returns a bundled checkpoint that was trained on a label, or None."""
    return next((model for model, labels in bundled_labels().items() if label in labels), None)


@lru_cache(maxsize=4)
def _read_labels(models: tuple[str, ...]) -> dict[str, frozenset[str]]:
    return {
        model: frozenset(str(name) for name in read_json_object(BUNDLED / model / "labels.json").get("trained", []))
        for model in models
    }
