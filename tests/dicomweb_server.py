"""A small DICOMweb server for tests: WADO-RS of one series, QIDO-RS of series, and STOW-RS, at the loopback address."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email import message_from_bytes
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pydicom

TOKEN = "the-token-of-the-archive"


class Archive:
    """The content and the behaviour of the server.

    Attributes:
        instances: Encoded instances of the series `series` of the study `study`.
        stored: What was stored.
        seen: (method, path, Authorization) of every request.
        answer: Replaces the answer to a request: gets the handler, and returns whether it has answered.
    """

    def __init__(self, folder: Path) -> None:
        self.instances = [path.read_bytes() for path in sorted(folder.iterdir())]
        first = pydicom.dcmread(io.BytesIO(self.instances[0]))
        self.study, self.series = str(first.StudyInstanceUID), str(first.SeriesInstanceUID)
        self.stored: list[pydicom.FileDataset] = []
        self.seen: list[tuple[str, str, str | None]] = []
        self.answer: Callable[[BaseHTTPRequestHandler], bool] = lambda handler: False
        self.url = ""


@contextmanager
def archive(folder: Path) -> Iterator[Archive]:
    """Serves the files of a folder as one series."""
    held = Archive(folder)

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

        def send(self, status: int, kind: str, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        def is_refused(self) -> bool:
            held.seen.append((self.command, self.path, self.headers.get("Authorization")))
            return held.answer(self)

        def do_GET(self) -> None:
            if self.is_refused():
                return
            series = f"/dicom-web/studies/{held.study}/series/{held.series}"
            if self.path == series:
                content = b"".join(
                    b"\r\n--cut\r\nContent-Type: application/dicom\r\n\r\n" + data for data in held.instances
                )
                self.send(200, 'multipart/related; type="application/dicom"; boundary=cut', content + b"\r\n--cut--")
            elif self.path.split("?")[0] in (f"/dicom-web/studies/{held.study}/series", "/dicom-web/series"):
                entry = {
                    "0020000D": {"vr": "UI", "Value": [held.study]},
                    "0020000E": {"vr": "UI", "Value": [held.series]},
                    "00080060": {"vr": "CS", "Value": ["CT"]},
                    "00201209": {"vr": "IS", "Value": [len(held.instances)]},
                    "0008103E": {"vr": "LO", "Value": ["Neck \x1b[31m 2.0"]},
                }
                self.send(200, "application/dicom+json", json.dumps([entry]).encode())
            else:
                self.send(404, "text/plain", b"")

        def do_POST(self) -> None:
            body = self.body()
            if self.is_refused():
                return
            head = f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode()
            parts = message_from_bytes(head + body.lstrip(b"\r\n")).get_payload()
            references = []
            for part in parts:
                stored = pydicom.dcmread(io.BytesIO(part.get_payload(decode=True)))
                held.stored.append(stored)
                item = {"00081155": {"vr": "UI", "Value": [str(stored.SOPInstanceUID)]}}
                references.append({"00081150": {"vr": "UI", "Value": [str(stored.SOPClassUID)]}, **item})
            done = {"00081199": {"vr": "SQ", "Value": references}}
            self.send(200, "application/dicom+json", json.dumps(done).encode())

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    held.url = f"http://127.0.0.1:{server.server_port}/dicom-web"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield held
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
