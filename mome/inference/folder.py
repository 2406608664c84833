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
from mome.inference.fingerprint import model_fingerprint, predictor_settings, scan_identity
from mome.inference.prepared import PreparedPrompts
from mome.inference.report import Report, changed_masks, file_sha256, is_complete
from mome.inference.scans import find_scans
from mome.inference.segmenter import Segmenter
from mome.inference.statistics import statistics_name, write_statistics, write_table
from mome.temporary_names import remove_stale_parts
from mome.volumes.dicom import DEFAULT_DICOM, DicomOptions
from mome.volumes.mask_names import file_part, mask_paths, refuse_to_overwrite
from mome.volumes.scan_files import scan_ending, stem
from mome.volumes.writers.base import MaskWriter, build_writer, one_file_per_structure

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
    overwrite: bool = False,
    frame: int | None = None,
    dicom: DicomOptions = DEFAULT_DICOM,
    progress: Callable[[int, int], None] | None = None,
    on_done: Callable[[dict[str, Any]], None] | None = None,
    debug: bool = False,
    statistics: bool = False,
) -> list[dict[str, Any]]:
    """Segments every scan and keeps `<out>/report.json` up to date with one entry per study.

    Entries of an earlier run stay in the report until a scan of the same name is segmented again. No report is begun
    where there is one scan only and it fails. Several processes may write into one folder; each keeps the entries of
    the others. Temporary files that a killed run left in the folder are removed.

    Args:
        segmenter: The model; it is kept between scans.
        inputs: Files and folders.
        out: The folder for the masks.
        prompts: The prompts for all scans; they are understood and embedded once.
        multilabel: Write one map of ids per scan instead of a mask per prompt.
        writer: A name from `mome.volumes.WRITERS`.
        resume: Skip studies that the report calls done for the same prompts, model, settings and scan, and whose
            masks are there. Masks that somebody has corrected are kept, with a note.
        overwrite: Replace masks of another scan, model or setting, masks that somebody has changed, and files that the
            report does not know. Without it, and without `resume`, only masks that the same request would make again
            are replaced.
        frame: The volume to take from 4-D files, from 0.
        dicom: Which DICOM series are read and what is accepted.
        progress: Called with (tiles done, number of tiles) of the current scan.
        on_done: Called with each entry.
        debug: Raise errors that are not the user's, with their traceback, instead of recording them.
        statistics: Measure every mask on its scan: `<scan>_statistics.json` per study, and `statistics.csv` with a row
            per study and structure of the report.

    Returns:
        The entries of this run: `name`, `status` (`done` or `failed`), `masks`, `structures`, `seconds`, `error`, and
        what determines the masks: `prompts`, `multilabel`, `writer`, `model`, `settings`, `scan`.

    Raises:
        InputError: Before any scan is segmented: the folder cannot be written, the report cannot be read, there is no
            such writer, a mask would overwrite a scan, another scan's mask or a file of unknown origin, or a prompt
            cannot be embedded.
        OutputError: A mask or the report cannot be written.
    """
    check_output_folder(out)
    out, scans = Path(out), find_scans(inputs)
    chosen = build_writer(writer)
    separate = one_file_per_structure(chosen, multilabel=multilabel)
    understood = segmenter.understand(prompts)
    owners = _check_outputs(scans, out, [prompt.name for prompt in understood], chosen.ending, separate)
    _check_dicom_options(scans, dicom)
    report = Report(out / "report.json")
    request = {
        "prompts": list(prompts),
        "multilabel": multilabel,
        "writer": writer,
        "model": model_fingerprint(segmenter.model),
        "settings": {
            "overlap": segmenter.overlap,
            "precision": segmenter.precision,
            "exact": segmenter.exact,
            "predictor": predictor_settings(segmenter.predictor, segmenter.model),
            "frame": frame,
            "dicom": asdict(dicom),
            "processor": segmenter.processor.settings(),
            **({"postprocess": segmenter.postprocess} if segmenter.postprocess else {}),
        },
        **({"statistics": True} if statistics else {}),
    }
    if not (resume or overwrite):
        _refuse_masks_of_others(owners, report, request)
    remove_stale_parts(out)
    entries = []
    prepared: PreparedPrompts | None = None
    for scan in scans:
        name = stem(scan)
        study = {"name": name, **request, "scan": scan_identity(scan)}
        if resume:  # another process may have finished the scan meanwhile
            report.refresh()
        measured = not statistics or (out / statistics_name(file_part(name))).is_file()
        if resume and measured and name in report.entries and is_complete(report.entries[name], out, study):
            entry = _kept(report.entries[name], out)
        else:
            # Embedding waits for the first scan that needs it: a finished run is resumed without the text encoder.
            prepared = prepared or segmenter.prepare(understood)
            entry = _segment_study(segmenter, scan, out, prepared, study, chosen, dicom, progress, debug)
        entries.append(entry)
        if entry["status"] == "done" or len(scans) > 1 or report.entries:
            report.add(name, entry)
        if on_done is not None:
            on_done(entry)
    if statistics:
        report.refresh()
        done = [name for name, entry in report.entries.items() if entry.get("statistics") and entry["status"] == "done"]
        write_table(out, [statistics_name(file_part(name)) for name in done])
    return entries


