"""Answers of `/infer/{model}`: waits for the job and sends its map of ids as the clients of MONAI Label read it."""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anyio
from fastapi import Request
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse
from starlette.background import BackgroundTask

from mome.server.http_errors import HttpError
from mome.server.job_queue import JobQueue
from mome.server.nrrd_map import map_ids
from mome.server.results import media_type, result_file
from mome.server.store import Job

_CHUNK = 1 << 20
_ASKS_EVERY_S = 1.0
OUTPUTS = ("image", "json", "all", "dicom_seg")


async def answer(
    request: Request, queue: JobQueue, job: Job, output: str, kind: str
) -> JSONResponse | FileResponse | StreamingResponse:
    """Waits for a job and returns its result; the job is deleted when that was sent, or when the client has gone.

    Args:
        request: The request.
        queue: The queue.
        job: The job.
        output: One of `OUTPUTS`.
        kind: The format of the job's result.

    Raises:
        HttpError: The job failed, was cancelled or was deleted, or the server stops.
    """
    try:
        ended = await _wait(request, queue, job.id)
        if ended is None and not queue.stopping.is_set():
            raise HttpError(409, "the job was deleted")
        if ended is None:
            raise HttpError(503, "the server stops", hint="try again later", retry_s=30)
        if ended.state == "failed" and ended.error is not None:
            raise HttpError(422, **ended.error)
        if ended.state != "done" or ended.summary is None:
            raise HttpError(409, "the job was cancelled")
        path = result_file(queue.folders.job(job.id), kind)
        assert path is not None
        params = _result_params(ended.summary, ended.request["options"].get("nrrd", {}).get("ids", {}))
    except BaseException:
        queue.delete(job.id)
        raise

    async def forget() -> None:  # a function that is not async would run in another thread
        queue.delete(job.id)

    after = BackgroundTask(forget)
    if output == "json":
        return JSONResponse(params, background=after)
    if output in ("image", "dicom_seg"):
        return FileResponse(path, media_type=media_type(path), filename=path.name, background=after)
    boundary = uuid.uuid4().hex
    # An extension of OHIF before 0.8.5 fails without the field `centroids`, which may be empty.
    before, behind = _around_image(boundary, {**params, "centroids": {}}, path)

    async def parts() -> AsyncIterator[bytes]:
        try:
            yield before
            async with await anyio.open_file(path, "rb") as file:
                while part := await file.read(_CHUNK):
                    yield part
            yield behind
        finally:  # the background task does not run where the client has gone
            queue.delete(job.id)

    return StreamingResponse(
        parts(),
        media_type=f"multipart/form-data; boundary={boundary}",
        # Slicer's client reads the connection itself, where the chunks of an answer without a length would stand in it.
        headers={"Content-Length": str(len(before) + path.stat().st_size + len(behind))},
        background=after,
    )


async def _wait(request: Request, queue: JobQueue, job_id: str) -> Job | None:
    """Waits for the end of a job; a client that closes its connection cancels it."""
    ended: Job | None = None
    async with anyio.create_task_group() as group:

        async def watch_client() -> None:
            while not await request.is_disconnected():
                await anyio.sleep(_ASKS_EVERY_S)
            queue.cancel(job_id)

        group.start_soon(watch_client)
        ended = await queue.wait(job_id)
        group.cancel_scope.cancel()
    return ended


def _around_image(boundary: str, params: dict[str, Any], path: Path) -> tuple[bytes, bytes]:
    """Returns what stands before and behind the image in a form of the parts `params` and `image`."""
    before = (
        f'--{boundary}\r\nContent-Disposition: form-data; name="params"\r\nContent-Type: application/json\r\n\r\n'
        f"{json.dumps(params)}\r\n"
        f'--{boundary}\r\nContent-Disposition: form-data; name="image"; filename="{path.name}"\r\n'
        f"Content-Type: {media_type(path)}\r\n\r\n"
    )
    return before.encode(), f"\r\n--{boundary}--\r\n".encode()


def _result_params(summary: dict[str, Any], ids: dict[str, int]) -> dict[str, Any]:
    names = [structure["name"] for structure in summary["structures"]]
    warnings = list(dict.fromkeys(s["warning"] for s in summary["structures"] if s["warning"]))
    return {
        "label_names": map_ids(names, ids),
        "latencies": summary["seconds"],
        "volumes_ml": {structure["name"]: structure["volume_ml"] for structure in summary["structures"]},
        "warnings": [*summary["notes"], *warnings],
    }
