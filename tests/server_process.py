"""A server in a process of its own, and the client that tests speak to it with."""

from __future__ import annotations

import atexit
import functools
import http.client
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TOKEN = "a-token-of-the-tests-0123456789"
PATIENT = "Eisenbart^Quirinus"


@dataclass
class Answer:
    """An answer of the server."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def save_model(folder: Path) -> Path:
    """Saves a small random model with its processor; its two masks of the small patient are not empty, and overlap."""
    import torch
    from small_models import liver_and_spleen

    from mome import MoMEProcessor

    model = liver_and_spleen()
    torch.manual_seed(32)
    model.text_bank.set(4 * torch.randn(2, 6))
    model.save_pretrained(folder)
    MoMEProcessor(spacing=[8, 8, 8]).save_pretrained(folder)
    return folder


class Server:
    """Starts `mome serve` at a free port.

    Args:
        model: Folder of the model.
        folder: Where the log and, in `data`, the queue go.
        options: Further options of the command.
        token: The token; None for none.
        prelude: Python code that runs before the command, in its process.
    """

    def __init__(self, model: Path, folder: Path, *options: str, token: str | None = TOKEN, prelude: str = "") -> None:
        self.folder, self.data, self.token = folder, folder / "data", token
        program = ["-m", "mome.cli.main"]
        if prelude:
            program = ["-c", f"{prelude}\nimport sys\nfrom mome.cli.main import main\nsys.exit(main(sys.argv[1:]))"]
        self._command = [sys.executable, *program, "serve", "-m", str(model), "--threads", "1"]
        self._command += ["--data", str(self.data), *options]
        self.port = 0
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder / "log.txt"
        self.start()

    def start(self) -> None:
        """Starts the process and waits until it listens."""
        environment = {name: value for name, value in os.environ.items() if name != "MOME_TOKEN"}
        if self.token is not None:
            environment["MOME_TOKEN"] = self.token
        begin = self.log.stat().st_size if self.log.exists() else 0
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                [*self._command, "--port", str(self.port)], stderr=log, stdout=log, env=environment
            )
        deadline = time.monotonic() + 120
        while b"listening at" not in self.log.read_bytes()[begin:]:
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.05)
        self.port = int(self.log.read_bytes()[begin:].split(b"listening at")[1].split(b"\n")[0].rpartition(b":")[2])

    def kill(self) -> None:
        """Ends the process by SIGKILL."""
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        """Ends the process by SIGTERM and returns its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)

    def workers(self) -> list[int]:
        """Returns the process ids of the worker."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return [int(child) for child in children.split()]

    def connection(self, timeout: float = 60) -> http.client.HTTPConnection:
        """Returns a new connection."""
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)

    def ask(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None, token: str | None = ""
    ) -> Answer:
        """Sends a request and returns the answer; `token` replaces the right one, None sends none."""
        sent = dict(headers or {})
        given = self.token if token == "" else token
        if given is not None:
            sent.setdefault("Authorization", f"Bearer {given}")
        connection = self.connection()
        try:
            connection.request(method, path, body=body, headers=sent)
            answer = connection.getresponse()
            named = {name.lower(): value for name, value in answer.getheaders()}
            return Answer(answer.status, named, answer.read())
        finally:
            connection.close()

    def submit(
        self,
        files: Sequence[tuple[str, bytes]],
        prompts: Iterable[str] = ("liver",),
        path: str = "/jobs",
        *,
        method: str = "POST",
        token: str | None = "",
        field: str = "file",
        **fields: Any,
    ) -> Answer:
        """Uploads files with prompts; the fields stand before the files."""
        body, kind = form([*(("prompt", p) for p in prompts), *flat(fields)], [(field, *file) for file in files])
        return self.ask(method, path, body, {"Content-Type": kind}, token)

    def wait(self, job: str, states: Sequence[str] = ("done", "failed", "cancelled"), seconds: float = 120) -> Any:
        """Waits until a job is in one of the states and returns it."""
        deadline = time.monotonic() + seconds
        while True:
            found = self.ask("GET", f"/jobs/{job}").json
            if found["state"] in states:
                return found
            assert time.monotonic() < deadline, found
            time.sleep(0.05)

    def run(self, data: bytes, prompts: Iterable[str] = ("liver",), **fields: Any) -> Any:
        """Uploads one file and waits until its job has ended."""
        answer = self.submit([("ct.nii.gz", data)], prompts, **fields)
        assert answer.status == 202, answer.body
        return self.wait(answer.json["id"])


def flat(fields: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yields the name and the text of every field; a list gives several."""
    for name, value in fields.items():
        for item in value if isinstance(value, list | tuple) else [value]:
            yield name, str(item)


def form(fields: Sequence[tuple[str, str]], files: Sequence[tuple[str, str, bytes]]) -> tuple[bytes, str]:
    """Returns a body of `multipart/form-data` and its content type.

    Args:
        fields: (name, text).
        files: (field, file name, content).
    """
    boundary = uuid.uuid4().hex
    parts = [f'--{boundary}\r\nContent-Disposition: form-data; name="{n}"\r\n\r\n{v}\r\n'.encode() for n, v in fields]
    for field, name, content in files:
        head = f'--{boundary}\r\nContent-Disposition: form-data; name="{field}"; filename="{name}"\r\n'
        parts.append(head.encode() + b"Content-Type: application/octet-stream\r\n\r\n" + content + b"\r\n")
    return b"".join(parts) + f"--{boundary}--\r\n".encode(), f"multipart/form-data; boundary={boundary}"


@functools.cache
def shared_server() -> Server:
    """A server that all tests of a process share; it takes 3 MB, and waits a second for a slow client."""
    folder = Path(tempfile.mkdtemp(prefix="mome-test-server-"))
    server = Server(save_model(folder / "model"), folder / "server", "--max-upload", "3MB", "--client-timeout", "1s")

    def end() -> None:
        server.stop()
        shutil.rmtree(folder, ignore_errors=True)

    atexit.register(end)
    return server
