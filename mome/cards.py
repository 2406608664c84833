"""A card for every part: what it computes, its arguments, its source, and the parts that it fits with.

A card is made from the part's docstrings and class attributes alone, so a part of another package has one too. Making a
card imports the part, and so torch; this module imports neither.
"""

from __future__ import annotations

import dataclasses
import textwrap
import typing
from dataclasses import MISSING, dataclass
from typing import Any

from mome.docstrings import argument_meanings, first_sentence, module_docstring, own_docstring, prose, sources
from mome.part_fields import default_fields
from mome.part_lists import find_registry
from mome.registry import AUGMENTATIONS, ENCODERS, EXPERTS, FUSIONS, HEADS, LAYERS, ROUTERS, TEXT_ENCODERS, Registry
from mome.spec import write
from mome.typed import type_name


@dataclass(frozen=True)
class Argument:
    """One argument of a part.

    Attributes:
        name: Its name in a config string.
        type: Its type in words, such as "int".
        default: Its default as a config string spells it; None where it must be given.
        meaning: One or more sentences from the docstring of the Config; empty where it says nothing.
    """

    name: str
    type: str
    default: str | None
    meaning: str


@dataclass(frozen=True)
class Card:
    """What a part is.

    Attributes:
        kind: The word for its kind, such as "router".
        name: The name in a config string.
        summary: One line.
        description: The class docstring up to its first section; empty where there is none.
        arguments: In the order of the Config.
        sources: Links to papers, or "our choice".
        fits: Sentences about the parts that it works with.
        package: The package that it comes from.
        extra: The extra of `mome` that installs what it imports, or None.
    """

    kind: str
    name: str
    summary: str
    description: str
    arguments: tuple[Argument, ...]
    sources: tuple[str, ...]
    fits: tuple[str, ...]
    package: str
    extra: str | None

    def as_dict(self) -> dict[str, Any]:
        """The card as JSON values."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        """The card as lines of text."""
        lines = [f"{self.kind} {self.name}: {self.summary}"]
        if self.description:
            lines += ["", *self.description.splitlines()]
        if self.arguments:
            lines += ["", "arguments"]
            for argument in self.arguments:
                default = "required" if argument.default is None else f"default {argument.default}"
                lines.append(f"  {argument.name}  {argument.type}, {default}")
                lines += textwrap.wrap(argument.meaning, 100, initial_indent=" " * 6, subsequent_indent=" " * 6)
        for title, sentences in (("fits", self.fits), ("source", self.sources)):
            lines += ["", title, *(f"  {sentence}" for sentence in sentences)] if sentences else []
        origin = self.package if self.extra is None else f"{self.package}; pip install 'mome[{self.extra}]'"
        return "\n".join([*lines, "", f"package  {origin}"])


def card(kind: str, name: str) -> Card:
    """Describes a part.

    Args:
        kind: Its kind in the singular or the plural: "router", "routers".
        name: Its name, such as "topk".

    Raises:
        InputError: There is no such kind or part, or the part cannot be imported.
    """
    registry = find_registry(kind)
    part_class = registry.part_class(name)
    package, extra = registry.origin(name)
    docstring, summary = own_docstring(part_class), registry.summary(name)
    if summary in ("", f"from {package}"):  # another package registers no summary of its own
        summary = first_sentence(docstring) or summary
    return Card(
        kind=registry.kind,
        name=name,
        summary=summary,
        description=prose(docstring),
        arguments=tuple(_arguments(part_class.Config)),
        sources=tuple(sources(docstring) or sources(module_docstring(part_class))),
        fits=tuple(_fits(registry, part_class)),
        package=package,
        extra=extra,
    )


def _arguments(config_class: Any) -> list[Argument]:
    hints, meanings = typing.get_type_hints(config_class), argument_meanings(config_class)
    defaults = {field.name: value for field, value in default_fields(config_class)}
    found = []
    for field in dataclasses.fields(config_class):
        kind = field.metadata.get("part")
        several = bool(field.metadata.get("several"))
        words = "a module object" if field.metadata.get("module") else type_name(hints[field.name])
        if kind:
            words = f"a list of specs of {kind}" if several else f"a spec of {kind}"
        default = defaults.get(field.name, MISSING)
        found.append(
            Argument(
                field.name,
                words,
                None if default is MISSING else str(default) if kind and not several else write(default),
                meanings.get(field.name, ""),
            )
        )
    return found


def _fits(registry: Registry, part_class: Any) -> list[str]:
    """Sentences from the attributes that the base class of the kind declares."""
    if registry is ROUTERS:
        return _fits_of_router(part_class)
    if registry is EXPERTS:
        reads = part_class.reads
        sentence = {
            "tokens": "Reads one voxel at a time: works with every router, and inside encoders.",
            "map": "Reads whole maps, and every expert runs on every voxel: works with routers that give each voxel "
            "its experts, not with slots.",
            "prompt": "Reads the map and the prompt, so it runs once per prompt: works as experts= of a model, not "
            "inside an encoder, and with routers that give each voxel its experts.",
        }.get(reads)
        return [sentence] if sentence else []
    if registry is FUSIONS:
        sentences = ["Uses the finest scale only; the other scales get no experts."] if part_class.finest_only else []
        if _overrides(registry, part_class, "dot_product"):
            return [*sentences, "Is a softmax of dot products: one fused op computes it with a head of three layers."]
        return [*sentences, "Runs in plain torch, a tile of voxels at a time, with every head."]
    if registry is HEADS:
        if _overrides(registry, part_class, "layers"):
            return ["Has three layers: one fused op computes it with a fusion that is a softmax of dot products."]
        return ["Runs in plain torch, a tile of voxels at a time, with every fusion."]
    if registry is ENCODERS:
        return _fits_of_encoder(part_class)
    if registry is AUGMENTATIONS:
        return [part_class.concerns]
    if registry is LAYERS:
        return ["Stands inside encoders that have an argument for a layer, with parts that do not read the prompt."]
    if registry is TEXT_ENCODERS:
        sentence = (
            "Embeds free text." if part_class.needs_tower else "Has no text tower: prompts are labels of the model."
        )
        return [sentence, *(["Its rows only number the labels."] if part_class.one_hot else [])]
    return []


def _fits_of_encoder(encoder_class: Any) -> list[str]:
    fields = [
        field.name for field in dataclasses.fields(encoder_class.Config) if field.metadata.get("part") == "layers"
    ]
    inside = " and ".join(f"{name}=" for name in fields)
    return [
        "All experts, fusions and heads read its maps.",
        f"Takes sparse layers as {inside}." if inside else "Takes no sparse layers inside.",
    ]


def _fits_of_router(router_class: Any) -> list[str]:
    form = getattr(router_class.returns, "__name__", "")
    sentences = {
        "TokenChoice": ["Gives every voxel the same number of experts: works with all experts."],
        "Assignments": ["Gives every voxel any number of experts, perhaps none: works with all experts."],
        "Slots": ["Mixes voxels into slots: works with experts that read tokens, not with those that read maps."],
    }.get(form, [])
    if getattr(router_class, "group", "token") != "token":
        sentences = [
            *sentences,
            "The choice for a voxel depends on the other voxels of its patch or window, so that another patch size may "
            "change the result.",
        ]
    else:
        sentences = [*sentences, "The choice for a voxel does not depend on other voxels."]
    if getattr(router_class, "reads_place", False):
        sentences = [*sentences, "Reads the place of the map in the volume."]
    if router_class.reads_prompts:
        often = "group of labels" if getattr(router_class, "reads_labels", False) else "prompt"
        return [*sentences, f"Reads the prompt, so the experts run once per {often}; not for layers inside encoders."]
    return sentences


def _overrides(registry: Registry, part_class: Any, method: str) -> bool:
    return getattr(part_class, method) is not getattr(registry.base_class(), method)
