"""Checksums inside the files of a checkpoint: they show what was changed after it was saved. Imports no torch.

Every JSON file holds the sums of its own keys, so that a file that is saved again, or uploaded to the Hub alone, stays
right. config.json also holds the sum of the weights, which is that of their names, types, shapes and bytes: it is the
same for one file and for several shards.

The sums find edits by hand, files of another checkpoint and damage. They are no protection against an attacker, who
can write new sums.
"""

from __future__ import annotations

import hashlib
import json
import mmap
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from mome.errors import InputError

# The key of a JSON file that holds the sums, and the name of the weights' sum there.
CHECKSUMS, WEIGHTS = "checksums", "weights"
# Digits of the sum of one key: 64 bits, enough against chance (our choice).
_DIGITS = 16


class ChangedFile(InputError):
    """A file of a checkpoint is not as it was saved."""


def changed_file(changes: Collection[str], where: str | Path) -> ChangedFile:
    """Returns the error that names what was changed.

    Args:
        changes: What was changed, as in "labels in config.json".
        where: The checkpoint.
    """
    shown = ", ".join(list(changes)[:4]) + (", …" if len(changes) > 4 else "")
    return ChangedFile(
        f"the checkpoint was changed after it was saved: {shown:.300}",
        where=str(where),
        hint="copy or download it again; if the change is meant, mome checksum FOLDER --write accepts it",
    )


def value_sum(value: Any) -> str:
    """Returns the first digits of the SHA-256 of a JSON value; the layout of the file does not change it."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:_DIGITS]


def sums_of(values: Mapping[str, Any]) -> dict[str, str]:
    """Returns the sum of every value."""
    return {key: value_sum(value) for key, value in values.items()}


def changed_keys(values: Mapping[str, Any], sums: object, ignore: Collection[str] = ()) -> list[str]:
    """Returns the keys whose values are not those of the sums, because they were changed, added or removed.

    Args:
        values: The keys of a file that have sums.
        sums: What the file holds under `CHECKSUMS`; None, as in a file of another writer, means that nothing is known.
        ignore: Keys that are not used.
    """
    if sums is None:
        return []
    known = sums if isinstance(sums, dict) else {}
    keys = {*values, *known} - {*ignore, WEIGHTS}
    return sorted(key for key in keys if key not in values or known.get(key) != value_sum(values[key]))


def weights_sum(files: Iterable[str | Path]) -> str:
    """Returns the SHA-256 of the tensors of safetensors files: of their names, types, shapes and bytes.

    Args:
        files: Files whose headers are valid, in any order.
    """
    places = []
    maps: list[mmap.mmap] = []
    for path in files:
        with Path(path).open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
            maps.append(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        for name, entry in header.items():
            if name != "__metadata__":
                begin, end = (8 + length + offset for offset in entry["data_offsets"])
                places.append((name, entry["dtype"], entry["shape"], len(maps) - 1, begin, end))
    total = hashlib.sha256()
    for name, dtype, shape, number, begin, end in sorted(places):
        total.update(json.dumps([name, dtype, shape]).encode())
        with memoryview(maps[number]) as whole, whole[begin:end] as part:
            total.update(part)
    for mapped in maps:
        mapped.close()
    return total.hexdigest()


def file_sha256(path: Path) -> str:
    """Returns the SHA-256 of a file's bytes, by which a file that somebody has changed is recognised."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
