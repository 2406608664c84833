"""Checks before a batch begins: no mask replaces a scan, the mask of another study, or a file of unknown origin."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mome.errors import InputError
from mome.inference.claims import TO_WRITE, WRITE_WAIT_S, Claims
from mome.inference.earlier_runs import files_of, run_that_wrote
from mome.inference.fingerprint import scan_identity
from mome.inference.report import Report, is_changed, is_complete, is_whole
from mome.inference.statistics import scan_of_statistics
from mome.inference.study import Requests, Study
from mome.volumes.mask_names import check_different_names, refuse_to_overwrite
from mome.volumes.scan_files import scan_ending
from mome.volumes.writers.base import one_file_per_structure


def check_names(studies: Sequence[Study], hint: str = "rename one") -> None:
    """Checks that no two studies have one name.

    Args:
        studies: The studies.
        hint: What to do about two of one name.

    Raises:
        InputError: The masks of two studies would have the same name.
    """
    check_different_names(((study.name, study.scan) for study in studies), hint)


def check_outputs(studies: Sequence[Study], structures: Sequence[list[str]], out: Path) -> dict[Path, Study]:
    """Returns the study of every mask that will be written.

    Args:
        studies: The studies.
        structures: Names of the structures of each.
        out: The folder of the masks.

    Raises:
        InputError: A mask, or a file beside it, would replace a scan, or a file of another study (`a` with the prompt
            `b_liver`, and `a_b` with `liver`).
    """
    owners: dict[Path, Study] = {}
    others: dict[Path, Study] = {}  # of the files beside the masks
    for study, names in zip(studies, structures, strict=True):
        known = [(path, owners) for path in study.masks(out, names)]
        for path, held in known + [(path, others) for path in study.file_paths(out, names)]:
            other = held.setdefault(path, study)
            if other is not study:
                raise InputError(
                    f"two scans would both write {path.relative_to(out)}",
                    where=f"{other.scan} and {study.scan}",
                    hint="rename one",
                )
    refuse_to_overwrite([study.scan for study in studies], [*owners, *others])
    return owners


def check_dicom_options(studies: Sequence[Study]) -> None:
    """Checks that options which only the DICOM reader uses concern at least one scan.

    Raises:
        InputError: `allow_gaps` or `allow_damaged` is set, and every scan is a file of another format.
    """
    named = [name for name in ("allow_gaps", "allow_damaged") if any(getattr(s.dicom, name) for s in studies)]
    scans = [study.scan for study in studies]
    if named and all(scan_ending(scan) is not None and not scan.is_dir() for scan in scans):
        option = "--" + named[0].replace("_", "-")
        raise InputError(f"{option} concerns DICOM series, and no scan here is one", hint=f"leave out {option}")


def refuse_masks_of_others(
    owners: dict[Path, Study], structures: Mapping[str, Sequence[str]], report: Report, requests: Requests
) -> None:
    """Checks that the masks which are there already are of the same scans, model and settings.

    Args:
        owners: Mask → its study, as `check_outputs` returns them.
        structures: Study → names of its structures.
        report: The report in the folder of the masks.
        requests: What determines the masks.

    Raises:
        InputError: A file would be replaced that is of another scan, model or setting, that holds other structures,
            that was changed after it was written, or that the report does not know.
    """
    same = ("model", "settings")  # with a file per structure, other prompts lose nothing
    for path, study in owners.items():
        if not path.exists():
            continue
        entry, request = run_that_wrote(report.entries.get(study.name, {}), path.name), requests.of(study)
        if entry and entry.get("scan") == scan_identity(study.scan):
            if is_changed(entry, path):
                raise InputError(
                    "the mask was changed after it was written, and would be replaced",
                    where=str(path),
                    hint="--resume keeps it, --overwrite (in Python overwrite=True) replaces it",
                )
            if all(entry.get(key) == request[key] for key in same):
                _refuse_other_structures(path, study, structures[study.name], entry)
                continue
            other = "model" if entry.get("model") != request["model"] else "setting"
            raise InputError(
                f"the mask is there already, made with another {other}",
                where=str(path),
                hint="--overwrite (in Python overwrite=True), or another folder",
            )
        raise InputError(
            "the file is there already, and no report here says that it is a mask of this scan",
            where=f"{path}, of {study.scan}",
            hint="--overwrite (in Python overwrite=True), --resume, or another folder",
        )


def has_results(entry: dict[str, Any], study: Study, out: Path, request: dict[str, Any]) -> bool:
    """Says whether an entry answers a request, and its masks and all files beside them are in `out`.

    Args:
        entry: The entry of the study in the report.
        study: The study.
        out: The folder of the masks.
        request: `Requests.of_scan` of the study.
    """
    has_statistics = not study.statistics or (out / study.statistics_file).is_file()
    files = entry.get("files", []) if study.files else []
    has_files = isinstance(files, list) and all((out / str(name)).is_file() for name in files)
    return has_statistics and has_files and is_complete(entry, out, request)


def refuse_corrected_masks(owners: dict[Path, Study], out: Path, report: Report, requests: Requests) -> None:
    """Checks that a run that resumes makes no mask again that somebody has corrected.

    Args:
        owners, report, requests: As for `refuse_masks_of_others`.
        out: The folder of the masks.

    Raises:
        InputError: It would, because the study has to be segmented again. A mask that cannot be read is replaced.
    """
    unfinished: dict[str, bool] = {}
    writes = Claims(out, TO_WRITE)
    for path, study in owners.items():
        if study.name not in unfinished:
            unfinished[study.name] = not _is_finished(study, out, report, requests)
        # Masks of finished studies are kept; they are not read here.
        if not unfinished[study.name] or not _is_corrected(path, study, report):
            continue
        # Another run may have replaced the mask since the report was read, or be about to add its entry.
        with writes.held(study.name, WRITE_WAIT_S):
            report.refresh()
            unfinished[study.name] = not _is_finished(study, out, report, requests)
            is_lost = unfinished[study.name] and _is_corrected(path, study, report)
        if is_lost:
            raise InputError(
                "the mask was changed after it was written, and would be replaced",
                where=str(path),
                hint="move it away, or --overwrite (in Python overwrite=True) instead of --resume replaces it",
            )


def refuse_masks_corrected_meanwhile(study: Study, masks: Sequence[Path], report: Report, *, resume: bool) -> None:
    """Checks, just before masks are written, that nobody has corrected one or put a file there since the run began.

    Args:
        study: The study.
        masks: Its masks that will be written.
        report: The report in their folder, as it is now.
        resume: Replace files that the report does not know, which a run that was killed may have left.

    Raises:
        InputError: Somebody has.
    """
    entry = report.entries.get(study.name, {})
    for path in masks:
        if not resume and path.exists() and not run_that_wrote(entry, path.name):  # else, the run was refused
            raise InputError(
                "a file of this name was put there while this run was under way, and is kept",
                where=str(path),
                hint="move it away and use --resume, or --overwrite (in Python overwrite=True) replaces it",
            )
        if _is_corrected(path, study, report):
            raise InputError(
                "the mask was changed while this run was under way, and is kept",
                where=str(path),
                hint="move it away and use --resume, or --overwrite (in Python overwrite=True) replaces it",
            )


def _is_finished(study: Study, out: Path, report: Report, requests: Requests) -> bool:
    entry = report.entries.get(study.name)
    return entry is not None and has_results(entry, study, out, requests.of_scan(study))


def _is_corrected(path: Path, study: Study, report: Report) -> bool:
    """Says whether a mask was changed after it was written, and can be read."""
    return is_changed(run_that_wrote(report.entries.get(study.name, {}), path.name), path) and is_whole(path)


def _refuse_other_structures(path: Path, study: Study, names: Sequence[str], entry: dict[str, Any]) -> None:
    """Checks that a file of all structures would hold those that it holds now, and their overlaps.

    Raises:
        InputError: It would hold others, or would be a map of ids where each structure was whole, or the other way.
    """
    if one_file_per_structure(study.mask_writer(), multilabel=study.multilabel):
        return
    listed = entry.get("structures")
    held = [str(item.get("name")) for item in listed if isinstance(item, dict)] if isinstance(listed, list) else []
    if set(held) != set(names):
        difference = f"with other structures: {', '.join(held):.200}"
    elif entry.get("multilabel") != study.multilabel:
        difference = f"made {'without' if study.multilabel else 'with'} --multilabel"
    else:
        return
    raise InputError(
        f"the file is there already, {difference}",
        where=str(path),
        hint="--overwrite (in Python overwrite=True), or another folder",
    )


def refuse_files_of_others(
    studies: Sequence[Study], structures: Sequence[list[str]], out: Path, report: Report
) -> None:
    """Checks that the pages, previews, maps and statistics which are there already are of the same scans.

    Args:
        studies: The studies.
        structures: Names of the structures of each.
        out: The folder of the masks.
        report: The report in that folder.

    Raises:
        InputError: A file would be replaced that no earlier run wrote for this scan.
    """
    for study, names in zip(studies, structures, strict=True):
        scan = scan_identity(study.scan)
        known = files_of(report.entries.get(study.name, {}), scan)
        if study.statistics and scan_of_statistics(out / study.statistics_file) in (None, scan):
            known.add(study.statistics_file)  # files of earlier versions do not name their scan
        for path in (*study.file_paths(out, names), *([out / study.statistics_file] if study.statistics else ())):
            if path.exists() and path.relative_to(out).as_posix() not in known:
                raise InputError(
                    "the file is there already, and no report here says that it is of this scan",
                    where=f"{path}, of {study.scan}",
                    hint="--overwrite (in Python overwrite=True), --resume, or another folder",
                )
