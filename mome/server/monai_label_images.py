"""Images that clients of MONAI Label name or upload before they ask for masks: sessions, data store and archive."""

from __future__ import annotations

import asyncio
import hmac
import secrets
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request

from mome.dicomweb.series import find_study, is_uid, retrieve_series
from mome.dicomweb.session import connect
from mome.server.http_errors import HttpError
from mome.server.job_queue import JobQueue
from mome.server.job_routes import is_uuid, queue_of
from mome.server.upload import Upload, receive_upload

router = APIRouter(tags=["MONAI Label"])

_MOST_NAMES = 10_000
LONGEST_NAME = 1024


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


@router.put("/session", include_in_schema=False)
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
    queue.images.remove(session_id)
    return found


@router.put("/datastore", include_in_schema=False)
@router.put("/datastore/image", include_in_schema=False)
@router.put("/datastore/")
async def upload_image(request: Request, image: Annotated[str, Query(max_length=LONGEST_NAME)]) -> dict[str, str]:
    """Stores an image, in the field `file`, under the client's name for it."""
    names = request.app.state.image_names
    before = names.put(image, await _store_image(request, "file", instead_of=names.get(image)))
    if before is not None:
        queue_of(request).images.remove(before)
    return {"image": image}


async def _store_image(request: Request, field: str, instead_of: str | None = None) -> str:
    """Receives an image and returns its id; `instead_of` is the image that is removed for it."""
    queue = queue_of(request)
    async with queue.place():
        upload = await receive_upload(request, queue.folders, queue.settings, file_fields=(field,), other_fields=None)
        return queue.images.add(upload, instead_of)


def _session(queue: JobQueue, session_id: str) -> dict[str, Any]:
    """Returns what a client may know of a session.

    Raises:
        HttpError: There is none; status 404.
    """
    image = queue.images.get(session_id) if is_uuid(session_id) else None
    if image is None:
        raise HttpError(404, "there is no such session", hint="PUT /session/ with the image in the field files")
    expiry = int(queue.settings.keep_s)
    return {"create_ts": int(image.created), "last_access_ts": int(image.used), "expiry": expiry, "meta": {}}


async def stored_image(request: Request, name: str, session_id: str) -> Upload:
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
    upload = None if image_id is None else queue.images.as_upload(image_id)
    if upload is None and not session_id and queue.settings.dicomweb is not None and is_uid(name):
        upload = await _from_archive(queue, queue.settings.dicomweb, name)
    if upload is None:
        raise HttpError(404, "there is no such image", hint="upload it again")
    return upload


async def _from_archive(queue: JobQueue, url: str, series: str) -> Upload:
    """Retrieves a series, which OHIF names by its UID, from the archive of the server's option `--dicomweb`.

    The limits of uploads hold for it.
    """
    queue.folders.check_space()
    upload_id, folder = queue.folders.new_upload()
    target = folder / "input" / "dicom"

    def retrieve() -> int:
        target.mkdir(mode=0o700)
        client = connect(url, insecure=queue.settings.insecure)
        study = find_study(client, series)
        most = queue.settings.max_upload
        retrieve_series(client, study, series, target, lambda _: queue.folders.check_space(), most_bytes=most)
        return sum(path.stat().st_size for path in target.iterdir())

    try:
        return Upload(upload_id, folder, "dicom", await asyncio.to_thread(retrieve))
    except BaseException:
        queue.folders.remove(folder)
        raise
