"""Reads text and JSON files that come from a user or another program, and says what is wrong with them."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from mome.errors import InputError

_OTHER_ENCODINGS = {
    b"\xff\xfe\x00\x00": "UTF-32",
    b"\x00\x00\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}


def read_text(path: str | Path, what: str, *, limit: int = 256 * 2**20) -> str:
    """Returns the text of a UTF-8 file, without a byte order mark.

    Args:
        path: The file.
        what: Its name in errors, as in "cases.json".
        limit: Largest size in bytes.

    Raises:
        InputError: The file cannot be read, is larger than `limit`, or is not UTF-8.
    """
    path = Path(path)
    try:
        if path.stat().st_size > limit:
            raise InputError(f"{what} is larger than {limit:,} bytes", where=str(path), hint="is it the right file?")
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{what} cannot be read: {error.strerror}", where=str(path), hint="check the path") from error
    for mark, encoding in _OTHER_ENCODINGS.items():
        if data.startswith(mark):
            raise InputError(f"{what} is {encoding} text, not UTF-8", where=str(path), hint="save it as UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{what} is not UTF-8 text: byte {error.start} is {data[error.start]:#04x}",
            where=str(path),
            hint="save it as UTF-8",
        ) from error


def read_table(path: str | Path, what: str, *, delimiter: str = ",") -> list[dict[str, str]]:
    """Returns the rows of a CSV or TSV file whose first line names the columns.

    Args:
        path: The file.
        what: Its name in errors, as in "cases.csv".
        delimiter: What stands between two columns.

    Raises:
        InputError: The file cannot be read, or is no table.
    """
    try:
        return [dict(row) for row in csv.DictReader(read_text(path, what).splitlines(), delimiter=delimiter)]
    except csv.Error as error:
        raise InputError(
            f"{what} is no table: {error}", where=str(path), hint="is a quotation mark not closed?"
        ) from error


def read_json(path: str | Path, what: str, *, hint: str | None = None) -> dict[str, Any]:
    """Returns the object of a JSON file; a file that holds anything but an object is refused.

    Args:
        path: The file.
        what: Its name in errors, as in "cases.json".
        hint: What to do about a file that is not valid.

    Raises:
        InputError: The file cannot be read, is not JSON, an object has a key twice, or its value is not an object.
    """
    text = read_text(path, what)
    try:
        value = json.loads(text, object_pairs_hook=without_repeated_keys)
    except RepeatedKeyError as error:
        raise InputError(f"{what} has the key {error.args[0]!r:.80} twice", where=str(path), hint=hint) from error
    except RecursionError as error:
        raise InputError(f"{what} nests too deeply", where=str(path), hint=hint) from error
    except ValueError as error:  # also for a number of more digits than Python converts
        reason = str(error).splitlines()[0][:160]
        raise InputError(f"{what} is not valid JSON: {reason}", where=str(path), hint=hint) from error
    if not isinstance(value, dict):
        raise InputError(f"{what} is a JSON object {{…}}, got {_kind(value)}", where=str(path), hint=hint)
    return value


def _kind(value: Any) -> str:
    """Returns the type of a JSON value in words."""
    words = {list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return words.get(type(value), "a number")


class RepeatedKeyError(ValueError):
    """An object of a JSON text has a key twice; the argument is the key."""


def without_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns the object of its pairs: an `object_pairs_hook` for `json.loads`, which keeps the last of equal keys.

    Raises:
        RepeatedKeyError: A key stands twice.
    """
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise RepeatedKeyError(key)
        found[key] = value
    return found
