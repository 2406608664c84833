"""Fingerprints of models and scans, so that a resumed run never returns the masks of another model or scan."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mome.module_objects import weights_sha256
from mome.volumes.data_files import identity

if TYPE_CHECKING:
    from mome.modeling import MoME

# Config keys that say where a model lies or what wrote it; they do not change its masks.
_IGNORED_KEYS = ("_name_or_path", "name_or_path", "transformers_version", "auto_map")


def model_fingerprint(model: MoME) -> str:
    """Returns the first 16 hexadecimal digits of the SHA-256 of a model's config and weights (about 1 s per GB)."""
    config = {key: value for key, value in model.config.to_dict().items() if key not in _IGNORED_KEYS}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    digest.update(weights_sha256(model).encode())
    return digest.hexdigest()[:16]


def scan_identity(scan: Path) -> dict[str, Any]:
    """Returns the bytes and the time of the last change (ns) of a scan: a file with its data files, or a folder."""
    return identity(scan)
