"""Fingerprints of models, predictors and scans, so that a resumed run never returns the masks of another one."""

from __future__ import annotations

import hashlib
import json
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mome.module_objects import weights_sha256
from mome.volumes.data_files import identity

if TYPE_CHECKING:
    from mome.inference.predictor import Predictor
    from mome.modeling import MoME

# Config keys that say where a model lies or what wrote it; they do not change its masks.
_IGNORED_KEYS = ("_name_or_path", "name_or_path", "transformers_version", "auto_map")
_MOST_LEVELS = 6


def model_fingerprint(model: MoME) -> str:
    """Returns the first 16 hexadecimal digits of the SHA-256 of a model's config and weights (1 to 2 s per GB).

    The weights are those in memory, with their types, and so are buffers that no checkpoint stores.
    """
    config = {key: value for key, value in model.config.to_dict().items() if key not in _IGNORED_KEYS}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    digest.update(weights_sha256(model).encode())
    stored = model.state_dict()
    for name, buffer in model.named_buffers():
        if name not in stored and not buffer.is_meta:
            digest.update(f"{name} {_tensor_sha256(buffer)}".encode())
    return digest.hexdigest()[:16]


def predictor_settings(predictor: Predictor, model: MoME) -> Any:
    """Returns the class and the settings of a predictor as JSON, for comparison with those of an earlier run.

    Settings are its attributes, and those of the predictor that it wraps. Modules other than `model` and arrays stand
    as hashes. What cannot be compared, such as a function, gets a value that no other run has: such a predictor's
    masks are never taken from an earlier run.
    """
    return _described(predictor, model, 0)


def _described(value: Any, model: Any, level: int) -> Any:
    if value is model:
        return "the model"
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, torch.dtype | torch.Size):
        return str(value)
    if isinstance(value, torch.device):
        return "a device"  # where it is computed decides no mask
    if isinstance(value, torch.Tensor | np.ndarray):
        return _tensor_sha256(torch.as_tensor(value))
    if isinstance(value, torch.nn.Module):
        return [type(value).__qualname__, weights_sha256(value)]
    if level < _MOST_LEVELS:
        if isinstance(value, list | tuple):
            return [_described(item, model, level + 1) for item in value]
        if isinstance(value, dict):
            return {str(key): _described(item, model, level + 1) for key, item in value.items()}
        if not callable(value) and hasattr(value, "__dict__"):
            named = {name: _described(item, model, level + 1) for name, item in sorted(vars(value).items())}
            return {"class": f"{type(value).__module__}.{type(value).__qualname__}", **named}
    return f"not comparable {secrets.token_hex(8)}"


def _tensor_sha256(tensor: torch.Tensor) -> str:
    values = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode() + values.tobytes()).hexdigest()


def scan_identity(scan: Path) -> dict[str, Any]:
    """Returns the bytes and the time of the last change (ns) of a scan: a file with its data files, or a folder."""
    return identity(scan)
