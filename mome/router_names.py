"""Names for the routers and scales of a model in logs and pictures."""

from __future__ import annotations

from torch import nn

from mome.routers.base import Router


def named_routers(model: nn.Module) -> dict[str, Router]:
    """The routers of a model by name, in the order of its modules; routers inside another router are left out.

    The router of a scale is `scale_0`, `scale_1`, … from coarse to fine; one inside the encoder has the name of its
    layer, as in `encoder.mixture`.
    """
    found: dict[str, Router] = {}
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if isinstance(module, Router) and not name.startswith(inside or ("\0",)):
            inside = (*inside, f"{name}.")
            found[_short(name)] = module
    return found


def _short(name: str) -> str:
    name = name.removesuffix(".router")
    parts = name.split(".")
    return f"scale_{parts[1]}" if parts[0] == "scale_experts" and parts[2:] == ["body"] else name
