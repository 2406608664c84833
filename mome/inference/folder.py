"""Many scans with one model: a broken study is recorded and passed over, an interrupted run goes on."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mome.atomic import atomic_write, check_output_folder
from mome.errors import InputError, OutputError
from mome.inference.fingerprint import model_fingerprint, scan_identity
from mome.inference.result import file_part, mask_paths, refuse_to_overwrite
from mome.inference.segmenter import Segmenter
from mome.prompts import embed_prompts
from mome.volumes import read_label_table
from mome.volumes.read import stem

logger = logging.getLogger(__name__)
_ENDINGS = (".nii", ".nii.gz", ".nrrd", ".mha", ".mhd")


def find_scans(inputs: Sequence[str | Path]) -> list[Path]:
    """Files as given; of a folder, its NIfTI, NRRD and MetaImage files, sorted, without the masks we wrote there.

    Raises:
        InputError: A folder without scans, or two scans whose masks would have the same name.
    """
    scans: list[Path] = []
    for given in map(Path, inputs):
        if given.is_dir() and not any(given.glob("*.dcm")):
            volumes = sorted(p for p in given.iterdir() if p.name.lower().endswith(_ENDINGS))
            found = [path for path in volumes if not _is_mask(path)]
            if not found and (volumes or not any(p.is_file() for p in given.iterdir())):
                what = "the folder holds masks only, no scans" if volumes else "the folder holds no scans"
                raise InputError(what, where=str(given), hint=".nii.gz, .nrrd or .mha")
            scans += found or [given]  # files of another kind: perhaps a DICOM series without endings
        else:
            scans.append(given)
    seen: dict[str, Path] = {}
    for scan in scans:
        part = file_part(stem(scan))
        other = seen.setdefault(part, scan)
        if other is not scan:
            raise InputError(
                f"the masks of two scans would both be named {part!r}", where=f"{other} and {scan}", hint="rename one"
            )
    return scans


def _is_mask(path: Path) -> bool:
    """Whether a file carries the label table that we write into masks."""
    if not path.name.lower().endswith((".nii", ".nii.gz")):
        return False
    try:
        return bool(read_label_table(path))
    except InputError:
        return False  # a broken scan: it is tried, and recorded as failed


def segment_folder(
    segmenter: Segmenter,
    inputs: Sequence[str | Path],
    out: str | Path,
    prompts: Sequence[str],
    *,
    multilabel: bool = False,
    resume: bool = False,
    frame: int | None = None,
    on_done: Callable[[dict[str, Any]], None] | None = None,
    debug: bool = False,
) -> list[dict[str, Any]]:
    """Segments every scan; `<out>/report.json` has one entry per study, rewritten after each.

    Where the only scan fails, no report is begun for it.

    What an earlier run left in the report stays there until a scan of the same name is segmented again.

    Args:
        segmenter: Keeps the model between scans.
        inputs: Files and folders.
        out: Where masks go.
        prompts: For all of them.
        multilabel: One map of ids instead of a mask per prompt.
        resume: Pass over studies that the report calls done with the same prompts, model, settings and scan, and
            whose masks are there.
        frame: Which volume of 4-D files, from 0.
        on_done: Called with each entry.
        debug: Let errors that are not the user's through, with their traceback.

    Returns:
        The entries of this run: `name`, `status` (`done`, `failed`), `masks`, `structures`, `seconds`, `error`, and
        what decided the masks: `prompts`, `multilabel`, `model`, `settings`, `scan`.

    Raises:
        InputError: Before anything runs: a folder that cannot be written, prompts or scans whose masks would have the
            same name, prompts that cannot be embedded, a mask that would overwrite a scan, or a report that cannot be
            read.
        OutputError: A mask or the report cannot be written.
    """
    check_output_folder(out)
    out, scans = Path(out), find_scans(inputs)
    _check_outputs(segmenter, scans, out, prompts, multilabel)
    report_path = out / "report.json"
    before = _previous(report_path)
    request = {
        "prompts": list(prompts),
        "multilabel": multilabel,
        "model": model_fingerprint(segmenter.model),
        "settings": {
            "overlap": segmenter.overlap,
            "precision": segmenter.precision,
            "frame": frame,
            "processor": segmenter.processor.settings(),
        },
    }
    entries, report, embedded = [], dict(before), False
    for scan in scans:
        name = stem(scan)
        wanted = {"name": name, **request, "scan": scan_identity(scan)}
        old = before.get(name)
        if resume and old and _complete(old, out, wanted):
            entry = {**old, "skipped": True}
        else:
            if not embedded:  # what cannot be embedded is said once, not for every scan
                embed_prompts(segmenter.understand(prompts), segmenter.model)
                embedded = True
            entry = _one(segmenter, scan, out, wanted, debug)
        entries.append(entry)
        report[name] = entry
        if entry["status"] == "done" or len(scans) > 1 or before:
            with atomic_write(report_path, "the report") as temporary:
                temporary.write_text(json.dumps({"studies": list(report.values())}, indent=1) + "\n")
        if on_done is not None:
            on_done(entry)
    return entries


def _check_outputs(
    segmenter: Segmenter, scans: Sequence[Path], out: Path, prompts: Sequence[str], multilabel: bool
) -> None:
    """No mask may replace a scan, nor another scan's mask (`a` with `b_liver`, `a_b` with `liver`)."""
    understood, owners = segmenter.understand(prompts), dict[Path, Path]()
    for scan in scans:
        for path in mask_paths(out, file_part(stem(scan)), understood, multilabel=multilabel):
            other = owners.setdefault(path, scan)
            if other is not scan:
                raise InputError(
                    f"two scans would both write {path.name}", where=f"{other} and {scan}", hint="rename one"
                )
    refuse_to_overwrite(scans, list(owners))


def _one(segmenter: Segmenter, scan: Path, out: Path, request: dict[str, Any], debug: bool) -> dict[str, Any]:
    began = time.perf_counter()
    multilabel = request["multilabel"]
    try:
        result = segmenter.segment(scan, request["prompts"], frame=request["settings"]["frame"])
        paths = result.save(out, file_part(request["name"]), multilabel=multilabel)
        overlap = result.label_map()[2] if multilabel else None
    except OutputError:
        raise  # the next study could not be written either
    except InputError as error:
        return {**request, "status": "failed", "error": str(error)}
    except Exception as error:
        # whatever is wrong with one study, the others are not lost
        if debug:
            raise
        logger.debug("%s failed", scan, exc_info=True)
        first = (str(error).strip().splitlines() or [""])[0][:200]
        return {**request, "status": "failed", "error": f"{type(error).__name__}: {first}"}
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


def _complete(entry: dict[str, Any], out: Path, wanted: dict[str, Any]) -> bool:
    same = all(entry.get(key) == value for key, value in wanted.items())
    return same and entry.get("status") == "done" and all((out / mask).is_file() for mask in entry["masks"])


def _previous(path: Path) -> dict[str, dict[str, Any]]:
    if not path.is_file():
        return {}
    try:
        return {entry["name"]: entry for entry in json.loads(path.read_text())["studies"]}
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            "there is a report here that cannot be read", where=str(path), hint="move it away, or another folder"
        ) from error
