"""Segments many scans with one model: a broken study is recorded and skipped, and an interrupted run is resumed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mome.atomic import check_output_folder
from mome.errors import InputError
from mome.inference.batch import Batch
from mome.inference.claims import TO_WRITE, Claims
from mome.inference.disagreement import watched_routers
from mome.inference.output_checks import (
    check_dicom_options,
    check_names,
    check_outputs,
    refuse_corrected_masks,
    refuse_files_of_others,
    refuse_masks_of_others,
)
from mome.inference.report import Report
from mome.inference.scans import find_named_scans
from mome.inference.segmenter import Segmenter
from mome.inference.statistics import CSV_NAME, is_table, scan_of_statistics, statistics_name, write_table
from mome.inference.study import Requests, Study
from mome.inference.study_files import checked_kinds
from mome.temporary_names import remove_stale_parts
from mome.volumes.dicom import DEFAULT_DICOM, DicomOptions
from mome.volumes.mask_names import file_part
from mome.volumes.writers.base import one_file_per_structure

# All masks of a folder are read for the table, which takes minutes where they are many.
_TABLE_WAIT_S = 3600.0


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
    recursive: bool = False,
    frame: int | None = None,
    dicom: DicomOptions = DEFAULT_DICOM,
    read_ahead: bool | None = None,
    part: tuple[int, int] = (0, 1),
    progress: Callable[[int, int], None] | None = None,
    on_done: Callable[[dict[str, Any]], None] | None = None,
    debug: bool = False,
    statistics: bool = False,
    files: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Segments every scan and keeps `<out>/report.json` up to date with one entry per study.

    `<out>/problems.json` lists the studies that failed or are doubtful (see `mome.inference.problems`); it is removed
    once there are none. Entries of an earlier run stay in the report until a scan of the same name is segmented again;
    the new entry then keeps, as `earlier`, what is known of files that it did not replace. No report is begun where
    there is one scan only and it fails. Several processes may write into one folder; each keeps the entries of the
    others, and with `resume` they share the studies: each is segmented by one of them, and those of a process that is
    killed are taken over. Temporary files that a killed run left in the folder are removed.

    Args:
        segmenter: The model; it is kept between scans.
        inputs: Files, folders and ZIP archives.
        out: The folder for the masks.
        prompts: The prompts for all scans; they are understood and embedded once.
        multilabel: Write one map of ids per scan instead of a mask per prompt.
        writer: A name from `mome.volumes.WRITERS`.
        resume: Skip studies that the report calls done for the same prompts, model, settings and scan, and whose
            masks are there. Masks that somebody has corrected are kept, with a note; where they would have to be made
            again, as for other prompts, the run is refused. A mask that is corrected while the run is under way is
            kept, too, with or without `resume`, and its study fails. Without `resume`, the same holds for a file that
            somebody puts in a mask's place meanwhile.
        overwrite: Replace masks of another scan, model or setting, maps of other structures, masks that somebody has
            changed, and files that the report does not know. Without it, and without `resume`, only masks that the same
            request would make again are replaced.
        recursive: Also search the folders inside of a folder; a scan is then named by its path below the folder.
        frame: The volume to take from 4-D files, from 0.
        dicom: Which DICOM series are read and what is accepted.
        read_ahead: Read the next scan, and write the last masks, while the network is at work. This needs the memory of
            one more scan: 5 bytes per voxel, and 4 for each voxel of its network grid; where they are not free, the
            next scan is read afterwards. None stands for yes, unless the segmenter has a memory limit.
        part: (index, number) of this process among processes that share the studies with `resume`.
        progress: Called with (tiles done, number of tiles) of the current scan.
        on_done: Called with each entry, in the order in which the studies were begun.
        debug: Raise errors that are not the user's, with their traceback, instead of recording them.
        files: Kinds of files beside the masks: `html`, `preview`, `probabilities`, `entropy`, `disagreement`; see
            `mome.inference.study_files`. They are named in the entry's `files`.
        statistics: Measure every mask on its scan: `<scan>_statistics.json` per study, and `statistics.csv` with a row
            per study and structure of the report.

    Returns:
        The entries of this run: `name`, `status` (`done` or `failed`), `masks`, `structures`, `seconds`, `phases`
        (phase → seconds of work), `notes`, `error`, `failure` (`phase`, `reason`, `remedy`, and whether it is a
        `bug` of ours), `peak_memory_bytes` (of the process while the study was in work; see
        `mome.inference.peak_memory`), `versions`, `ended`, and what determines the masks: `prompts`, `multilabel`,
        `writer`, `model`, `settings`, `scan`. `skipped` is true where the entry is that of an earlier run or another
        process. The `volume_ml` and `mean_hu` of a structure, and its statistics, are those of its whole mask. With
        `multilabel`, `overlapping_voxels` lie in several masks, and `voxels_in_map` and `volume_ml_in_map` of a
        structure are what the map holds of it, on the scan's grid: without the voxels that smaller structures cover.

    Raises:
        InputError: Before any scan is segmented: the folder cannot be written, the report cannot be read, there is no
            such writer, a mask would overwrite a scan, another scan's mask, a map of other structures or a file of
            unknown origin, or a prompt cannot be embedded. Later: without `resume` and `overwrite`, a mask would
            replace another one that another run has written meanwhile; the studies before it are finished.
        OutputError: A mask or the report cannot be written.
    """
    check_output_folder(out)
    studies = [
        Study(scan.name, scan.path, tuple(prompts), multilabel, writer, frame, dicom, statistics, checked_kinds(files))
        for scan in find_named_scans(inputs, recursive=recursive, leave_out=Path(out))
    ]
    return segment_studies(
        segmenter,
        studies,
        out,
        resume=resume,
        overwrite=overwrite,
        read_ahead=read_ahead,
        part=part,
        progress=progress,
        on_done=on_done,
        debug=debug,
    )


