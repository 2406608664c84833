"""Receives multipart uploads as a stream: bytes go to disk as they come, and limits hold while they come."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from mome.errors import InputError, did_you_mean
from mome.server.folders import Folders
from mome.server.http_errors import HttpError
from mome.server.scan_kind import name_scan
from mome.server.settings import ServerSettings

if TYPE_CHECKING:
    from starlette.requests import Request

_MOST_FILES = 20_000
_MOST_FIELDS = 1_000
_LONGEST_FIELD = 64 * 1024
# Of all fields together; they stay in memory until the request is answered, and an inference may wait for an hour.
_LONGEST_FIELDS = 1 << 20
_LONGEST_HEADER = 4 * 1024
_BUFFER = 1 << 20
_CHECK_SPACE_EVERY = 64 << 20
# A client that is slower than this after `_GRACE_S` is cut off, so that it does not hold a place for hours.
_SLOWEST = 32 * 1024
_GRACE_S = 30.0

Fields = dict[str, list[str]]


@dataclass
class Upload:
    """A finished upload.

    Attributes:
        id: A random UUID.
        folder: Its folder, with the scan in `input/`.
        source: The name of the scan in `input/`: a file, or the folder `dicom`.
        bytes: Bytes of its files.
        fields: Name of a form field → its values in their order.
    """

    id: str
    folder: Path
    source: str
    bytes: int
    fields: Fields = field(default_factory=dict)


async def receive_upload(
    request: Request,
    folders: Folders,
    settings: ServerSettings,
    *,
    file_fields: Collection[str],
    other_fields: Collection[str] | None,
    before_file: Callable[[Fields], Awaitable[None]] | None = None,
    needs_file: bool = True,
) -> Upload:
    """Receives a form of `multipart/form-data`.

    Args:
        request: The request, whose body has not been read.
        folders: Where the upload goes.
        settings: The limits.
        file_fields: Names of the fields that hold the scan.
        other_fields: Names of the fields that are texts; None where any is accepted.
        before_file: Called with the fields so far when the first file begins, to refuse a wrong request before the
            scan has been sent.
        needs_file: Refuse a form without a file; else its upload has an empty `source`.

    Raises:
        HttpError: The body is no such form, too large or too slow, or the disk is full.
        InputError: A field is unknown or too long, or the files are no scan.
    """
    boundary = _boundary(request.headers.get("content-type", ""))
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > settings.max_upload:
        raise _too_large(settings.max_upload)
    folders.check_space(int(declared) if declared.isdigit() else 0)
    upload_id, folder = folders.new_upload()
    form = _Form(folder / "input", file_fields, other_fields)
    try:
        await _receive(request, form, _parser(boundary, form), folders, settings, before_file)
        source = ""
        if form.files or needs_file:
            source = await asyncio.to_thread(name_scan, folder / "input", form.files)
        return Upload(upload_id, folder, source, form.file_bytes, form.fields)
    except BaseException:
        form.close()
        folders.remove(folder)
        raise


async def _receive(
    request: Request,
    form: _Form,
    parser: Any,
    folders: Folders,
    settings: ServerSettings,
    before_file: Callable[[Fields], Awaitable[None]] | None,
) -> None:
    """Reads the body of a request into a form."""
    from python_multipart.exceptions import ParseError

    began, received, checked_at, told = time.monotonic(), 0, 0, False
    more = True
    while more:
        try:
            message = await asyncio.wait_for(request.receive(), settings.client_timeout_s)
        except TimeoutError:
            raise _too_slow() from None
        if message["type"] == "http.disconnect":
            raise HttpError(400, "the client closed the connection before the upload was complete")
        body, more = message.get("body", b""), message.get("more_body", False)
        received += len(body)
        if received > settings.max_upload:
            raise _too_large(settings.max_upload)
        if time.monotonic() - began > _GRACE_S + received / _SLOWEST:
            raise _too_slow()
        if received - checked_at > _CHECK_SPACE_EVERY:
            checked_at = received
            folders.check_space()
        try:
            parser.write(body)
        except ParseError:
            raise HttpError(400, "the form is malformed", where="the body of the request") from None
        if form.error is not None:
            raise form.error
        if form.files and not told and before_file is not None:
            told = True
            await before_file(form.fields)
        if form.buffered >= _BUFFER or not more:
            await asyncio.to_thread(form.flush)
    if not form.is_complete:
        raise HttpError(400, "the form ends early", where="the body of the request", hint="send it again")


class _Form:
    """Takes the parts of a form from the parser; files are buffered until `flush`.

    Attributes:
        files: The files in the order in which they came.
        fields: Name → values.
        buffered: Bytes that wait for `flush`.
        file_bytes: Bytes of all files.
        error: What is wrong with the form; the parser's callbacks cannot raise it at the right place.
        is_complete: Whether the end of the form was seen.
    """

    def __init__(self, folder: Path, file_fields: Collection[str], other_fields: Collection[str] | None) -> None:
        self.files: list[Path] = []
        self.fields: Fields = {}
        self.buffered = self.file_bytes = 0
        self.error: Exception | None = None
        self.is_complete = False
        self._folder, self._file_fields, self._other_fields = folder, file_fields, other_fields
        self._header, self._value = b"", b""
        self._disposition = b""
        self._name: str | None = None
        self._field: bytearray | None = None
        self._count = self._field_bytes = 0
        # What `flush` does: open the next file (None), or write bytes to the open one.
        self._pending: list[Path | bytes] = []
        self._open: BinaryIO | None = None

    def flush(self) -> None:
        """Writes what is buffered to disk."""
        pending, self._pending, self.buffered = self._pending, [], 0
        try:
            for item in pending:
                if isinstance(item, Path):
                    self.close()
                    self._open = open(item, "xb")
                elif self._open is not None:
                    self._open.write(item)
            if self.is_complete:
                self.close()
        except OSError as error:
            raise HttpError(507, "the upload cannot be written: the server's disk is full or broken") from error

    def close(self) -> None:
        """Closes the open file."""
        if self._open is not None:
            self._open.close()
            self._open = None

    def on_part_begin(self) -> None:
        self._disposition, self._name, self._field = b"", None, None

    def on_header_begin(self) -> None:
        self._header, self._value = b"", b""

    def on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header = self._longer(self._header, data[start:end])

    def on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._value = self._longer(self._value, data[start:end])

    def _longer(self, text: bytes, more: bytes) -> bytes:
        """Returns a part of a header with what follows it, or what is there where that would be too long."""
        if len(text) + len(more) > _LONGEST_HEADER:  # older versions of the parser have no limit
            self.error = InputError(f"a header of a field has more than {_LONGEST_HEADER} bytes", where="the form")
            return text
        return text + more

    def on_header_end(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition = self._value

    def on_headers_finished(self) -> None:
        from python_multipart.multipart import parse_options_header

        _, options = parse_options_header(self._disposition)
        name = options.get(b"name", b"").decode("utf-8", "replace")
        is_file = b"filename" in options or b"filename*" in options or name in self._file_fields
        known = self._file_fields if is_file else self._other_fields
        self._count += 1
        if known is not None and name not in known:
            kind = "file field" if is_file else "field"
            self.error = InputError(
                f"there is no {kind} {name[:60]!r}{did_you_mean(name[:60], known)}",
                where="the form",
                hint=f"{kind}s: {', '.join(sorted(known))}",
            )
        elif is_file and len(self.files) >= _MOST_FILES:
            self.error = InputError(f"more than {_MOST_FILES} files were uploaded", where="the form")
        elif not is_file and self._count - len(self.files) > _MOST_FIELDS:
            self.error = InputError(f"the form has more than {_MOST_FIELDS} fields", where="the form")
        elif is_file:
            self.files.append(self._folder / f"upload_{len(self.files):06d}")
            self._pending.append(self.files[-1])
        else:
            self._name, self._field = name, bytearray()

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        if self.error is not None:
            return
        if self._field is None:
            self._pending.append(bytes(data[start:end]))
            self.buffered += end - start
            self.file_bytes += end - start
        elif len(self._field) + end - start > _LONGEST_FIELD:
            self.error = InputError(f"a field has more than {_LONGEST_FIELD} bytes", where="the form")
        elif self._field_bytes + end - start > _LONGEST_FIELDS:
            self.error = InputError(f"the fields have more than {_LONGEST_FIELDS} bytes", where="the form")
        else:
            self._field += data[start:end]
            self._field_bytes += end - start

    def on_part_end(self) -> None:
        if self._field is not None and self._name is not None:
            self.fields.setdefault(self._name, []).append(self._field.decode("utf-8", "replace"))

    def on_end(self) -> None:
        self.is_complete = True


def _parser(boundary: bytes, form: _Form) -> Any:
    from python_multipart.multipart import MultipartParser

    names = (
        *("on_part_begin", "on_part_data", "on_part_end", "on_header_begin", "on_header_field", "on_header_value"),
        *("on_header_end", "on_headers_finished", "on_end"),
    )
    callbacks: Any = {name: getattr(form, name) for name in names}
    return MultipartParser(boundary, callbacks)


def _boundary(content_type: str) -> bytes:
    """Returns the boundary of a form.

    Raises:
        HttpError: The content is no `multipart/form-data`; status 415.
    """
    from python_multipart.multipart import parse_options_header

    kind, options = parse_options_header(content_type)
    boundary = options.get(b"boundary", b"")
    if kind != b"multipart/form-data" or not 1 <= len(boundary) <= 200:
        raise HttpError(
            415,
            "an upload is a form of multipart/form-data",
            where="the header Content-Type",
            hint="curl -F prompt=mandible -F file=@ct.nii.gz",
        )
    return boundary


def _too_large(limit: int) -> HttpError:
    return HttpError(413, f"the upload is larger than {limit / 1e6:,.0f} MB", hint="the server's option --max-upload")


def _too_slow() -> HttpError:
    return HttpError(408, "the upload is too slow", hint="send it again over a faster connection")
