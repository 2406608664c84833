"""Torch modules given in place of a config string: `experts={"name": "whole_model", "model": network}`.

A config is plain JSON, so it keeps only the class name and the SHA-256 of the weights. The object itself stays with
the user; this table finds it again by that hash when the model is built. Nothing is ever imported or loaded from a
path because a config says so. Imports no torch until a module is given.
"""

from __future__ import annotations

import contextlib
import hashlib
import weakref
from typing import Any

from mome.errors import InputError

# The name that a spec has when an object stands in its place.
OBJECT = "object"

_OBJECTS: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()


def is_module(value: Any) -> bool:
    """Whether the value is a torch module; torch need not have been imported."""
    return hasattr(value, "state_dict") and hasattr(value, "named_parameters") and not isinstance(value, type)


def is_reference(value: Any) -> bool:
    """Whether the value is what `remember` returned."""
    return isinstance(value, dict) and value.get("name") == OBJECT and "sha256" in value


def weights_sha256(module: Any) -> str:
    """SHA-256 over the names, types, shapes and bytes of a module's state, in hexadecimal digits.

    Raises:
        InputError: The module was built on the meta device and has no values.
    """
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(_values(module).items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _values(module: Any) -> dict[str, Any]:
    """The state of a module; tensors that accelerate has offloaded are read from where they are kept."""
    state = module.state_dict()
    if any(tensor.is_meta for tensor in state.values()):
        from accelerate.utils.modeling import get_state_dict_offloaded_model

        names = set(state)
        with contextlib.suppress(AttributeError, KeyError, ValueError):  # the module has no hooks of accelerate
            offloaded = get_state_dict_offloaded_model(module)
            state = offloaded if set(offloaded) == names else state
    if any(tensor.is_meta for tensor in state.values()):
        raise InputError(
            "the module's weights have no values: it was built on the meta device",
            hint="load the weights first",
        )
    return state


def remember(module: Any) -> dict[str, Any]:
    """Returns the reference that a config stores for a module: `{"name": "object", "class": …, "sha256": …}`.

    The module must stay alive until the model is built; the table holds no strong reference.
    """
    kind = type(module)
    key = hashlib.sha256(f"{kind.__module__}.{kind.__qualname__} {weights_sha256(module)}".encode()).hexdigest()[:16]
    _OBJECTS[key] = module
    return {"name": OBJECT, "class": kind.__qualname__, "sha256": key}


def recall(reference: dict[str, Any], what: str, argument: str = "experts=module") -> Any:
    """Returns the module of a reference. Its parameters are marked as initialised, so that no recipe overwrites them.

    Args:
        reference: What `remember` returned, perhaps read from a config.json.
        what: The part it stands for, for the message, as in "expert".
        argument: The argument that takes the object again, for the message.

    Raises:
        InputError: No such module was passed in this process.
    """
    module = _OBJECTS.get(str(reference.get("sha256")))
    if module is None:
        raise InputError(
            f"the {what} of this model is a module object of class {reference.get('class')!r} "
            f"(hash {reference.get('sha256')}), which a checkpoint does not hold",
            hint=f"pass the same object again, as in MoME.from_pretrained(…, {argument})",
        )
    for tensor in (*module.parameters(), *module.buffers()):
        tensor._is_hf_initialized = True  # transformers' initialisers pass over such tensors
    return module
