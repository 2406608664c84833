"""The program of the process that decodes compressed pixels; `mome.volumes.dicom.decoder` starts it.

Each line on stdin is a request in JSON: `file`, `frames` (indices) and `plugin` (a decoder's name in pydicom). For each
frame the answer on stdout is a line in JSON with `dtype` and `shape`, then the bytes of the array; a line with `error`
ends a request that failed. The file imports nothing of mome, so that it starts quickly.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from typing import BinaryIO


def main(memory: int) -> None:
    """Answers requests until stdin ends.

    Args:
        memory: The most bytes of address space that the process may take.
    """
    answers = os.fdopen(os.dup(1), "wb")
    for stream in (1, 2):  # Decoders print to both, which would mix with the answers and show what is in the file.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    import numpy as np  # noqa: F401
    from pydicom import dcmread  # noqa: F401

    if sys.platform != "win32":
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for line in sys.stdin.buffer:
        try:
            _answer(json.loads(line), answers)
        except Exception as error:  # decoders raise errors of many types for damaged data
            answers.write(json.dumps({"error": type(error).__name__}).encode() + b"\n")
        answers.flush()


def _answer(request: dict, answers: BinaryIO) -> None:
    """Decodes the frames of one file."""
    from pydicom import dcmread
    from pydicom.pixels import get_decoder

    dataset = dcmread(request["file"], force=True)
    decoder = get_decoder(dataset.file_meta.TransferSyntaxUID)
    frames = decoder.iter_array(dataset, indices=request["frames"], raw=True, decoding_plugin=request["plugin"])
    for array, _ in frames:
        answers.write(json.dumps({"dtype": array.dtype.str, "shape": array.shape}).encode() + b"\n")
        answers.write(array.tobytes())


if __name__ == "__main__":
    main(int(sys.argv[1]))
