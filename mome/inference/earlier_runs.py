"""What a report keeps of a study's earlier runs: a run with other prompts writes other files into the same folder.

The entry of a study is that of its last run. Files of the runs before it are still there, and are known as long as no
later run replaced them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

EARLIER = "earlier"
# What decides whether a file may be replaced.
_KEPT = ("scan", "model", "settings", "prompts", "multilabel", "writer", "ended")
# Lists with an item per mask.
_PER_MASK = ("masks", "mask_bytes", "mask_sha256")


def runs_of(entry: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yields an entry of a report, then what it keeps of earlier runs; what another program wrote there is left out."""
    yield entry
    earlier = entry.get(EARLIER)
    if isinstance(earlier, list):
        yield from (run for run in earlier if isinstance(run, dict))


def run_that_wrote(entry: dict[str, Any], mask: str) -> dict[str, Any]:
    """Returns the run of a study that wrote a mask; an empty dict where none is known.

    Args:
        entry: The study's entry.
        mask: The file's name.
    """
    return next((run for run in runs_of(entry) if mask in _names(run, "masks")), {})


def files_of(entry: dict[str, Any], scan: dict[str, Any]) -> set[str]:
    """Returns the files beside the masks that runs of a study wrote for a scan, as paths below the folder.

    Args:
        entry: The study's entry.
        scan: `mome.inference.fingerprint.scan_identity` of the scan.
    """
    return {name for run in runs_of(entry) if run.get("scan") == scan for name in _names(run, "files")}


def structures_of_earlier_runs(entry: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns what the report says of the structures whose masks earlier runs of the same scan wrote, each once.

    Args:
        entry: The study's entry; masks that a later run replaced are not among them.
    """
    _, *earlier = runs_of(entry)
    found: dict[str, dict[str, Any]] = {}
    for run in earlier:
        for structure in _list(run, "structures") if run.get("scan") == entry.get("scan") else ():
            if isinstance(structure, dict):
                found.setdefault(str(structure.get("name")), structure)
    return list(found.values())


def with_earlier_runs(entry: dict[str, Any], before: dict[str, Any] | None) -> dict[str, Any]:
    """Returns a new entry of a study with what the entry before it knows of files that the new run did not write.

    Args:
        entry: The entry of the run that has ended.
        before: The study's entry until now; None where there is none.
    """
    masks, files = set(_names(entry, "masks")), set(_names(entry, "files"))
    kept = [left for run in runs_of(before or {}) if (left := _left_of(run, masks, files))]
    new = {key: value for key, value in entry.items() if key != EARLIER}
    return {**new, EARLIER: kept} if kept else new


def _left_of(run: dict[str, Any], masks: set[str], files: set[str]) -> dict[str, Any]:
    """Returns what is kept of a run: its files that a later run did not write; an empty dict where there is none."""
    names = _names(run, "masks")
    at = [number for number, name in enumerate(names) if name not in masks]
    others = [name for name in _names(run, "files") if name not in files]
    if not at and not others:
        return {}
    lists = {key: _list(run, key) for key in _PER_MASK}
    structures = [item for item in _list(run, "structures") if isinstance(item, dict)]
    if len(structures) == len(names):  # else one file held all of them
        structures = [structures[number] for number in at]
    return {
        **{key: run[key] for key in _KEPT if key in run},
        **{key: [items[number] for number in at] for key, items in lists.items() if len(items) == len(names)},
        **({"files": others} if others else {}),
        "structures": structures,
    }


def _list(run: dict[str, Any], key: str) -> list[Any]:
    found = run.get(key)
    return found if isinstance(found, list) else []


def _names(run: dict[str, Any], key: str) -> list[str]:
    return [str(name) for name in _list(run, key)]
