"""`jobs.json`: a batch in which every study has prompts and options of its own.

```json
{"jobs": [
  {"scan": "a.nii.gz", "prompts": ["liver", "spleen"]},
  {"scan": "/data/study2", "prompts": ["mandible"], "name": "patient2", "series": 2, "multilabel": true}
]}
```
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mome.errors import InputError, did_you_mean
from mome.inference.folder import segment_studies
from mome.inference.output_checks import check_names
from mome.inference.segmenter import Segmenter
from mome.inference.study import Study
from mome.inference.study_files import checked_kinds
from mome.json_file import checked_object
from mome.text_file import RepeatedKeyError, read_text, without_repeated_keys
from mome.volumes.dicom import DEFAULT_DICOM, DicomOptions
from mome.volumes.mask_names import file_part
from mome.volumes.scan_files import stem
from mome.volumes.writers.base import build_writer

_MOST_JOBS = 100_000
_MOST_PROMPTS = 10_000
_MOST_BYTES = 64 << 20
_SHAPE = '{"jobs": [{"scan": "a.nii.gz", "prompts": ["liver"]}]}'
_KEYS = ("scan", "prompts", "name", "frame", "series", "allow_gaps", "allow_damaged", "multilabel", "writer")


def segment_jobs(
    segmenter: Segmenter,
    jobs: str | Path,
    out: str | Path,
    prompts: Sequence[str] = (),
    *,
    multilabel: bool = False,
    writer: str = "nifti",
    resume: bool = False,
    overwrite: bool = False,
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
    """Segments the studies of a jobs file; it is resumed and reported like a run over a folder.

    Args:
        segmenter: The model; it is kept between scans.
        jobs: The file; see `read_jobs`.
        out: The folder for the masks; no job writes elsewhere.
        prompts, multilabel, writer, frame, dicom: What holds for jobs that do not say it themselves.
        resume, overwrite, read_ahead, part, progress, on_done, debug, statistics, files: As for `segment_folder`.

    Raises:
        InputError: The file is none of jobs, or as for `segment_folder`.
        OutputError: As for `segment_folder`.
    """
    defaults = job_defaults(prompts, multilabel=multilabel, writer=writer, frame=frame, dicom=dicom)
    kinds = checked_kinds(files)
    studies = [replace(study, statistics=statistics, files=kinds) for study in read_jobs(jobs, defaults)]
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


def job_defaults(
    prompts: Sequence[str],
    *,
    multilabel: bool = False,
    writer: str = "nifti",
    frame: int | None = None,
    dicom: DicomOptions = DEFAULT_DICOM,
) -> dict[str, Any]:
    """Returns what holds for jobs that do not say it themselves, for `read_jobs`."""
    return {
        "prompts": list(prompts),
        "multilabel": multilabel,
        "writer": writer,
        "frame": frame,
        "series": dicom.series,
        "allow_gaps": dicom.allow_gaps,
        "allow_damaged": dicom.allow_damaged,
    }


def read_jobs(path: str | Path, defaults: dict[str, Any] | None = None) -> list[Study]:
    """Reads a jobs file: `{"jobs": [{"scan": …, "prompts": […]}, …]}`.

    The keys of a job are `scan` (a path as the user means it: absolute, or relative to the file's folder), `prompts` (a
    list of texts, which `defaults` may replace), and where wanted `name` (the name of the masks; the scan's name if it
    is missing), `frame`, `series`, `allow_gaps`, `allow_damaged`, `multilabel` and `writer`. The model and the settings
    of the network are those of the run.

    Args:
        path: The file, UTF-8.
        defaults: Values of keys that a job leaves out.

    Raises:
        InputError: The file cannot be read or is of another shape, a key is unknown or given twice, a value is of
            another type, a name is a path, or two jobs have one name. Scans are not opened: one that is missing fails
            when its turn comes.
    """
    path = Path(path)
    text = read_text(path, "the jobs file", limit=_MOST_BYTES)
    try:
        value = json.loads(text, object_pairs_hook=without_repeated_keys)
    except RepeatedKeyError as error:
        raise InputError(
            f"the jobs file has the key {error.args[0]!r:.80} twice in one job",
            where=str(path),
            hint="keep one of them",
        ) from error
    except (ValueError, RecursionError) as error:
        reason = "it nests too deeply" if isinstance(error, RecursionError) else str(error).splitlines()[0][:120]
        raise InputError(f"the jobs file is not valid JSON: {reason}", where=str(path), hint=_SHAPE) from error
    found = checked_object(value, "the jobs file", str(path), _SHAPE)
    _check_keys(found, ("jobs",), "the jobs file", path)
    jobs = found.get("jobs")
    if not isinstance(jobs, list) or not jobs:
        raise InputError(
            'the jobs file is not {"jobs": [job, …]}',
            where=str(path),
            hint='a job is {"scan": "a.nii.gz", "prompts": […]}',
        )
    if len(jobs) > _MOST_JOBS:
        raise InputError(
            f"the jobs file has {len(jobs):,} jobs; the limit is {_MOST_JOBS:,}", where=str(path), hint="split it"
        )
    studies = [_study(job, f"job {number}", path, defaults or {}) for number, job in enumerate(jobs, 1)]
    check_names(studies, hint='give each job a "name" of its own')
    return studies


def job_prompts(path: str | Path, prompts: Sequence[str] = ()) -> list[str]:
    """Returns the prompts of all jobs of a file, each once.

    Args:
        path: The file; see `read_jobs`.
        prompts: Those of jobs that name none.

    Raises:
        InputError: As for `read_jobs`.
    """
    studies = read_jobs(path, {"prompts": list(prompts)})
    return list(dict.fromkeys(prompt for study in studies for prompt in study.prompts))


def _study(job: Any, what: str, path: Path, defaults: dict[str, Any]) -> Study:
    if not isinstance(job, dict):
        raise InputError(f"{what} is no object in braces", where=str(path), hint='{"scan": "a.nii.gz", "prompts": […]}')
    _check_keys(job, _KEYS, what, path)
    values = {**defaults, **job}
    if "scan" not in job:
        raise InputError(f"{what} names no scan", where=str(path), hint='"scan": "a.nii.gz"')
    scan = path.parent / _text(values.get("scan"), f"{what}: scan", path)
    name = _name(values["name"], what, path) if "name" in values else stem(scan)
    try:
        file_part(name)
    except InputError as error:
        raise InputError(f"{what}: {error.what}", where=str(path), hint='give it a "name"') from error
    writer = _text(values.get("writer", "nifti"), f"{what}: writer", path)
    try:
        build_writer(writer)
    except InputError as error:
        raise InputError(f"{what}: {error.what}", where=str(path), hint=error.hint) from error
    series = values.get("series")
    if series is not None and not _is_count(series):
        series = _text(series, f"{what}: series", path)
    frame = values.get("frame")
    if frame is not None and not _is_count(frame):
        raise InputError(f"{what}: frame is a whole number from 0, got {frame!r:.60}", where=str(path))
    flags = {
        key: _flag(values.get(key, False), f"{what}: {key}", path)
        for key in ("allow_gaps", "allow_damaged", "multilabel")
    }
    return Study(
        name,
        scan,
        _prompts(values.get("prompts"), what, path),
        flags["multilabel"],
        writer,
        frame,
        DicomOptions(series=series, allow_gaps=flags["allow_gaps"], allow_damaged=flags["allow_damaged"]),
    )


def _check_keys(found: dict[str, Any], known: Sequence[str], what: str, path: Path) -> None:
    for key in found:
        if key not in known:
            raise InputError(
                f"{what} has no key {key!r:.60}{did_you_mean(key[:60], known)}",
                where=str(path),
                hint="keys: " + ", ".join(known),
            )


def _prompts(value: Any, what: str, path: Path) -> tuple[str, ...]:
    right = isinstance(value, list) and all(isinstance(prompt, str) and prompt.strip() for prompt in value)
    if not right or not value or len(value) > _MOST_PROMPTS:
        got = "none" if value in (None, []) else f"{value!r:.60}"
        raise InputError(
            f"{what}: prompts is a list of texts, got {got}", where=str(path), hint='write "prompts": ["liver"]'
        )
    return tuple(value)


def _name(value: Any, what: str, path: Path) -> str:
    """Returns the name of a job's masks, which is no path: masks go into the folder of the run."""
    name = _text(value, f"{what}: name", path)
    if name.startswith(".") or any(mark in name for mark in "/\\:") or not name.isprintable():
        raise InputError(
            f"{what}: the name {name[:60]!r} is none of a file: masks go into the folder of --out",
            where=str(path),
            hint="a name has no slashes, no colon and no leading dot",
        )
    return name


def _text(value: Any, what: str, path: Path) -> str:
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        raise InputError(f"{what} is a text, got {value!r:.60}", where=str(path))
    return value


def _flag(value: Any, what: str, path: Path) -> bool:
    if not isinstance(value, bool):
        raise InputError(f"{what} is true or false, got {value!r:.60}", where=str(path))
    return value


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
