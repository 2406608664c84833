"""Segments many scans with one model: a broken study is recorded and skipped, and an interrupted run is resumed."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mome.atomic import check_output_folder
from mome.errors import InputError, OutputError
from mome.inference.fingerprint import model_fingerprint, scan_identity
from mome.inference.prepared import PreparedPrompts
from mome.inference.report import is_complete, read_report, write_report
from mome.inference.scans import find_scans
from mome.inference.segmenter import Segmenter
from mome.volumes import WRITERS
from mome.volumes.dicom import DEFAULT_DICOM, DicomOptions
from mome.volumes.mask_names import file_part, mask_paths, refuse_to_overwrite
from mome.volumes.scan_files import stem
from mome.volumes.writers.base import MaskWriter, one_file_per_structure

logger = logging.getLogger(__name__)


def segment_folder(
    segmenter: Segmenter,
    inputs: Sequence[str | Path],
    out: str | Path,
    prompts: Sequence[str],
    *,
    multilabel: bool = False,
    writer: str = "nifti",
    resume: bool = False,
    frame: int | None = None,
    dicom: DicomOptions = DEFAULT_DICOM,
    progress: Callable[[int, int], None] | None = None,
    on_done: Callable[[dict[str, Any]], None] | None = None,
    debug: bool = False,
) -> list[dict[str, Any]]:
    """Segments every scan and keeps `<out>/report.json` up to date with one entry per study.

    Entries of an earlier run stay in the report until a scan of the same name is segmented again. No report is begun
    where there is one scan only and it fails.

    Args:
        segmenter: The model; it is kept between scans.
        inputs: Files and folders.
        out: The folder for the masks.
        prompts: The prompts for all scans; they are understood and embedded once.
        multilabel: Write one map of ids per scan instead of a mask per prompt.
        writer: A name from `mome.volumes.WRITERS`.
        resume: Skip studies that the report calls done for the same prompts, model, settings and scan, and whose
            masks are there.
        frame: The volume to take from 4-D files, from 0.
        dicom: Which DICOM series are read and what is accepted.
        progress: Called with (tiles done, number of tiles) of the current scan.
        on_done: Called with each entry.
        debug: Raise errors that are not the user's, with their traceback, instead of recording them.

    Returns:
        The entries of this run: `name`, `status` (`done` or `failed`), `masks`, `structures`, `seconds`, `error`, and
        what determines the masks: `prompts`, `multilabel`, `writer`, `model`, `settings`, `scan`.

    Raises:
        InputError: Before any scan is segmented: the folder cannot be written, the report cannot be read, there is no
            such writer, a mask would overwrite a scan or another mask, or a prompt cannot be embedded.
        OutputError: A mask or the report cannot be written.
    """
    check_output_folder(out)
    out, scans = Path(out), find_scans(inputs)
    chosen: MaskWriter = WRITERS.build(writer)
    separate = one_file_per_structure(chosen, multilabel=multilabel)
    understood = segmenter.understand(prompts)
    _check_outputs(scans, out, [prompt.name for prompt in understood], chosen.ending, separate)
    report_path = out / "report.json"
    earlier = read_report(report_path)
    request = {
        "prompts": list(prompts),
        "multilabel": multilabel,
        "writer": writer,
        "model": model_fingerprint(segmenter.model),
        "settings": {
            "overlap": segmenter.overlap,
            "precision": segmenter.precision,
            "frame": frame,
            "dicom": asdict(dicom),
            "processor": segmenter.processor.settings(),
        },
    }
    entries, report = [], dict(earlier)
    prepared: PreparedPrompts | None = None
    for scan in scans:
        name = stem(scan)
        study = {"name": name, **request, "scan": scan_identity(scan)}
        if resume and name in earlier and is_complete(earlier[name], out, study):
            entry = {**earlier[name], "skipped": True}
        else:
            # Embedding waits for the first scan that needs it: a finished run is resumed without the text encoder.
            prepared = prepared or segmenter.prepare(understood)
            entry = _segment_study(segmenter, scan, out, prepared, study, chosen, dicom, progress, debug)
        entries.append(entry)
        report[name] = entry
        if entry["status"] == "done" or len(scans) > 1 or earlier:
            write_report(report_path, report)
        if on_done is not None:
            on_done(entry)
    return entries


def _check_outputs(scans: Sequence[Path], out: Path, names: list[str], ending: str, separate: bool) -> None:
    """Checks that no mask replaces a scan or another scan's mask (`a` with `b_liver`, and `a_b` with `liver`)."""
    owners: dict[Path, Path] = {}
    for scan in scans:
        for path in mask_paths(out, file_part(stem(scan)), names, ending=ending, separate=separate):
            other = owners.setdefault(path, scan)
            if other is not scan:
                raise InputError(
                    f"two scans would both write {path.name}", where=f"{other} and {scan}", hint="rename one"
                )
    refuse_to_overwrite(scans, list(owners))


def _segment_study(
    segmenter: Segmenter,
    scan: Path,
    out: Path,
    prompts: PreparedPrompts,
    study: dict[str, Any],
    writer: MaskWriter,
    dicom: DicomOptions,
    progress: Callable[[int, int], None] | None,
    debug: bool,
) -> dict[str, Any]:
    """Segments one scan, saves its masks and returns its entry of the report."""
    began = time.perf_counter()
    multilabel = study["multilabel"]
    try:
        writer.check_source(scan)
        result = segmenter.segment(scan, prompts, frame=study["settings"]["frame"], dicom=dicom, progress=progress)
        paths = result.save(out, file_part(study["name"]), multilabel=multilabel, writer=study["writer"])
        overlap = result.label_map()[2] if multilabel else None
    except OutputError:
        raise  # The next study could not be written either.
    except InputError as error:
        return {**study, "status": "failed", "error": str(error)}
    except Exception as error:  # An error of one study must not lose the others.
        if debug:
            raise
        logger.debug("%s failed", scan, exc_info=True)
        first_line = (str(error).strip().splitlines() or [""])[0][:200]
        return {**study, "status": "failed", "error": f"{type(error).__name__}: {first_line}"}
    return {
        **study,
        "status": "done",
        "masks": [path.name for path in paths],
        "structures": result.summary(),
        "overlapping_voxels": overlap,
        "notes": list(result.notes),
        "seconds": round(time.perf_counter() - began, 2),
        "phases": result.seconds,
    }
