"""Errors of the package in the words of the server's clients: fields of the form instead of options of the command."""

from __future__ import annotations

import re

_REPLACED = (
    (re.compile(r"\s*\(in Python [^()]*(?:\([^()]*\))?[^()]*\)"), ""),
    (re.compile(r", in Python [^;]*"), ""),
    (re.compile(r"(?:^|; )mome info lists them"), ""),
    (re.compile(r"mome list labels shows the class table"), "GET /capabilities lists the labels"),
    (re.compile(r"mome list labels"), "the labels of GET /capabilities"),
    (re.compile(r"give the folder of the DICOM series"), "upload the files of the DICOM series"),
    (re.compile(r"give the folder that holds the whole series"), "upload all files of the series"),
    (re.compile(r"a larger --memory(?: \([^()]*\))?, "), ""),
    (re.compile(r"--writer (\w+)"), r"output=\1"),
    (re.compile(r"(?:mome segment )?--(frame|series) (\w+)"), r"\1=\2"),
    (re.compile(r"--(frame|series)\b"), r"\1"),
    (re.compile(r"--allow-(gaps|damaged)\b"), r"allow_\1=true"),
)


def in_client_words(hint: str | None) -> str | None:
    """Returns the hint of an error with fields of `POST /jobs` in it; None where it says nothing to a client."""
    if hint is None:
        return None
    for pattern, words in _REPLACED:
        hint = pattern.sub(words, hint)
    return hint or None
