"""Turns what a command raises into a message on stderr and an exit code.

| code | meaning |
|---|---|
| 0 | success |
| 1 | a bug of mome, or a write that failed, as on a full disk |
| 2 | something that the user can mend: an option, a file, a setting |
| 130 | stopped by Ctrl-C |
| 143 | stopped by SIGTERM |
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType

from mome.errors import InputError, OutputError, lacks_memory
from mome.printable import printable

INTERRUPTED, TERMINATED = 130, 143
_LONGEST = 1000  # characters of a line; lists of choices in hints are this long


class Terminated(KeyboardInterrupt):
    """The process received SIGTERM. Temporary files are removed as after Ctrl-C."""


def guarded(run: Callable[[], int | None], *, debug: bool = False) -> int:
    """Runs a command and prints its errors on stderr, in at most three lines.

    Args:
        run: The command; returns an exit code, or None for 0.
        debug: Raises errors instead of printing them.

    Returns:
        The exit code.
    """
    code = _guarded(run, debug)
    # What is still buffered is written here: at the interpreter's exit a failure could not be told.
    try:
        if sys.stdout is not None and not sys.stdout.closed:
            sys.stdout.flush()
    except BrokenPipeError:
        _drop_stdout()
        return code or 1
    except OSError as error:
        _drop_stdout()
        _say(_red(f"the output could not be written: {error.strerror}\n  in: standard output"))
        return code or 1
    return code


def _guarded(run: Callable[[], int | None], debug: bool) -> int:
    _print_whatever_the_locale()
    try:
        with _sigterm_raises():
            return run() or 0
    except SystemExit as stop:  # raised by argparse for --help
        return stop.code if isinstance(stop.code, int) else int(bool(stop.code))
    except BrokenPipeError:
        _drop_stdout()
        return 1
    except Terminated:
        _say("stopped by SIGTERM")
        return TERMINATED
    except KeyboardInterrupt:
        _say("stopped")
        return INTERRUPTED
    except Exception as error:
        if debug:
            raise
        code, lines = describe(error)
        _say(_red("\n".join(lines)))
        return code


def describe(error: Exception) -> tuple[int, list[str]]:
    """Returns the exit code of an error and the lines to print."""
    if isinstance(error, InputError | OutputError):
        lines = [_cut(line) for line in printable(error.what, keep="\n").split("\n")]
        lines += [f"  in: {printable(error.where)}"] if error.where else []
        lines += [f"  try: {_cut(printable(error.hint))}"] if error.hint else []
        return (2 if isinstance(error, InputError) else 1), lines
    if isinstance(error, OSError):
        from mome.atomic import NO_SPACE  # here, because `mome --help` needs none of what it imports

        lines = [printable(error.strerror or str(error))]
        if error.filename:
            lines += [f"  in: {printable(_text(error.filename))}"]
        elif error.errno in NO_SPACE:
            lines = [f"a write failed: {lines[0]}", "  try: free some disk space; is the output redirected to a file?"]
        # A path that is missing or may not be used can be mended; a full or broken disk is no mistake of the user.
        mendable = error.filename is not None and error.errno is not None and error.errno not in NO_SPACE
        return (2 if mendable else 1), lines
    if isinstance(error, UnicodeEncodeError):
        return 2, [
            printable(f"a name or a text cannot be written in the encoding {error.encoding} of this locale"),
            f"  in: {printable(error.object[:120])}",
            "  try: set the environment variable PYTHONUTF8=1",
        ]
    if lacks_memory(error):
        found = re.search(r"allocate (\d+) bytes", str(error))
        size = f": {int(found[1]) / 1e9:,.0f} GB at once" if found else ""
        return 2, [f"the memory of this machine is not enough{size}", "  try: a smaller model, patch or scan"]
    first = printable((str(error).strip().splitlines() or [""])[0][:200])
    return 1, [
        f"{type(error).__name__}: {first}",
        "  this is a bug in mome: run again with --debug and report the traceback",
    ]


def _cut(line: str) -> str:
    """Shortens a line that quotes a long text of the user."""
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]}…"


def _text(name: object) -> str:
    return os.fsdecode(name) if isinstance(name, bytes) else str(name)


def _drop_stdout() -> None:
    """Lets the interpreter's last flush of stdout succeed, which would else print an error of its own."""
    with contextlib.suppress(OSError, ValueError):  # a stream that was replaced has no descriptor
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def _red(text: str) -> str:
    """Returns red text, if stderr is a terminal and the environment variable NO_COLOR is not set."""
    return f"\033[31m{text}\033[0m" if sys.stderr.isatty() and "NO_COLOR" not in os.environ else text


def _print_whatever_the_locale() -> None:
    """Characters that the terminal's encoding lacks are printed as escapes instead of ending the command."""
    for stream in (sys.stdout, sys.stderr):
        if getattr(stream, "errors", None) in ("strict", "surrogateescape"):
            with contextlib.suppress(AttributeError, ValueError):  # a stream that was replaced, as in notebooks
                stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


@contextlib.contextmanager
def _sigterm_raises() -> Iterator[None]:
    """Lets SIGTERM raise `Terminated` during the block; a second SIGTERM ends the process at once."""

    def stop(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise Terminated

    # Signals can be handled in the main thread only; a handler that somebody else set is left alone.
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
