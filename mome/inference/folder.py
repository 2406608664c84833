"""Many scans with one model: a broken study is recorded and passed over, an interrupted run goes on."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mome.errors import InputError, OutputError
from mome.inference.result import file_part
from mome.inference.segmenter import Segmenter
from mome.volumes.read import stem


def find_scans(inputs: Sequence[str | Path]) -> list[Path]:
    """Files as given; of a folder, its NIfTI, NRRD and MetaImage files, sorted.

    Raises:
        InputError: A folder without scans, or two scans of the same name (their masks would overwrite each other).
    """
    scans: list[Path] = []
    for given in map(Path, inputs):
        if given.is_dir() and not any(given.glob("*.dcm")):
            found = sorted(
                p for p in given.iterdir() if p.name.lower().endswith((".nii", ".nii.gz", ".nrrd", ".mha", ".mhd"))
            )
            if not found and not any(p.is_file() for p in given.iterdir()):
                raise InputError("the folder holds no scans", where=str(given), hint=".nii.gz, .nrrd or .mha")
            scans += found or [given]  # files of another kind: perhaps a DICOM series without endings
        else:
            scans.append(given)
    seen: dict[str, Path] = {}
    for scan in scans:
        other = seen.setdefault(stem(scan), scan)
        if other is not scan:
            raise InputError(f"two scans are both named {stem(scan)!r}", where=str(scan), hint="rename one")
    return scans


def segment_folder(
    segmenter: Segmenter,
    inputs: Sequence[str | Path],
    out: str | Path,
    prompts: Sequence[str],
    *,
    multilabel: bool = False,
    resume: bool = False,
    on_done: Callable[[dict[str, Any]], None] | None = None,
) -> list[dict[str, Any]]:
    """Segments every scan; `<out>/report.json` has one entry per study, rewritten after each.

    Args:
        segmenter: Keeps the model between scans.
        inputs: Files and folders.
        out: Where masks go.
        prompts: For all of them.
        multilabel: One map of ids instead of a mask per prompt.
        resume: Pass over studies that the report calls done with the same prompts and whose masks are there.
        on_done: Called with each entry.

    Returns:
        The entries: `name`, `status` (`done`, `failed`, `skipped`), `masks`, `volumes_ml`, `seconds`, `error`.
    """
    out = Path(out)
    report_path = out / "report.json"
    before = _previous(report_path) if resume else {}
    entries = []
    for scan in find_scans(inputs):
        name = stem(scan)
        old = before.get(name)
        if old and _complete(old, out, prompts, multilabel):
            entry = {**old, "status": "done", "skipped": True}
        else:
            entry = _one(segmenter, scan, name, out, prompts, multilabel)
        entries.append(entry)
        _write_report(report_path, entries)
        if on_done is not None:
            on_done(entry)
    return entries


def _one(
    segmenter: Segmenter, scan: Path, name: str, out: Path, prompts: Sequence[str], multilabel: bool
) -> dict[str, Any]:
    began = time.perf_counter()
    request = {"name": name, "prompts": list(prompts), "multilabel": multilabel}
    try:
        result = segmenter.segment(scan, prompts)
        paths = result.save(out, file_part(name), multilabel=multilabel)
    except InputError as error:
        return {**request, "status": "failed", "error": str(error)}
    overlap = result.label_map()[2] if multilabel else None
    return {
        **request,
        "status": "done",
        "masks": [path.name for path in paths],
        "structures": result.summary(),
        "overlapping_voxels": overlap,
        "notes": list(result.notes),
        "seconds": round(time.perf_counter() - began, 2),
        "phases": result.seconds,
    }


def _complete(entry: dict[str, Any], out: Path, prompts: Sequence[str], multilabel: bool) -> bool:
    same = entry.get("prompts") == list(prompts) and entry.get("multilabel") == multilabel
    return same and entry.get("status") == "done" and all((out / mask).is_file() for mask in entry["masks"])


def _previous(path: Path) -> dict[str, dict[str, Any]]:
    if not path.is_file():
        return {}
    try:
        return {entry["name"]: entry for entry in json.loads(path.read_text())["studies"]}
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise InputError("the report of the earlier run cannot be read", where=str(path), hint="remove it") from error


def _write_report(path: Path, entries: list[dict[str, Any]]) -> None:
    part = path.with_suffix(".json.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps({"studies": entries}, indent=1) + "\n")
        os.replace(part, path)
    except OSError as error:
        raise OutputError(
            f"the report could not be written: {error.strerror}", where=str(path), hint="free some disk space"
        ) from error
    finally:
        part.unlink(missing_ok=True)
