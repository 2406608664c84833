"""Errors for people: what is wrong, where, and what to do, in at most three lines."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def _message(what: str, where: str | None, hint: str | None) -> str:
    lines = [what]
    if where:
        lines.append(f"  in: {where}")
    if hint:
        lines.append(f"  try: {hint}")
    return "\n".join(lines)


class InputError(ValueError):
    """Something the user gave is wrong. The command line prints it and exits with code 2.

    Args:
        what: One sentence that says what is wrong.
        where: The file, option or column it is wrong in.
        hint: What to do about it.
    """

    def __init__(self, what: str, where: str | None = None, hint: str | None = None) -> None:
        self.what, self.where, self.hint = what, where, hint
        super().__init__(_message(what, where, hint))


class OutputError(OSError):
    """A result could not be written (a full disk, a read-only folder). The command line exits with code 1."""

    def __init__(self, what: str, where: str | None = None, hint: str | None = None) -> None:
        self.what, self.where, self.hint = what, where, hint
        super().__init__(_message(what, where, hint))


# What torch says of it in a plain RuntimeError: its allocators, C++, and the libraries of a GPU.
_NO_MEMORY = (
    "DefaultCPUAllocator",
    "can't allocate memory",
    "std::bad_alloc",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)


def lacks_memory(error: BaseException) -> bool:
    """Whether an error says that memory is not enough, on the CPU or on a GPU, from Python or from torch."""
    names = {kind.__name__ for kind in type(error).__mro__}  # torch is not imported for this
    return bool(names & {"MemoryError", "OutOfMemoryError"}) or any(text in str(error) for text in _NO_MEMORY)


def is_bug(error: BaseException) -> bool:
    """Whether an error is a mistake of this package: no bad input, no error of the system, and no lack of memory."""
    return not (isinstance(error, InputError | OSError | UnicodeEncodeError) or lacks_memory(error))


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """Returns `, did you mean 'x'?` for the choice that is spelled most like `word`; an empty string if none is."""
    close = difflib.get_close_matches(word, list(choices), n=1)
    return f", did you mean '{close[0]}'?" if close else ""
