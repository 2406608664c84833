"""The server's side of the worker: starts it, speaks with it, and notices its death."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mome.dicomweb.session import TOKEN_VARIABLE
from mome.errors import InputError
from mome.server.settings import ServerSettings

_LONGEST_LINE = 16 * 2**20
# Secrets of the server, which the process that reads scans does not need.
_SECRETS = ("MOME_TOKEN", TOKEN_VARIABLE)
Progress = Callable[[dict[str, Any]], None]


class WorkerDied(Exception):
    """The worker ended while something was asked of it.

    Args:
        code: Its exit code, negative for a signal.
    """

    def __init__(self, code: int | None) -> None:
        super().__init__(code)
        self.code = code


class WorkerProcess:
    """One worker process; after its death, `start` makes another.

    Attributes:
        able: What the worker said of its models when it was ready; empty before.
    """

    def __init__(self, settings: ServerSettings) -> None:
        self.able: dict[str, Any] = {}
        self._settings = settings
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.Task[None] | None = None
        self._ready: asyncio.Future[dict[str, Any]] | None = None
        self._checks: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._end: asyncio.Future[dict[str, Any]] | None = None
        self._job = ""
        self._on_progress: Progress | None = None
        self._numbers = itertools.count()

    @property
    def is_ready(self) -> bool:
        """Whether the worker has loaded its model and lives."""
        return self._ready is not None and self._ready.done() and self._reader is not None and not self._reader.done()

    async def start(self) -> None:
        """Starts the process and waits until it has loaded the model.

        Raises:
            InputError: The model cannot be loaded.
            WorkerDied: The process ended before it was ready.
        """
        self._ready = asyncio.get_running_loop().create_future()
        # -P keeps the current folder, which may be anybody's, out of the places that Python imports from. Standard
        # error is dropped, because libraries write there what they read in a scan.
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", "mome.server.worker"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            env={name: value for name, value in os.environ.items() if name not in _SECRETS},
            limit=_LONGEST_LINE,
            start_new_session=True,
        )
        names = ("models", "device", "precision", "threads")
        self._send({name: getattr(self._settings, name) for name in names})
        self._reader = asyncio.create_task(self._read(self._process))
        message = await self._answer(self._ready)
        if message["kind"] == "broken":
            await self.stop()
            raise InputError(**message["error"])
        self.able = {key: value for key, value in message.items() if key != "kind"}

    async def check(
        self, prompts: list[str], outputs: list[str], folder: Path | None, source: str | None, model: str | None
    ) -> dict[str, Any]:
        """Asks whether a request can be served; returns `error`, None if it can, and `names` of the masks.

        Args:
            prompts: The prompts.
            outputs: The formats.
            folder: The folder of the upload; None while it is not complete.
            source: The scan inside the folder's `input`.
            model: The model that the client has named, if any.

        Raises:
            WorkerDied: The worker ended before it answered.
        """
        number = next(self._numbers)
        self._checks[number] = asyncio.get_running_loop().create_future()
        try:
            path = None if folder is None else str(folder)
            self._send(
                {
                    "kind": "check",
                    "request": number,
                    "model": model,
                    "prompts": prompts,
                    "outputs": outputs,
                    "folder": path,
                    "source": source,
                }
            )
            return await self._answer(self._checks[number])
        finally:
            self._checks.pop(number, None)

    async def run(self, job_id: str, folder: Path, request: dict[str, Any], on_progress: Progress) -> dict[str, Any]:
        """Runs one job and returns the worker's last word: `state`, and `summary` or `error`.

        Args:
            job_id: The job.
            folder: Its folder.
            request: `source`, `prompts`, `outputs` and `options`.
            on_progress: Called with `phase`, `done` and `total`.

        Raises:
            WorkerDied: The worker ended before the job did.
        """
        self._end = asyncio.get_running_loop().create_future()
        self._job, self._on_progress = job_id, on_progress
        try:
            self._send({"kind": "run", "job": job_id, "folder": str(folder), **request})
            return await self._answer(self._end)
        finally:
            self._end, self._on_progress = None, None

    def cancel(self, job_id: str) -> None:
        """Asks the worker to stop a job at the next tile."""
        with contextlib.suppress(WorkerDied):
            self._send({"kind": "cancel", "job": job_id})

    def kill(self) -> None:
        """Ends the process at once."""
        if self._process is not None and self._process.returncode is None:
            self._process.kill()

    async def stop(self) -> None:
        """Ends the process by closing its input, and by a signal where that does not suffice."""
        if self._process is None:
            return
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            await asyncio.wait_for(self._process.wait(), 2)
        except TimeoutError:
            self.kill()
            await self._process.wait()
        if self._reader is not None:
            await self._reader

    def _send(self, message: dict[str, Any]) -> None:
        """Sends a command.

        Raises:
            WorkerDied: There is no worker.
        """
        process = self._process
        if process is None or process.stdin is None or process.returncode is not None or process.stdin.is_closing():
            raise WorkerDied(None if process is None else process.returncode)
        process.stdin.write(json.dumps(message).encode() + b"\n")

    async def _answer(self, waiting: asyncio.Future[dict[str, Any]]) -> dict[str, Any]:
        """Waits for an answer or for the worker's death.

        Raises:
            WorkerDied: The worker ended first.
        """
        assert self._reader is not None
        both: tuple[asyncio.Future[Any], ...] = (waiting, self._reader)
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        if waiting.done():
            return waiting.result()
        waiting.cancel()
        raise WorkerDied(None if self._process is None else self._process.returncode)

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        """Distributes the worker's answers until it ends."""
        assert process.stdout is not None
        with contextlib.suppress(ValueError, ConnectionError):  # a line that is too long: the worker is broken
            while line := await process.stdout.readline():
                message = json.loads(line)
                kind = message["kind"]
                if kind in ("ready", "broken") and self._ready is not None and not self._ready.done():
                    self._ready.set_result(message)
                elif kind == "checked" and message["request"] in self._checks:
                    waiting = self._checks[message["request"]]
                    if not waiting.done():
                        waiting.set_result(message)
                elif kind == "progress" and message["job"] == self._job and self._on_progress is not None:
                    self._on_progress({name: message[name] for name in ("phase", "done", "total")})
                elif kind == "end" and message["job"] == self._job and self._end is not None and not self._end.done():
                    self._end.set_result(message)
        if process.returncode is None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), 5)
        if process.returncode is None:
            process.kill()
            await process.wait()
