"""The routes of MONAI Label (0.8.5) that its client in 3D Slicer and its extension of OHIF call.

Written from the requests that these clients make (Project-MONAI/MONAILabel, plugins/slicer/MONAILabel/MONAILabelLib/
client.py and plugins/ohifv3/extensions/monai-label). There is one model of type `segmentation`. Training, active
learning, scribbles and stored labels do not exist here; the clients hide what `/info/` does not list.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import secrets
import uuid
from collections.abc import AsyncIterator
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import parse_qs

import anyio
from fastapi import APIRouter, Query, Request
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse
from starlette.background import BackgroundTask

from mome.dicomweb.series import find_study, is_uid, retrieve_series
from mome.dicomweb.session import connect
from mome.errors import InputError
from mome.server.guard import unauthorized
from mome.server.http_errors import HttpError
from mome.server.job_queue import JobQueue
from mome.server.job_routes import accept, check_prompts, is_uuid, queue_of
from mome.server.results import media_type, result_file
from mome.server.store import Job
from mome.server.upload import Fields, Upload, receive_upload

router = APIRouter(tags=["MONAI Label"])

_MOST_NAMES = 10_000
_LONGEST_NAME = 1024
_CHUNK = 1 << 20
_LONGEST_PASSWORD_FORM = 8 * 1024
_ASKS_EVERY_S = 1.0
_OUTPUTS = ("image", "json", "all", "dicom_seg")


class ImageNames:
    """The names that clients give to images, each with the id of its image.

    Slicer names an image like its volume, which may be a patient's name. Names are therefore kept in memory only, as
    hashes under a key that ends with the server; a client uploads its image again after a restart.
    """

    def __init__(self) -> None:
        self._key = secrets.token_bytes(32)
        self._ids: dict[bytes, str] = {}

    def put(self, name: str, image_id: str) -> str | None:
        """Names an image; returns the id of the image that had this name before."""
        before = self._ids.pop(self._hash(name), None)
        self._ids[self._hash(name)] = image_id
        while len(self._ids) > _MOST_NAMES:
            del self._ids[next(iter(self._ids))]
        return before

    def get(self, name: str) -> str | None:
        """Returns the id of an image; None where the name is unknown."""
        return self._ids.get(self._hash(name))

    def _hash(self, name: str) -> bytes:
        return hmac.digest(self._key, name.encode("utf-8", "surrogatepass"), "sha256")


@router.get("/info/")
async def info(request: Request) -> dict[str, Any]:
    """Describes the model as MONAI Label does. Slicer offers `prompts` of the config as an option of the model."""
    able = queue_of(request).worker.able
    labels = _default_prompts(able)
    model = {
        "type": "segmentation",
        "labels": {name: number for number, name in enumerate(labels, 1)},
        "dimension": 3,
        "description": "Text-prompted CT segmentation; prompts are separated by commas",
        "config": {"prompts": ""},
    }
    return {
        "name": "mome",
        "description": "Text-prompted CT segmentation. Research software, not a medical device.",
        "version": version("mome"),
        "labels": list(labels),
        "models": {able["model"]: model},
        "trainers": {},
        "strategies": {},
        "scoring": {},
        "train_stats": {},
        "datastore": {"total": 0, "completed": 0},
    }


@router.get("/auth/")
async def auth(request: Request) -> dict[str, bool]:
    """Says whether a token is needed. It needs none itself."""
    return {"enabled": queue_of(request).settings.token is not None}


@router.post("/auth/token")
async def auth_token(request: Request) -> dict[str, str]:
    """Takes the token as the password of a login, with any user name, because Slicer asks for these two."""
    token = queue_of(request).settings.token
    body = b""
    try:
        async with asyncio.timeout(queue_of(request).settings.client_timeout_s):
            async for part in request.stream():
                body += part
                if len(body) > _LONGEST_PASSWORD_FORM:
                    raise unauthorized()
    except TimeoutError:  # a stranger must not hold a connection for ever
        raise unauthorized() from None
    given = parse_qs(body.decode("utf-8", "replace")).get("password", [""])[0]
    if token is None or not hmac.compare_digest(given.encode(), token.encode()):
        raise unauthorized()
    return {"access_token": token, "token_type": "Bearer"}


@router.get("/auth/token/valid")
async def auth_token_valid() -> dict[str, bool]:
    """Answers requests with the right token only."""
    return {"valid": True}


@router.put("/session/")
async def create_session(request: Request) -> dict[str, Any]:
    """Stores an image, in the field `files`, for later requests; it is removed when it was not used for a while."""
    image_id = await _store_image(request, "files")
    return {"session_id": image_id, "session_info": _session(queue_of(request), image_id)}


@router.get("/session/{session_id}")
async def get_session(request: Request, session_id: str) -> dict[str, Any]:
    """Returns the times of a session."""
    return _session(queue_of(request), session_id)


@router.delete("/session/{session_id}")
async def remove_session(request: Request, session_id: str) -> dict[str, Any]:
    """Removes a session and its image."""
    queue = queue_of(request)
    found = _session(queue, session_id)
    queue.remove_image(session_id)
    return found


@router.put("/datastore/")
async def upload_image(request: Request, image: Annotated[str, Query(max_length=_LONGEST_NAME)]) -> dict[str, str]:
    """Stores an image, in the field `file`, under the client's name for it."""
    queue = queue_of(request)
    before = request.app.state.image_names.put(image, await _store_image(request, "file"))
    if before is not None:
        queue.remove_image(before)
    return {"image": image}


