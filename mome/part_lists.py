"""Lists of registered parts by their kind. Imports no part and no torch."""

from __future__ import annotations

from mome.errors import InputError, did_you_mean
from mome.patterns import Patterns
from mome.registry import REGISTRIES, Registry


def find_registry(kind: str) -> Registry:
    """The registry of a kind, which may be written in the singular or the plural: "router", "routers".

    Raises:
        InputError: There are no parts of this kind.
    """
    plain = kind.strip().replace("-", "_").replace(" ", "_")
    for name, registry in REGISTRIES.items():
        if plain in (name, registry.kind.replace(" ", "_")):
            return registry
    raise InputError(
        f"there are no parts of the kind {kind!r:.60}{did_you_mean(plain, REGISTRIES)}",
        hint="kinds: " + ", ".join(REGISTRIES),
    )


def list_parts(kind: str, pattern: Patterns = "*", *, exclude: Patterns = ()) -> list[str]:
    """Sorted names of the parts of a kind, those of other packages included.

    Args:
        kind: "encoders", "text_encoders", "experts", "routers", "fusions", "heads", "augmentations", "layers"
            or "losses".
        pattern: One wildcard pattern or several, as in `["*choice*", "top*"]`.
        exclude: Patterns of names that are left out.

    Raises:
        InputError: There are no parts of this kind, or a pattern is empty or opens a bracket that it does not close.
    """
    return find_registry(kind).names(pattern, exclude)
