"""Compressed pixels, decoded in a process of their own.

Damaged data make decoders crash, take all memory or never end (gdcm 3.2.6 and openjpeg 2.6 do so for a few changed
bytes). The process may die; the slice is then damaged, and another process goes on with the next one.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from mome.volumes.dicom.damaged import DamagedFile

_PROGRAM = Path(__file__).with_name("decoder_process.py")
# A frame takes less than a second; a process that needs longer than this, in seconds, is stopped.
_LONGEST = 60.0
# Address space of a process, in bytes, beyond a multiple of the frame's size.
_MEMORY = 4 * 2**30
# In this order: gdcm, which can crash, comes last.
_PLUGINS = ("pyjpegls", "pylibjpeg", "pillow", "gdcm")


def choose_plugin(available: Sequence[str]) -> str:
    """Returns the decoder to use of those that pydicom has for a transfer syntax."""
    return next((name for name in _PLUGINS if name in available), available[0])


class DecoderProcess:
    """Decodes frames of files in another process, which is started when it is needed.

    Args:
        shape: (rows, columns) of every frame.
    """

    def __init__(self, shape: tuple[int, int]) -> None:
        self._shape = shape
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> DecoderProcess:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def decode(self, file: Path, frames: Sequence[int], plugin: str) -> Iterator[np.ndarray]:
        """Yields the stored values (rows, columns) of frames of a file.

        Raises:
            DamagedFile: The frames cannot be decoded.
        """
        complete = False
        try:
            process = self._start()
            assert process.stdin is not None
            request = {"file": os.path.abspath(file), "frames": list(frames), "plugin": plugin}
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
            for _ in frames:
                yield self._read(process)
            complete = True
        except OSError as error:
            raise DamagedFile("the decoder stopped") from error
        finally:
            if not complete:  # Whatever is left of the answer must not be taken for the next one.
                self.close()

    def close(self) -> None:
        """Ends the process."""
        if self._process is None:
            return
        self._process.kill()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
        self._process.wait()
        self._process = None

    def _start(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            # The current folder, which may be the user's data, is no place to import from.
            paths = [path for path in sys.path if path and os.path.isabs(path) and Path(path) != Path.cwd()]
            memory = _MEMORY + 64 * math.prod(self._shape)
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(_PROGRAM), str(memory)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OPENBLAS_NUM_THREADS": "1"},
            )
        return self._process

    def _read(self, process: subprocess.Popen[bytes]) -> np.ndarray:
        """Reads one frame of the answer."""
        assert process.stdout is not None
        timer = threading.Timer(_LONGEST, process.kill)
        timer.start()
        try:
            line = process.stdout.readline()
            answer = json.loads(line) if line else {"error": "crash"}
            if "error" in answer:
                raise DamagedFile("damaged pixels")
            if tuple(answer["shape"]) != self._shape:
                raise DamagedFile("pixels of another size than the header says")
            kind = np.dtype(answer["dtype"])
            content = process.stdout.read(kind.itemsize * math.prod(self._shape))
            if len(content) != kind.itemsize * math.prod(self._shape):
                raise DamagedFile("damaged pixels")
            return np.frombuffer(content, kind).reshape(self._shape)
        finally:
            timer.cancel()
