"""The steps of loading a checkpoint: its config with overrides, its tensors, its data type, and its errors in words."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers.utils import find_adapter_config_file
from transformers.utils.hub import cached_file

from mome.configuration import MoMEConfig, keys_of_file
from mome.errors import InputError, did_you_mean
from mome.experts.whole_model_reference import references, same_experts
from mome.json_file import read_json_object
from mome.registry import TEXT_ENCODERS
from mome.weights_file import StoredTensor, described, shapes_on_meta, stored_tensors

_DTYPES = {str(dtype).split(".")[1]: dtype for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16)}
# With these the weights do not come from the files with the usual names, or are renamed while they are loaded.
_OTHER_FILES = ("variant", "gguf_file", "key_mapping", "tp_plan", "tp_size")


@contextlib.contextmanager
def errors_for_people(name: str | Path | None, arguments: Collection[str] = ()) -> Iterator[None]:
    """Turns the errors of transformers' loading into InputErrors that name the model.

    Args:
        name: The model.
        arguments: The names of the user's arguments, of which transformers may not know one.
    """
    try:
        yield
    except TypeError as error:
        unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if unknown is None or unknown[1] not in arguments:  # else it is a fault of a part's code
            raise
        key, fields = unknown[1], [field for field in MoMEConfig.__dataclass_fields__ if field != "dtype"]
        raise InputError(
            f"from_pretrained has no argument {key!r:.60}{did_you_mean(key, fields)}",
            hint=".to('cuda') after loading, or device_map='cuda'"
            if key == "device"
            else "arguments: " + ", ".join(fields[:8]) + ", …",
        ) from error
    except OSError as error:
        if name is not None and os.path.isdir(name):
            held = "nothing that can be read"
            with contextlib.suppress(OSError):
                held = ", ".join(sorted(os.listdir(name))[:6])
            raise InputError(
                f"the folder cannot be loaded: {str(error).splitlines()[0][:160]}",
                where=str(name),
                hint=f"it holds {held}; weights are model.safetensors",
            ) from error
        raise InputError(
            f"'{name}' cannot be loaded: {str(error).splitlines()[0][:160]}",
            hint="check the id and the network; HF_HUB_OFFLINE=1 reads the local cache only",
        ) from error
    except SafetensorError as error:
        raise InputError(
            f"the weights are damaged or incomplete: {str(error).splitlines()[0][:160]}",
            where=str(name),
            hint="copy or download the checkpoint again",
        ) from error
    except RuntimeError as error:
        if "mismatch" not in str(error):
            raise
        raise InputError(
            "the checkpoint's weights do not fit its config: it is of another architecture",
            where=str(name),
        ) from error


def saved_config(name: str | Path, place: str, hub: dict[str, Any]) -> dict[str, Any]:
    """Reads the config.json of a checkpoint.

    Args:
        name: What the user wrote, for errors.
        place: A folder or a Hub id.
        hub: Arguments for downloads, such as `revision`.

    Returns:
        The keys that describe a MoME.

    Raises:
        InputError: The file is damaged, or describes another architecture.
        OSError: The download failed.
    """
    path = cached_file(place, "config.json", **hub)
    assert path is not None  # a missing file is an OSError
    raw = read_json_object(path)
    if raw.get("model_type") != "mome":
        raise InputError(
            f"this is a checkpoint of {raw.get('model_type', 'an unknown architecture')!r:.60}, not of mome",
            where=str(name),
            hint="a folder that MoME.save_pretrained or mome train wrote, or a name of mome list models",
        )
    return keys_of_file(raw, where=path)


def refuse_adapter(place: str | None, hub: dict[str, Any]) -> None:
    """Refuses a checkpoint with an adapter of PEFT: transformers would load the base model that the adapter names."""
    if place is not None and find_adapter_config_file(place, **hub) is not None:
        raise InputError(
            "the checkpoint holds adapter_config.json, an adapter of PEFT, which would change the model",
            where=place,
            hint="load the model without that file, then peft.PeftModel.from_pretrained(model, …)",
        )


def saved_or_none(name: str, place: str, hub: dict[str, Any], *, needed: bool) -> dict[str, Any] | None:
    """The saved config; None where it cannot be read and is not needed, because the user gave one."""
    try:
        return saved_config(name, place, hub)
    except (InputError, OSError):
        if needed:
            raise
        return None


def stored_or_none(place: str | None, hub: dict[str, Any], kwargs: dict[str, Any]) -> dict[str, StoredTensor] | None:
    """The tensors that the checkpoint holds, or None where they are not in the usual files."""
    if place is None:
        state = kwargs.get("state_dict")
        if not isinstance(state, dict):
            raise InputError("without a name, state_dict= holds the weights", hint="config=MoMEConfig(…), state_dict=…")
        return described(state)
    if kwargs.get("state_dict") is not None:
        raise InputError(
            "both a name and state_dict= were given", hint="MoME.from_pretrained(None, config=…, state_dict=…)"
        )
    return None if any(kwargs.get(key) for key in _OTHER_FILES) else stored_tensors(place, hub)


def promised_tensors(cls: Callable[[MoMEConfig], nn.Module], saved: dict[str, Any]) -> dict[str, StoredTensor]:
    """The tensors that a checkpoint holds by its own config, before any override."""
    try:
        return shapes_on_meta(cls, MoMEConfig(**saved))
    except InputError:  # a module object of the saved config is not at hand
        return {}


def with_overrides(raw: dict[str, Any], overrides: dict[str, Any]) -> tuple[MoMEConfig, dict[str, Any], bool]:
    """Applies overrides to a saved config.

    The rows of the bank belong to the saved labels, so the model is loaded with these first.

    Returns:
        The config to load with, the labels to change to afterwards, and whether the text encoder changed.
    """
    overrides = dict(overrides)
    if "extra_experts" in overrides:
        overrides["extra_experts"] = references(overrides["extra_experts"])
        same_experts(raw.get("extra_experts", ()), overrides["extra_experts"])
    if "experts" in overrides and "residual" not in overrides and "residual" in raw:
        before, after = (
            MoMEConfig(**{**raw, "residual": None, **changed}).residual
            for changed in ({}, {"experts": overrides["experts"]})
        )
        if raw["residual"] == before:  # nobody chose it, so it follows the experts
            raw = {**raw, "residual": after}
    labels: dict[str, Any] = {key: overrides.pop(key) for key in ("labels", "trained_labels") if key in overrides}
    if "text_encoder" in overrides:
        wanted = TEXT_ENCODERS.canonical(overrides["text_encoder"])
        if wanted != MoMEConfig(**raw).text_encoder:  # the saved rows come from another tower
            chosen = {key: labels[key] for key in ("trained_labels",) if key in labels}
            if "labels" in labels and "trained_labels" not in labels:
                labels["trained_labels"] = [name for name in raw.get("trained_labels", ()) if name in labels["labels"]]
            kept = labels.get("labels", raw.get("labels", ()))
            words = {label: words for label, words in (raw.get("synonyms") or {}).items() if label in kept}
            given = {**raw, "synonyms": words, "text_dim": None, **overrides, **labels}
            return MoMEConfig(**given), chosen, True
    return MoMEConfig(**{**raw, **overrides}), labels, False


def floating_type(dtype: Any, torch_dtype: Any) -> torch.dtype | str:
    """The type that weights are loaded in: float32 where none is given.

    Args:
        dtype: A torch type, its name, "auto" for the stored type, or None.
        torch_dtype: The same by the older name of transformers.

    Raises:
        InputError: The two differ, or the type is not a floating type of 16 bits or more.
    """
    given = [_named(value) for value in (dtype, torch_dtype) if value is not None]
    if len(set(given)) > 1:
        raise InputError(f"dtype={given[0]} and torch_dtype={given[1]} differ", hint="give dtype alone")
    return given[0] if given else torch.float32


def _named(value: Any) -> torch.dtype | str:
    found = _DTYPES.get(value, value) if isinstance(value, str) else value
    if found == "auto" or found in _DTYPES.values():
        return found
    raise InputError(
        f"dtype is one of {', '.join(_DTYPES)} or auto, got {value!r:.60}",
        hint="for integers, quantization_config=TorchAoConfig(…)",
    )