@router.post("/infer/{model}", response_model=None)
async def infer(
    request: Request,
    model: str,
    image: Annotated[str, Query(max_length=_LONGEST_NAME)] = "",
    session_id: str = "",
    output: str = "all",
) -> JSONResponse | FileResponse | StreamingResponse:
    """Segments an image and answers when that is done.

    The image is the field `file`, or a session, or the name of an image that was uploaded, or the UID of a series of
    the archive that the server's option `--dicomweb` names. `params` is JSON; `prompts`
    in it is a list of structures or a text with commas, and without it all structures that the model was trained on
    are segmented. `output` is `image` (an NRRD map of ids 1, 2, … in the order of the prompts), `json` (`label_names`
    and what else is known), `all` (both, as multipart/form-data), or `dicom_seg`.
    """
    queue = queue_of(request)
    if model != queue.worker.able["model"]:
        raise HttpError(404, "there is no such model", where="the path", hint=f"/infer/{queue.worker.able['model']}")
    if output not in _OUTPUTS:
        raise HttpError(422, f"there is no output {output[:40]!r}", where="output", hint=", ".join(_OUTPUTS))
    async with queue.place():
        upload = await receive_upload(
            request, queue.folders, queue.settings, file_fields=("file",), other_fields=None, needs_file=False
        )
        try:
            params = _params(upload.fields)
            if not upload.source:
                stored = await _stored_image(request, image, session_id)
                fields = upload.fields
                queue.folders.remove(upload.folder)
                upload = Upload(stored.id, stored.folder, stored.source, stored.bytes, fields)
        except BaseException:
            queue.folders.remove(upload.folder)
            raise
        kind = "dicom_seg" if output == "dicom_seg" else "nrrd"
        job = await accept(
            queue,
            upload,
            lambda fields: _prompts(params, queue.worker.able),
            {"output": [kind]},
            nrrd_gzip=params.get("result_compress", True) is not False,
        )
    return await _answer(request, queue, job, output, kind)


