"""Compares the files of a checkpoint with the checksums that they hold, and writes new checksums."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from mome.atomic import atomic_write
from mome.checksums import CHECKSUMS, WEIGHTS, changed_file, changed_keys, sums_of, weights_sum
from mome.configuration import summed_keys
from mome.json_file import read_json_object
from mome.processor_settings import PROCESSOR_FILE, changed_settings, summed_settings
from mome.saved_files import CONFIG_FILE, LABELS_FILE, stored_labels
from mome.weights_file import find_file, stored_tensors, weight_files


def changes_of(
    place: str,
    hub: dict[str, Any],
    *,
    ignore: Collection[str] = (),
    uses_config: bool = True,
    uses_weights: bool = True,
) -> list[str]:
    """Returns what was changed in config.json, labels.json and the weights since they were saved.

    A checkpoint without checksums has no changes that could be seen.

    Args:
        place: A folder or a Hub id.
        hub: Arguments for downloads, such as `revision`.
        ignore: Keys of config.json that are not used.
        uses_config: Whether the architecture is that of config.json.
        uses_weights: Whether the weights are those of the usual files.

    Raises:
        InputError: config.json or labels.json cannot be read.
        OSError: A download failed.
    """
    path = find_file(place, CONFIG_FILE, hub)
    config = {} if path is None else read_json_object(path)
    sums = config.get(CHECKSUMS)
    if sums is None:
        return []
    found = []
    if uses_config:
        found += [f"{key} in {CONFIG_FILE}" for key in changed_keys(summed_keys(config), sums, ignore)]
        labels = find_file(place, LABELS_FILE, hub)
        if labels is not None and "labels" not in ignore:
            found += [f"{key} in {LABELS_FILE}" for key in _changed_labels(read_json_object(labels), config)]
    files = weight_files(place, hub) if uses_weights else None
    known = sums.get(WEIGHTS) if isinstance(sums, dict) else None
    if files and known is not None and known != weights_sum(files):
        found.append("the weights")
    return found


def refuse_changes(name: str, place: str, hub: dict[str, Any], **used: Any) -> None:
    """Checks that a checkpoint is as it was saved; see `changes_of`.

    Args:
        name: What the user wrote, for the error.
        place, hub, used: See `changes_of`.

    Raises:
        ChangedFile: It is not.
    """
    found = changes_of(place, hub, **used)
    if found:
        raise changed_file(found, name)


def changes_of_folder(folder: Path) -> list[str] | None:
    """Returns what was changed in a folder with a checkpoint, its processor included; None where it has no checksums.

    Raises:
        InputError: A file cannot be read.
        SafetensorError: The weights are damaged.
    """
    files = [folder / name for name in (CONFIG_FILE, LABELS_FILE, PROCESSOR_FILE)]
    if not any(path.is_file() and CHECKSUMS in read_json_object(path) for path in files):
        return None
    stored_tensors(str(folder), {})  # a header that is damaged is told here
    settings = [] if not files[2].is_file() else changed_settings(read_json_object(files[2]))
    return [*changes_of(str(folder), {}), *(f"{key} in {PROCESSOR_FILE}" for key in settings)]


def lacks_labels(folder: Path) -> bool:
    """Says whether a checkpoint has no labels.json, which other programs read; a model takes config.json's labels."""
    return not (folder / LABELS_FILE).is_file()


def write_checksums(folder: str | Path) -> None:
    """Writes the checksums of a checkpoint as it is now, for one that was changed on purpose.

    labels.json follows config.json: where the names differ, or the file is missing, it is written anew.

    Raises:
        InputError: The folder holds no checkpoint, or a file cannot be read.
        SafetensorError: The weights are damaged.
        OutputError: A file cannot be written.
    """
    folder = Path(folder)
    config = read_json_object(folder / CONFIG_FILE)
    stored_tensors(str(folder), {})
    sums = sums_of(summed_keys(config))
    if (files := weight_files(str(folder), {})) is not None:
        sums[WEIGHTS] = weights_sum(files)
    _write(folder / CONFIG_FILE, {**config, CHECKSUMS: sums}, indent=2)
    names = _names_of_config(config)
    labels = {} if lacks_labels(folder) else read_json_object(folder / LABELS_FILE)
    if not labels or _names(labels) != names:
        synonyms = config.get("synonyms")
        labels = stored_labels(*names, synonyms if isinstance(synonyms, dict) else {})
    values = {key: value for key, value in labels.items() if key != CHECKSUMS}
    _write(folder / LABELS_FILE, {**values, CHECKSUMS: sums_of(values)}, indent=1)
    if (folder / PROCESSOR_FILE).is_file():
        settings = read_json_object(folder / PROCESSOR_FILE)
        _write(folder / PROCESSOR_FILE, {**settings, CHECKSUMS: sums_of(summed_settings(settings))}, indent=2)


def _write(path: Path, values: dict[str, Any], indent: int) -> None:
    with atomic_write(path, path.name) as temporary:
        temporary.write_text(json.dumps(values, indent=indent) + "\n", encoding="utf-8")


def _changed_labels(labels: dict[str, Any], config: dict[str, Any]) -> list[str]:
    """The keys of a labels.json that were changed, or that are those of another checkpoint."""
    sums = labels.pop(CHECKSUMS, None)
    if sums is None:
        return []
    other = zip(("labels", "trained"), _names(labels), _names_of_config(config), strict=True)
    return sorted({*changed_keys(labels, sums), *(key for key, here, there in other if here != there)})


def _names(labels: dict[str, Any]) -> tuple[list[Any], list[Any]]:
    """The names of a labels.json: of its entries, and of those that the weights were trained on."""
    entries, trained = labels.get("labels"), labels.get("trained")
    names = [entry.get("name") if isinstance(entry, dict) else None for entry in entries or ()]
    return names, list(trained or ())


def _names_of_config(config: dict[str, Any]) -> tuple[list[Any], list[Any]]:
    return list(config.get("labels") or ()), list(config.get("trained_labels") or ())
