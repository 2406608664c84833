"""Routes of jobs: upload, state, progress, cancel, result, delete."""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Path, Query, Request
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse

from mome.errors import InputError
from mome.server.http_errors import HttpError, no_such_job
from mome.server.job_queue import JobQueue
from mome.server.results import check_formats, formats, media_type, result_file
from mome.server.store import ENDED, Job
from mome.server.upload import Fields, Upload, receive_upload

router = APIRouter(tags=["jobs"])

_SWITCHES = ("allow_gaps", "allow_damaged", "statistics")
_FIELDS = ("prompt", "model", "output", "frame", "series", *_SWITCHES)
_MOST_PROMPTS = 500
_LONGEST_PROMPT = 500

_UPLOAD_FORM = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["prompt", "file"],
                    "properties": {
                        "prompt": {"type": "array", "items": {"type": "string"}, "description": "a structure"},
                        "model": {"type": "string", "description": "of GET /capabilities; else chosen by the prompts"},
                        "output": {"type": "array", "items": {"type": "string"}, "description": "a format"},
                        "frame": {"type": "integer", "description": "the volume of a 4-D file, from 0"},
                        "series": {"type": "string", "description": "the DICOM series: its number or UID"},
                        **{name: {"type": "boolean"} for name in _SWITCHES},
                        "file": {
                            "type": "array",
                            "items": {"type": "string", "format": "binary"},
                            "description": "one NIfTI, NRRD or MetaImage file, a zip of DICOM files, or DICOM files",
                        },
                    },
                }
            }
        },
    }
}

JobId = Annotated[str, Path(description="the id that POST /jobs returned")]


def queue_of(request: Request) -> JobQueue:
    """Returns the queue of the server that received a request."""
    queue: JobQueue = request.app.state.queue
    return queue


@router.post("/jobs", status_code=202, openapi_extra=_UPLOAD_FORM)
async def submit(request: Request) -> JSONResponse:
    """Uploads a scan with its prompts and appends a job to the queue.

    Fields that stand before the file are checked before the file is received.
    """
    queue = queue_of(request)
    async with queue.place():

        async def before_file(fields: Fields) -> None:
            if "prompt" in fields:
                outputs = check_formats(fields.get("output", []))
                await queue.check(_prompts(fields), outputs, model=_model(fields))

        upload = await receive_upload(
            request,
            queue.folders,
            queue.settings,
            file_fields=("file",),
            other_fields=_FIELDS,
            before_file=before_file,
        )
        job = await accept(queue, upload, _prompts, upload.fields)
    return JSONResponse(queue.snapshot(job), status_code=202, headers={"Location": f"/jobs/{job.id}"})


async def accept(queue: JobQueue, upload: Upload, prompts_of: Any, fields: Fields, **more: Any) -> Job:
    """Checks a request and appends its job to the queue; the upload is removed if that fails.

    Args:
        queue: The queue.
        upload: The upload.
        prompts_of: Returns the prompts of the fields.
        fields: The form.
        more: Further options of the job.

    Raises:
        InputError: A field is wrong.
        HttpError: The request cannot be served.
    """
    try:
        prompts, outputs = prompts_of(fields), check_formats(fields.get("output", []))
        options = {**_options(fields), **more}
        await queue.check(prompts, outputs, upload, options["model"])
        return queue.submit(upload, prompts, outputs, options)
    except BaseException:
        queue.folders.remove(upload.folder)
        raise


@router.get("/jobs/{job_id}")
async def state(request: Request, job_id: JobId) -> JSONResponse:
    """Returns the state, progress, error or results of a job."""
    queue = queue_of(request)
    return JSONResponse(queue.snapshot(find(queue, job_id)))


@router.get("/jobs/{job_id}/events", response_class=StreamingResponse)
async def events(request: Request, job_id: JobId) -> StreamingResponse:
    """Streams the states of a job as lines of JSON (application/x-ndjson): at each change and every 15 s.

    The last line of a job that has ended holds everything that GET /jobs/{id} returns.
    """
    queue = queue_of(request)
    job = find(queue, job_id)

    async def lines() -> AsyncIterator[bytes]:
        async for snapshot in queue.watch(job.id):
            if snapshot["state"] not in ENDED:
                snapshot = {name: snapshot[name] for name in ("id", "state", "position", "progress")}
            yield json.dumps(snapshot).encode() + b"\n"

    return StreamingResponse(lines(), media_type="application/x-ndjson")


