"""Random damage to valid scans: bytes, header fields and lines. Everything follows from a seed."""

from __future__ import annotations

import gzip
import random
import zlib

import nibabel as nib
import numpy as np
from small_scans import mha_text, nrrd_text, patient_bytes, patient_hu

_NUMBERS = (
    "0", "-1", "1", "2", "3", "7", "255", "32767", "-32768", "65536", "2147483647", "-2147483648", "4294967296",
    "9223372036854775807", "1e6", "1e30", "1e-30", "1e308", "nan", "inf", "-inf", "0.5", "9" * 400, "",
)  # fmt: skip
_WORDS = (
    "none", "(1,0,0)", "(nan,nan,nan)", "((((", "True", "False", "LOCAL", "LIST", "LIST 2", "%d.raw 1 9 1",
    "%s%s%n.raw 1 9 1", "/etc/passwd", "../../etc/passwd", "raw", "gzip", "bz2", "ascii", "hex", "little", "big",
    "float", "double", "uchar", "block", "MET_FLOAT", "MET_UCHAR", "MET_DOUBLE", "domain", "list", "RGB-color",
    "k" * 5_000, "\0", "é\u202e", "RAS", "LPS", "scanner-xyz", '"m" "m" "m"', "-1 0 0 0", "# " + "c" * 1_000,
)  # fmt: skip


def _voxels(rng: random.Random) -> bytes:
    return patient_hu().tobytes(order="F")[: rng.choice([None, None, None, 100, 0])]


def _damaged_bytes(data: bytes, rng: random.Random, within: int) -> bytes:
    """Flips, replaces, removes, repeats or cuts bytes among the first `within`."""
    out = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 4, 16])):
        at = rng.randrange(max(1, min(within, len(out))))
        kind = rng.randrange(5)
        if kind == 0:
            out[at : at + 1] = bytes([rng.randrange(256)])
        elif kind == 1:
            out[at : at + rng.choice([2, 4, 8])] = rng.randbytes(rng.choice([2, 4, 8]))
        elif kind == 2:
            del out[at : at + rng.choice([1, 4, 64, 1000])]
        elif kind == 3:
            out[at:at] = out[at : at + rng.choice([1, 16, 400])]
        else:
            out[at : at + 4] = rng.choice([b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f"])
    return bytes(out)


def _damaged_lines(text: str, rng: random.Random, separator: str) -> bytes:
    """Replaces, removes, repeats or swaps lines and values of a text header."""
    lines = text.split("\n")
    for _ in range(rng.choice([1, 1, 2, 3])):
        at = rng.randrange(len(lines))
        name, found, value = lines[at].partition(separator)
        kind = rng.randrange(6)
        if kind == 0 and found:
            words = value.split() or [""]
            words[rng.randrange(len(words))] = rng.choice(_NUMBERS + _WORDS)
            lines[at] = f"{name}{separator} {' '.join(words)}"
        elif kind == 1 and found:
            lines[at] = f"{name}{separator} {rng.choice(_NUMBERS + _WORDS)}"
        elif kind == 2:
            lines.insert(at, lines[rng.randrange(len(lines))])
        elif kind == 3:
            del lines[at]
            lines = lines or [""]
        elif kind == 4:
            lines.insert(at, rng.choice(_WORDS) + separator + rng.choice(_WORDS + _NUMBERS))
        else:
            other = rng.randrange(len(lines))
            lines[at], lines[other] = lines[other], lines[at]
    return "\n".join(lines).encode("utf-8", "replace")


def _nifti(rng: random.Random) -> tuple[str, bytes]:
    data = patient_bytes()
    kind = rng.randrange(3)
    if kind == 0:
        header = np.frombuffer(data[:348], nib.nifti1.header_dtype).copy()
        for _ in range(rng.choice([1, 2, 4])):
            name = rng.choice(header.dtype.names)
            field = header[name].reshape(-1)
            kind_of_field = header.dtype[name].base.kind
            if kind_of_field == "f":
                field[rng.randrange(field.size)] = float(rng.choice(["nan", "inf", "-inf", "0", "-1", "1e30", "352.5"]))
            elif kind_of_field in "iu":
                values = np.array(rng.choice([0, 1, -1, 2, 3, 7, 127, 32767, -32768]))
                field[rng.randrange(field.size)] = values.astype(field.dtype)
            else:
                field[0] = rng.randbytes(4)
        data = header.tobytes() + data[348:]
    elif kind == 1:
        data = _damaged_bytes(data, rng, 360)
    if rng.random() < 0.5:
        return "ct.nii", data[: rng.choice([None, None, None, 348, 352, 5_000])]
    packed = gzip.compress(data, 1)
    return "ct.nii.gz", _damaged_bytes(packed, rng, len(packed)) if kind == 2 or rng.random() < 0.3 else packed


def _nrrd(rng: random.Random) -> tuple[str, bytes]:
    name = rng.choice(["ct.nrrd", "ct.nrrd", "ct.nhdr"])
    encoding = rng.choice(["raw", "gzip"])
    text = nrrd_text(encoding=encoding)
    if name == "ct.nhdr":
        text += "data file: ct.raw\n"
    head = _damaged_lines(text, rng, ":") if rng.random() < 0.7 else _damaged_bytes(text.encode(), rng, len(text))
    voxels = _voxels(rng)
    return name, head + b"\n" + (gzip.compress(voxels, 1) if encoding == "gzip" else voxels)


def _metaimage(rng: random.Random) -> tuple[str, bytes]:
    name = rng.choice(["ct.mha", "ct.mha", "ct.mhd"])
    packed = rng.random() < 0.3
    text = mha_text(CompressedData=str(packed), ElementDataFile="ct.raw" if name == "ct.mhd" else "LOCAL")
    head = _damaged_lines(text, rng, "=") if rng.random() < 0.7 else _damaged_bytes(text.encode(), rng, len(text))
    voxels = _voxels(rng)
    return name, head + (zlib.compress(voxels, 1) if packed else voxels)


def damaged_scan(seed: int) -> tuple[str, bytes]:
    """Returns the name and the bytes of a damaged scan; beside it, the test puts a whole `ct.raw`."""
    rng = random.Random(seed)
    return rng.choice([_nifti, _nrrd, _metaimage])(rng)