def segment_studies(
    segmenter: Segmenter,
    studies: Sequence[Study],
    out: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    read_ahead: bool | None = None,
    part: tuple[int, int] = (0, 1),
    progress: Callable[[int, int], None] | None = None,
    on_done: Callable[[dict[str, Any]], None] | None = None,
    debug: bool = False,
) -> list[dict[str, Any]]:
    """Segments studies, each with prompts and options of its own; see `segment_folder`.

    Raises:
        InputError, OutputError: As for `segment_folder`.
    """
    check_output_folder(out)
    out, studies = Path(out), list(studies)
    index, number = part
    if not (isinstance(index, int) and isinstance(number, int) and 0 <= index < number):
        raise InputError(f"part is (index, number of processes) with 0 <= index < number, got {part!r:.60}")
    if number > 1 and not resume:
        raise InputError("processes share studies through the report", hint="part=… together with resume=True")
    for study in {(study.writer, study.multilabel): study for study in studies}.values():
        one_file_per_structure(study.mask_writer(), multilabel=study.multilabel)
    check_names(studies)
    understood = {study.prompts: segmenter.understand(study.prompts) for study in studies}
    structures = [[prompt.name for prompt in understood[study.prompts]] for study in studies]
    owners = check_outputs(studies, structures, out)
    check_dicom_options(studies)
    report = Report(out / "report.json")
    requests = Requests(segmenter)
    if any("disagreement" in study.files for study in studies):
        watched_routers(segmenter.model, segmenter.predictor)
    if not (resume or overwrite):
        named = {study.name: names for study, names in zip(studies, structures, strict=True)}
        refuse_masks_of_others(owners, named, report, requests)
        refuse_files_of_others(studies, structures, out, report)
    if resume:
        refuse_corrected_masks(owners, out, report, requests)
    remove_stale_parts(out)
    if read_ahead is None:
        read_ahead = getattr(segmenter, "memory", None) is None
    batch = Batch(
        segmenter,
        studies,
        understood,
        requests,
        report,
        resume=resume,
        overwrite=overwrite,
        part=part,
        read_ahead=read_ahead,
        progress=progress,
        on_done=on_done,
        debug=debug,
    )
    entries = batch.run()
    if out.is_dir() and (is_table(out / CSV_NAME) or any(study.statistics for study in studies)):
        _write_table(report, out)
    return entries


def _write_table(report: Report, out: Path) -> None:
    """Writes the table of statistics; runs that end at the same time do so one after the other.

    Else a run that has read the report would replace the table of one that has added its studies since then.
    """
    with Claims(out, TO_WRITE).held(CSV_NAME, _TABLE_WAIT_S):
        report.refresh()
        names = _measured(report)
        if names or is_table(out / CSV_NAME):  # a run that failed leaves no table without a row
            write_table(out, names)


def _measured(report: Report) -> list[str]:
    """Returns the names of the files of statistics: those that are there, and those that should be."""
    found = []
    for name, entry in report.entries.items():
        file = statistics_name(file_part(name))
        is_expected = entry.get("statistics") is True and entry.get("status") == "done"
        if is_expected or scan_of_statistics(report.path.parent / file) is not None:
            found.append(file)
    return found
