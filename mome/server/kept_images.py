"""Images that clients of MONAI Label upload once and segment several times."""

from __future__ import annotations

import os
import shutil
import sqlite3
from pathlib import Path

from mome.server.folders import Folders
from mome.server.http_errors import HttpError
from mome.server.log import LOGGER, megabytes
from mome.server.store import Image, Store
from mome.server.upload import Upload


class KeptImages:
    """The images that are kept.

    Args:
        folders: The server's folder.
        store: The database.
        most: Images that are kept at a time.
    """

    def __init__(self, folders: Folders, store: Store, most: int) -> None:
        self._folders, self._store, self._most = folders, store, most

    def add(self, upload: Upload, instead_of: str | None = None) -> str:
        """Keeps an upload as an image for later jobs and returns its id.

        Args:
            upload: The upload.
            instead_of: The image that the caller removes for it, which is not counted.

        Raises:
            HttpError: As many images are kept as may be, status 503; or they cannot be written, status 507.
        """
        if len(set(self._store.image_ids()) - {instead_of}) >= self._most:
            self._folders.remove(upload.folder)
            raise HttpError(
                503, "too many images are kept", hint="DELETE /session/{id}, or try again later", retry_s=60
            )
        try:
            upload.folder.rename(self._folders.image(upload.id))
            self._store.add_image(upload.id, upload.source, upload.bytes)
        except (sqlite3.Error, OSError) as error:
            self._folders.remove(upload.folder)
            self._folders.remove(self._folders.image(upload.id))
            raise HttpError(507, "the image cannot be kept: the server's disk is full or broken") from error
        LOGGER.info("image %s stored, %s", upload.id, megabytes(upload.bytes))
        return upload.id

    def get(self, image_id: str) -> Image | None:
        """Returns what is known of an image; None where there is no such image."""
        return self._store.image(image_id)

    def remove(self, image_id: str) -> bool:
        """Removes an image; False where there is none."""
        found = self._store.forget_image(image_id)
        if found:
            self._folders.remove(self._folders.image(image_id))
        return found

    def as_upload(self, image_id: str) -> Upload | None:
        """Returns an upload that shares the files of an image; None where there is no such image.

        Raises:
            HttpError: The folder cannot be written; status 507.
        """
        try:
            image = self._store.image(image_id, use=True)
            if image is None:
                return None
            upload_id, folder = self._folders.new_upload()
        except sqlite3.Error as error:
            raise _cannot_be_taken() from error
        source = self._folders.image(image_id) / "input" / image.source
        target: Path = folder / "input" / image.source
        try:
            if source.is_dir():
                shutil.copytree(source, target, copy_function=os.link)
            else:
                os.link(source, target)
        except OSError as error:
            self._folders.remove(folder)
            raise _cannot_be_taken() from error
        return Upload(upload_id, folder, image.source, image.bytes)


def _cannot_be_taken() -> HttpError:
    return HttpError(507, "the image cannot be taken: the server's disk is full or broken")
