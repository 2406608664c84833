"""The files of a checkpoint beside those that transformers writes, and the order in which they replace older ones."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mome.checksums import CHECKSUMS, WEIGHTS, sums_of, weights_sum
from mome.configuration import MoMEConfig
from mome.json_file import read_json_object
from mome.labels import load_table
from mome.remote_code import write_stub
from mome.weights_file import weight_files

CONFIG_FILE, LABELS_FILE = "config.json", "labels.json"

_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")


def save_files(folder: Path, config: MoMEConfig, before: Path) -> None:
    """Writes the stub for remote code, labels.json and the sum of the weights into a folder with a saved model.

    Args:
        folder: The folder that transformers wrote config.json and the weights to.
        config: The model's config.
        before: The folder that it will replace; it may be the same.
    """
    mode = write_stub(folder).stat().st_mode & 0o777
    labels = stored_labels(list(config.labels), list(config.trained_labels), config.synonyms or {})
    (folder / LABELS_FILE).write_text(json.dumps(labels, indent=1) + "\n")
    _record_weights(folder, before)
    for weights in folder.glob("*.safetensors"):  # safetensors makes files that only their owner can read
        with contextlib.suppress(PermissionError):
            weights.chmod(mode)


def move_files(part: Path, folder: Path) -> None:
    """Moves new files over those of the same names, and removes weights of an earlier model that have other names."""
    new = sorted(path.name for path in part.iterdir())
    for name in new:
        os.replace(part / name, folder / name)
    part.rmdir()
    if any(_WEIGHTS.fullmatch(name) for name in new):
        for path in folder.iterdir():
            if _WEIGHTS.fullmatch(path.name) and path.name not in new:
                path.unlink()


def stored_labels(
    labels: list[str], trained_labels: list[str], synonyms: Mapping[str, list[str]] | None = None
) -> dict[str, Any]:
    """Returns the contents of labels.json: the entries of the class table that a checkpoint's bank holds, and sums.

    Args:
        labels, trained_labels: Those of the config.
        synonyms: Other words for labels that the class table does not have.
    """
    table = load_table()
    entries = {entry["name"]: entry for entry in table.to_json()["labels"]}
    values = {
        "version": table.version,
        "trained": list(trained_labels),
        "labels": [entries.get(name) or _own_entry(name, (synonyms or {}).get(name)) for name in labels],
    }
    return {**values, CHECKSUMS: sums_of(values)}


def _own_entry(name: str, synonyms: list[str] | None) -> dict[str, Any]:
    """The entry of a label that the class table does not have."""
    return {"name": name, "synonyms": synonyms} if synonyms else {"name": name}


def _record_weights(folder: Path, before: Path) -> None:
    """Writes the sum of the weights of a folder into its config.json.

    Args:
        folder: Where a model was just saved.
        before: The folder that it will replace. Weights of a variant have other names and leave the sum as it was.
    """
    files = weight_files(str(folder), {})
    if files is not None:
        sum_of_weights: object = weights_sum(files)
    elif (before / CONFIG_FILE).is_file():
        sums = read_json_object(before / CONFIG_FILE).get(CHECKSUMS)
        sum_of_weights = sums.get(WEIGHTS) if isinstance(sums, dict) else None
    else:
        sum_of_weights = None
    if sum_of_weights is not None:
        config = read_json_object(folder / CONFIG_FILE)
        config[CHECKSUMS] = {**config[CHECKSUMS], WEIGHTS: sum_of_weights}
        (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