async def _answer(
    request: Request, queue: JobQueue, job: Job, output: str, kind: str
) -> JSONResponse | FileResponse | StreamingResponse:
    """Waits for a job and returns its result; the job is deleted when that was sent, or when the client has gone."""
    try:
        ended = await _wait(request, queue, job.id)
        if ended is None:
            raise HttpError(503, "the server stops", hint="try again later", retry_s=30)
        if ended.state == "failed" and ended.error is not None:
            raise HttpError(422, **ended.error)
        if ended.state != "done" or ended.summary is None:
            raise HttpError(409, "the job was cancelled")
        path = result_file(queue.folders.job(job.id), kind)
        assert path is not None
        params = _result_params(ended.summary)
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
    return StreamingResponse(
        _multipart(boundary, params, path), media_type=f"multipart/form-data; boundary={boundary}", background=after
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


async def _multipart(boundary: str, params: dict[str, Any], path: Path) -> AsyncIterator[bytes]:
    """Yields the parts `params` and `image`."""
    head = f'--{boundary}\r\nContent-Disposition: form-data; name="params"\r\nContent-Type: application/json\r\n\r\n'
    yield head.encode() + json.dumps(params).encode() + b"\r\n"
    head = f'--{boundary}\r\nContent-Disposition: form-data; name="image"; filename="{path.name}"\r\n'
    yield head.encode() + f"Content-Type: {media_type(path)}\r\n\r\n".encode()
    async with await anyio.open_file(path, "rb") as file:
        while part := await file.read(_CHUNK):
            yield part
    yield f"\r\n--{boundary}--\r\n".encode()


def _result_params(summary: dict[str, Any]) -> dict[str, Any]:
    names = [structure["name"] for structure in summary["structures"]]
    warnings = [structure["warning"] for structure in summary["structures"] if structure["warning"]]
    return {
        "label_names": {name: number for number, name in enumerate(names, 1)},
        "latencies": summary["seconds"],
        "volumes_ml": {structure["name"]: structure["volume_ml"] for structure in summary["structures"]},
        "warnings": [*summary["notes"], *warnings],
    }


def _params(fields: Fields) -> dict[str, Any]:
    """Returns the parameters of a request.

    Raises:
        InputError: They are no JSON object.
    """
    try:
        params = json.loads(fields.get("params", ["{}"])[-1] or "{}")
    except (ValueError, RecursionError):
        params = None
    if not isinstance(params, dict):
        raise InputError("params is no JSON object", where="the field params", hint='{"prompts": ["liver"]}')
    return params


def _prompts(params: dict[str, Any], able: dict[str, Any]) -> list[str]:
    """Returns the prompts of a request, or what the model was trained on.

    Raises:
        InputError: They are of another type.
    """
    given = params.get("prompts") or []
    if isinstance(given, str):
        given = [text.strip() for text in given.split(",") if text.strip()]
    if not isinstance(given, list) or not all(isinstance(text, str) for text in given):
        raise InputError("prompts are a list of texts, or one text with commas", where="params")
    return check_prompts(given or _default_prompts(able))


def _default_prompts(able: dict[str, Any]) -> list[str]:
    return able["trained_labels"] or able["labels"]


async def _store_image(request: Request, field: str) -> str:
    """Receives an image and returns its id."""
    queue = queue_of(request)
    async with queue.place():
        upload = await receive_upload(request, queue.folders, queue.settings, file_fields=(field,), other_fields=None)
        return queue.add_image(upload)


def _session(queue: JobQueue, session_id: str) -> dict[str, Any]:
    """Returns what a client may know of a session.

    Raises:
        HttpError: There is none; status 404.
    """
    image = queue.store.image(session_id) if is_uuid(session_id) else None
    if image is None:
        raise HttpError(404, "there is no such session", hint="PUT /session/ with the image in the field files")
    expiry = int(queue.settings.keep_s)
    return {"create_ts": int(image.created), "last_access_ts": int(image.used), "expiry": expiry, "meta": {}}


async def _stored_image(request: Request, name: str, session_id: str) -> Upload:
    """Returns an upload that shares the files of a session or of a named image, or a series of the DICOMweb archive.

    Raises:
        HttpError: There is none; status 404, or 422 if none is named.
        InputError: The archive refuses, or has no such series.
    """
    queue = queue_of(request)
    if session_id:
        image_id: str | None = session_id if is_uuid(session_id) else None
    elif name:
        image_id = request.app.state.image_names.get(name)
    else:
        raise HttpError(422, "no image was given", hint="the field file, session_id=, or image=")
    upload = None if image_id is None else queue.upload_from_image(image_id)
    if upload is None and not session_id and queue.settings.dicomweb is not None and is_uid(name):
        upload = await _from_archive(queue, queue.settings.dicomweb, name)
    if upload is None:
        raise HttpError(404, "there is no such image", hint="upload it again")
    return upload


async def _from_archive(queue: JobQueue, url: str, series: str) -> Upload:
    """Retrieves a series, which OHIF names by its UID, from the archive of the server's option `--dicomweb`."""
    queue.folders.check_space()
    upload_id, folder = queue.folders.new_upload()
    target = folder / "input" / "dicom"

    def retrieve() -> int:
        target.mkdir(mode=0o700)
        client = connect(url, insecure=queue.settings.insecure)
        retrieve_series(client, find_study(client, series), series, target)
        return sum(path.stat().st_size for path in target.iterdir())

    try:
        return Upload(upload_id, folder, "dicom", await asyncio.to_thread(retrieve))
    except BaseException:
        queue.folders.remove(folder)
        raise