def _check_outputs(scans: Sequence[Path], out: Path, names: list[str], ending: str, separate: bool) -> dict[Path, Path]:
    """Returns the scan of every mask that will be written.

    Raises:
        InputError: A mask would replace a scan, or the mask of another scan of this run (`a` with the prompt
            `b_liver`, and `a_b` with `liver`).
    """
    owners: dict[Path, Path] = {}
    for scan in scans:
        for path in mask_paths(out, file_part(stem(scan)), names, ending=ending, separate=separate):
            other = owners.setdefault(path, scan)
            if other is not scan:
                raise InputError(
                    f"two scans would both write {path.name}", where=f"{other} and {scan}", hint="rename one"
                )
    refuse_to_overwrite(scans, list(owners))
    return owners


def _check_dicom_options(scans: Sequence[Path], dicom: DicomOptions) -> None:
    """Checks that options which only the DICOM reader uses concern at least one scan.

    Raises:
        InputError: `allow_gaps` or `allow_damaged` is set, and every scan is a file of another format.
    """
    named = [name for name in ("allow_gaps", "allow_damaged") if getattr(dicom, name)]
    if named and all(scan_ending(scan) is not None and not scan.is_dir() for scan in scans):
        option = "--" + named[0].replace("_", "-")
        raise InputError(f"{option} concerns DICOM series, and no scan here is one", hint=f"leave out {option}")


def _refuse_masks_of_others(owners: dict[Path, Path], report: Report, request: dict[str, Any]) -> None:
    """Checks that the masks which are there already are of the same scans, model and settings.

    Raises:
        InputError: A file would be replaced that is of another scan, model or setting, that was changed after it was
            written, or that the report does not know.
    """
    same = ("model", "settings")  # other prompts and another form of the masks lose nothing
    for path, scan in owners.items():
        if not path.exists():
            continue
        entry = report.entries.get(stem(scan), {})
        masks = entry.get("masks")
        if entry.get("scan") == scan_identity(scan) and isinstance(masks, list) and path.name in masks:
            if path.name in changed_masks(entry, path.parent):
                raise InputError(
                    "the mask was changed after it was written, and would be replaced",
                    where=str(path),
                    hint="--resume keeps it, --overwrite (in Python overwrite=True) replaces it",
                )
            if all(entry.get(key) == request[key] for key in same):
                continue
            other = "model" if entry.get("model") != request["model"] else "setting"
            raise InputError(
                f"the mask is there already, made with another {other}",
                where=str(path),
                hint="--overwrite (in Python overwrite=True), or another folder",
            )
        raise InputError(
            "the file is there already, and is not a mask of this scan",
            where=f"{path}, of {scan}",
            hint="--overwrite (in Python overwrite=True), --resume, or another folder",
        )


def _kept(entry: dict[str, Any], out: Path) -> dict[str, Any]:
    """Returns the entry of a study that is finished, with a note on masks that somebody has changed since."""
    notes, changed = entry["notes"], changed_masks(entry, out)
    if changed:
        note = f"changed after they were written, and kept; volumes are those before the change: {', '.join(changed)}"
        notes = [*notes, *([] if note in notes else [note])]
    return {**entry, "notes": notes, "skipped": True}


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
        result = segmenter.segment(
            scan,
            prompts,
            frame=study["settings"]["frame"],
            dicom=dicom,
            progress=progress,
            statistics=study.get("statistics", False),
        )
        result.model_version = study["model"]
        paths = result.save(out, file_part(study["name"]), multilabel=multilabel, writer=study["writer"])
        overlap = result.label_map()[2] if multilabel else None
        if result.statistics is not None:
            scan_name = file_part(study["name"])
            write_statistics(out / statistics_name(scan_name), study["name"], result.statistics)
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
        "mask_bytes": [path.stat().st_size for path in paths],
        "mask_sha256": [file_sha256(path) for path in paths],
        "structures": result.summary(),
        "overlapping_voxels": overlap,
        "notes": list(result.notes),
        "seconds": round(time.perf_counter() - began, 2),
        "phases": result.seconds,
    }
