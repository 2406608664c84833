"""A command that is refused in at most three lines."""

from __future__ import annotations

from mome.cli.main import main


def refused(capsys, words: str, *arguments: object, code: int = 2) -> str:
    """Runs a command that is refused in at most three lines which contain `words`; returns what it printed."""
    assert main([str(a) for a in arguments]) == code
    printed = capsys.readouterr().err
    lines = [line for line in printed.strip().splitlines() if not line.startswith(("caching", "note:"))]
    assert 1 <= len(lines) <= 3 and "Traceback" not in printed and "bug in mome" not in printed, printed
    assert words in " ".join(printed.split()), printed
    assert len(printed) < 2000
    return printed
