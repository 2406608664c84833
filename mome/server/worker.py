"""The worker: a child process that holds the models and runs one job at a time.

    python -P -m mome.server.worker

It speaks lines of JSON: commands come on its standard input, answers go to its standard output. A thread reads the
commands and another one checks prompts, so that a job can be cancelled and the next one be checked while the network
runs. The process ends when its standard input does, as after the server was killed.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import signal
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from mome.cpu_load import set_threads
from mome.errors import InputError, OutputError, is_bug, lacks_memory
from mome.server.client_words import in_client_words
from mome.server.http_errors import error_body
from mome.server.log import place_of
from mome.server.results import check_formats, formats, write_results, writer_of

if TYPE_CHECKING:
    from mome.volumes import Volume

_PROGRESS_EVERY_S = 0.25
_ABSOLUTE_PATH = re.compile(r"(?<![\w./:])/[^\s'\",;]+")
_DISK_HINT = "the server's disk is full or broken: try again later, or tell who runs it"
# Linux ends the process with the highest score first when memory is short; the server's own score is 0.
_OOM_SCORE = "800"


class Cancelled(Exception):
    """The job that runs was cancelled; raised between two tiles."""


class Worker:
    """Runs jobs with one or several models.

    Args:
        settings: `models`, `device`, `precision` and `threads`.
        output: Where answers go.
    """

    def __init__(self, settings: dict[str, Any], output: BinaryIO) -> None:
        self._settings, self._output = settings, output
        self._lock = threading.Lock()
        self._jobs: queue.Queue[dict[str, Any]] = queue.Queue()
        self._requests: queue.Queue[dict[str, Any]] = queue.Queue()
        self._cancelled: set[str] = set()
        self._models: Any = None

    def load(self) -> dict[str, Any]:
        """Loads the models and returns what they can do."""
        from mome.cli.quiet import quiet_libraries

        quiet_libraries()
        set_threads(self._settings["threads"])
        from mome.server.served_models import ServedModels

        names = ("device", "precision")
        self._models = ServedModels.load(self._settings["models"], **{name: self._settings[name] for name in names})
        return {**self._models.able(), "formats": formats()}

    def send(self, **message: Any) -> None:
        """Sends an answer."""
        with self._lock:
            self._output.write(json.dumps(message).encode() + b"\n")
            self._output.flush()

    def listen(self, commands: BinaryIO) -> None:
        """Takes commands until the input ends, then ends the process, whatever the other threads do."""
        for line in commands:
            message = json.loads(line)
            if message["kind"] == "run":
                self._jobs.put(message)
            elif message["kind"] == "cancel":
                self._cancelled.add(message["job"])
            elif message["kind"] == "check":
                self._requests.put(message)
        os._exit(0)

    def check(self) -> None:
        """Checks requests for ever; embedding a free text may take a while, and must delay no cancel."""
        while True:
            message = self._requests.get()
            self.send(kind="checked", request=message["request"], **self._check(message))

    def run(self) -> None:
        """Runs jobs for ever."""
        while True:
            message = self._jobs.get()
            job = message["job"]
            try:
                summary = self._run(message)
                self.send(kind="end", job=job, state="done", summary=summary)
            except Cancelled:
                self.send(kind="end", job=job, state="cancelled")
            except Exception as error:
                self.send(kind="end", job=job, state="failed", error=public_error(error, Path(message["folder"])))
            finally:
                self._cancelled.discard(job)

    def _check(self, message: dict[str, Any]) -> dict[str, Any]:
        """Checks the model, prompts and formats of a request before it is accepted."""
        try:
            model, _ = self._models.choose(message["prompts"], message["model"])
            prepared = self._models[model].prepare(message["prompts"])
            check_formats(message["outputs"])
            source = message["source"]
            if source is not None and not source.endswith(".zip"):
                self._check_writers(message["outputs"], Path(message["folder"]) / "input" / source)
            return {"error": None, "names": prepared.names}
        except Exception as error:
            folder = message["folder"]
            return {"error": public_error(error, None if folder is None else Path(folder)), "names": []}

    def _check_writers(self, outputs: list[str], source: Path, volume: Volume | None = None) -> None:
        """Asks every writer whether it can write masks of this scan, by its path, or by what was read of it."""
        from mome.volumes.writers.base import build_writer

        for name in outputs:
            if (writer := writer_of(name)) is not None:
                if volume is None:
                    build_writer(writer).check_source(source)
                else:
                    build_writer(writer).check_volume(volume)

    def _run(self, message: dict[str, Any]) -> dict[str, Any]:
        """Segments a scan and writes its results; returns the summary."""
        from mome.volumes.archives import is_archive, unpacked
        from mome.volumes.dicom import DicomOptions

        job, folder, options = message["job"], Path(message["folder"]), message["options"]
        last = 0.0

        def progress(done: int, total: int) -> None:
            nonlocal last
            self._stop_if_cancelled(job)
            now = time.monotonic()
            if done == total or now - last >= _PROGRESS_EVERY_S:
                last = now
                self.send(kind="progress", job=job, phase="segment", done=done, total=total)

        self._stop_if_cancelled(job)
        self.send(kind="progress", job=job, phase="read", done=0, total=0)
        dicom = DicomOptions(
            series=options.get("series"),
            allow_gaps=bool(options.get("allow_gaps")),
            allow_damaged=bool(options.get("allow_damaged")),
        )
        with contextlib.ExitStack() as stack:
            scan, notes = folder / "input" / message["source"], tuple[str, ...]()
            if is_archive(scan):
                archive = stack.enter_context(unpacked(scan, scan.parent))
                scan, notes = archive.path, archive.notes
            self._check_writers(message["outputs"], scan)
            model, chosen = self._models.choose(message["prompts"], options.get("model"))
            segmenter = self._models[model]
            loaded = segmenter.load(scan, frame=options.get("frame"), dicom=dicom)
            self._check_writers(message["outputs"], scan, loaded.volume)
            result = segmenter.segment(
                scan,
                message["prompts"],
                frame=options.get("frame"),
                dicom=dicom,
                loaded=loaded,
                progress=progress,
                statistics=bool(options.get("statistics")),
            )
            del loaded  # results are written without it
            self._stop_if_cancelled(job)
            self.send(kind="progress", job=job, phase="write", done=0, total=0)
            result.notes = (*notes, *((chosen,) if chosen else ()), *result.notes)
            how = {"frame": options.get("frame"), "dicom": dicom, "nrrd": options.get("nrrd") or {}}
            return write_results(result, scan, folder / "result", message["outputs"], model, how)

    def _stop_if_cancelled(self, job: str) -> None:
        if job in self._cancelled:
            raise Cancelled


def public_error(error: Exception, folder: Path | None) -> dict[str, Any]:
    """Returns an error as JSON, without the server's paths. Errors of other kinds are told by class and place only,
    because their messages may quote the scan.

    Args:
        error: The error.
        folder: The folder of the job or of the upload; None while there is none.
    """
    if isinstance(error, InputError | OutputError):
        what, where, hint = (_without(folder, text) for text in (error.what, error.where, error.hint))
        return error_body(what or "", where, in_client_words(hint) if isinstance(error, InputError) else _DISK_HINT)
    if lacks_memory(error):
        return error_body("the memory of the server is not enough for this scan", hint="a smaller scan, fewer prompts")
    if not is_bug(error):
        return error_body(f"the server's system refused a file or a name: {place_of(error)}", hint=_DISK_HINT)
    return error_body(f"this is a bug in mome: {place_of(error)}", hint="report it, with the version and this line")


def _without(folder: Path | None, text: str | None) -> str | None:
    """Removes the server's paths from a text."""
    if text is None:
        return None
    if folder is None:  # the model's path may be in it, and slashes of other meanings, as in "left/right"
        return _ABSOLUTE_PATH.sub("the server", text)
    root = str(folder.parent.parent)
    if text.startswith(root):
        return "the uploaded scan"
    return text.replace(f"{folder}/input/", "").replace(str(folder), "the upload").replace(root, "the server")


def main() -> None:
    """Reads the settings from the first line of the input, loads the models, and runs jobs."""
    # Both signals are the server's, which ends this process by closing its input; systemd sends SIGTERM to both.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    _end_with_parent()
    # Libraries print to standard output; what they print must not mix with the answers.
    output = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    commands = sys.stdin.buffer
    worker = Worker(json.loads(commands.readline()), output)
    try:
        able = worker.load()
    except Exception as error:
        # The user who starts the server reads this one, with its paths.
        worker.send(
            kind="broken",
            error=error_body(error.what, error.where, error.hint)
            if isinstance(error, InputError)
            else public_error(error, None),
        )
        return
    worker.send(kind="ready", **able)
    threading.Thread(target=worker.listen, args=(commands,), daemon=True).start()
    threading.Thread(target=worker.check, daemon=True).start()
    worker.run()


def _end_with_parent() -> None:
    """On Linux, lets the kernel end this process with the server, and before the server when memory is short."""
    if sys.platform != "linux":
        return
    import ctypes

    parent = os.getppid()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(0)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(_OOM_SCORE)


if __name__ == "__main__":
    main()
