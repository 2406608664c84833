"""The registries: they check the specs of parts, fill in defaults and build them. No torch here."""

from __future__ import annotations

import dataclasses
from typing import Any

from mome import module_objects
from mome.errors import InputError
from mome.part_fields import (
    REGISTRIES,
    arguments,
    at_least,
    default_arguments,
    module,
    part,
    with_nested,
    without_defaults,
)
from mome.part_table import PartTable
from mome.spec import Spec, canonical
from mome.typed import from_data

__all__ = [
    "AUGMENTATIONS",
    "ENCODERS",
    "EXPERTS",
    "FUSIONS",
    "HEADS",
    "LAYERS",
    "LOSSES",
    "PARTS",
    "REGISTRIES",
    "ROUTERS",
    "TEXT_ENCODERS",
    "Registry",
    "at_least",
    "module",
    "part",
]


class Registry(PartTable):
    """Parts of one kind, and the specs that name them with their arguments; see `PartTable` for its arguments."""

    def resolve(self, spec: Any) -> tuple[Any, Any]:
        """The part's class and its Config object; for a module object, the object and None.

        Args:
            spec: A string, a dict with a name, a Config object of one of the parts, or a module object.

        Raises:
            InputError: Unknown name or argument, wrong type, or a package that is not installed.
        """
        given = self._as_dict(spec)
        if module_objects.is_reference(given):
            found = module_objects.recall(given, self.kind)
            self._check_contract(type(found))
            return found, None
        name = given["name"]
        cls, owner = self._import(name), f"{self.kind} '{name}'"
        values = {key: value for key, value in given.items() if key != "name"}
        return cls, with_nested(from_data(cls.Config, values, owner=owner), owner)

    def build(self, spec: Any, **runtime: Any) -> Any:
        """Builds a part. `runtime` is what other parts decide, such as `dim`; it is never saved."""
        part_class, config = self.resolve(spec)
        return part_class if config is None else part_class(config, **runtime)

    def canonical(self, spec: Any) -> Spec:
        """The validated dict with every default filled in, nested parts included; `name` comes first."""
        given = self._as_dict(spec)
        if module_objects.is_reference(given):
            return given
        _, config = self.resolve(given)
        return canonical({"name": given["name"], **arguments(config)})

    def defaults(self, spec: Spec) -> dict[str, Any]:
        """The part's default arguments as JSON values, nested parts in their canonical form."""
        return default_arguments(self.part_class(spec["name"]).Config)

    def without_defaults(self, spec: Spec) -> Spec:
        """The spec with only the arguments that differ from their defaults, nested parts likewise."""
        if module_objects.is_reference(spec):
            return spec
        return without_defaults(self.part_class(spec["name"]).Config, spec)

    def _as_dict(self, spec: Any) -> Spec:
        if module_objects.is_module(spec):
            return module_objects.remember(spec)
        if dataclasses.is_dataclass(spec) and not isinstance(spec, type):
            name = self._name_of(type(spec))
            return {"name": name, **arguments(with_nested(spec, f"{self.kind} '{name}'"))}
        if isinstance(spec, dict) and isinstance(spec.get("name"), str):
            # a module object in an argument is not JSON: its reference stands for it
            spec = {k: module_objects.remember(v) if module_objects.is_module(v) else v for k, v in spec.items()}
        return canonical(spec)

    def _name_of(self, config_class: type) -> str:
        """The one part whose Config is exactly this class; a subclass of a Config belongs to another part."""
        found = []
        for name in self.names():
            try:
                part = self._import(name)
            except InputError:  # a part whose package is missing made no Config object
                continue
            if getattr(part, "Config", None) is config_class:
                found.append(name)
        if len(found) == 1:
            return found[0]
        shown = config_class.__qualname__
        if not found:
            raise InputError(
                f"{shown} is not the Config of a registered {self.kind}",
                hint=f"{self.plural}: " + ", ".join(self.names()),
            )
        raise InputError(
            f"{shown} is the Config of several: {', '.join(found)}", hint=f"name one, as in {{'name': '{found[0]}'}}"
        )


ENCODERS = Registry("encoder", "mome.encoders", "mome.encoders", "mome.encoders.base:Encoder")
TEXT_ENCODERS = Registry(
    "text encoder", "mome.encoders.text", "mome.text_encoders", "mome.encoders.text.base:TextEncoder"
)
EXPERTS = Registry("expert", "mome.experts", "mome.experts", "mome.experts.base:Experts")
ROUTERS = Registry("router", "mome.routers", "mome.routers", "mome.routers.base:Router")
FUSIONS = Registry("fusion", "mome.routers.fusion", "mome.fusions", "mome.routers.fusion.base:Fusion")
HEADS = Registry("head", "mome.layers.heads", "mome.heads", "mome.layers.heads.base:Head")
LAYERS = Registry("layer", "mome.layers", "mome.layers")
LOSSES = Registry("loss", "mome.losses", "mome.losses")
AUGMENTATIONS = Registry(
    "augmentation", "mome.data.augmentations", "mome.augmentations", "mome.data.augmentations.base:Augmentation"
)

REGISTRIES.update(
    {
        "encoders": ENCODERS,
        "text_encoders": TEXT_ENCODERS,
        "experts": EXPERTS,
        "routers": ROUTERS,
        "fusions": FUSIONS,
        "heads": HEADS,
        "augmentations": AUGMENTATIONS,
        "layers": LAYERS,
        "losses": LOSSES,
    }
)

# The parts of a model by their names in its config and in training configurations.
PARTS: dict[str, Registry] = {
    "encoder": ENCODERS,
    "text_encoder": TEXT_ENCODERS,
    "experts": EXPERTS,
    "router": ROUTERS,
    "fusion": FUSIONS,
    "head": HEADS,
}