@router.post("/jobs/{job_id}/cancel")
async def cancel(request: Request, job_id: JobId) -> JSONResponse:
    """Cancels a job: at once where it waits, at the next tile where it runs. One that has ended stays as it is."""
    queue = queue_of(request)
    job = find(queue, job_id)
    queue.cancel(job.id)
    return JSONResponse(queue.snapshot(find(queue, job_id)))


@router.get("/jobs/{job_id}/result", response_class=FileResponse)
async def result(
    request: Request,
    job_id: JobId,
    format: Annotated[str, Query(description=f"one of {', '.join(formats())}")] = "nifti",
) -> FileResponse:
    """Returns a result as a file, or as a zip where a format has several files. Ranges may be asked for."""
    queue = queue_of(request)
    job = find(queue, job_id)
    if job.state != "done":
        raise HttpError(409, f"the job is {job.state}; it has no result", hint=f"/jobs/{job.id}/events")
    name = format if format in formats() else None
    path = None if name is None else result_file(queue.folders.job(job.id), name)
    if path is None:
        made = ", ".join((job.summary or {}).get("formats", {}))
        raise HttpError(
            404,
            f"the job has no result in the format {format[:40]!r}",
            where="format",
            hint=f"it has {made}; others are asked for with the field output of POST /jobs",
        )
    return FileResponse(path, media_type=media_type(path), filename=f"mome_{path.name}")


@router.delete("/jobs/{job_id}", status_code=204)
async def delete(request: Request, job_id: JobId) -> Response:
    """Deletes a job and its files. One that runs is cancelled first."""
    queue = queue_of(request)
    queue.delete(find(queue, job_id).id)
    return Response(status_code=204)


def find(queue: JobQueue, job_id: str) -> Job:
    """Returns a job.

    Raises:
        HttpError: There is none of this id; status 404.
    """
    job = queue.store.get(job_id) if is_uuid(job_id) else None
    if job is None:
        raise no_such_job()
    return job


def is_uuid(text: str) -> bool:
    """Says whether a text is a UUID as this server writes them."""
    try:
        return str(uuid.UUID(text)) == text
    except ValueError:
        return False


def check_prompts(prompts: list[str]) -> list[str]:
    """Returns the prompts of a request.

    Raises:
        InputError: There is none, there are too many, or one is too long.
    """
    if not prompts:
        raise InputError("no prompt was given", where="the field prompt", hint="-F prompt=mandible")
    if len(prompts) > _MOST_PROMPTS:
        raise InputError(f"more than {_MOST_PROMPTS} prompts were given", where="the field prompt")
    if any(len(prompt) > _LONGEST_PROMPT for prompt in prompts):
        raise InputError(f"a prompt has more than {_LONGEST_PROMPT} characters", where="the field prompt")
    return prompts


def _prompts(fields: Fields) -> list[str]:
    return check_prompts(fields.get("prompt", []))


def _model(fields: Fields) -> str | None:
    return fields["model"][-1] if "model" in fields else None


def _options(fields: Fields) -> dict[str, Any]:
    """Returns how the scan is read, and the model.

    Raises:
        InputError: A value is of another type.
    """
    options: dict[str, Any] = {"model": _model(fields)}
    for name in _SWITCHES:
        value = fields.get(name, ["false"])[-1].lower()
        if value not in ("true", "false", "1", "0"):
            raise InputError(f"{name} is true or false, got {value[:40]!r}", where=f"the field {name}")
        options[name] = value in ("true", "1")
    if "frame" in fields:
        text = fields["frame"][-1]
        if not text.isascii() or not text.isdigit() or len(text) > 6:
            raise InputError(f"frame is a whole number from 0, got {text[:40]!r}", where="the field frame")
        options["frame"] = int(text)
    if "series" in fields:
        options["series"] = fields["series"][-1][:64]
    return options
