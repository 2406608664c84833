"""Errors for people: what is wrong, where, and what to do, in at most three lines."""

from __future__ import annotations


class InputError(ValueError):
    """Something the user gave is wrong. The command line prints it and exits with code 2.

    Args:
        what: One sentence that says what is wrong.
        where: The file, option or column it is wrong in.
        hint: What to do about it.
    """

    def __init__(self, what: str, where: str | None = None, hint: str | None = None) -> None:
        self.what, self.where, self.hint = what, where, hint
        lines = [what]
        if where:
            lines.append(f"  in: {where}")
        if hint:
            lines.append(f"  try: {hint}")
        super().__init__("\n".join(lines))


class OutputError(OSError):
    """A result could not be written (a full disk, a read-only folder). The command line exits with code 1."""

    def __init__(self, what: str, where: str | None = None, hint: str | None = None) -> None:
        self.what, self.where, self.hint = what, where, hint
        lines = [what] + ([f"  in: {where}"] if where else []) + ([f"  try: {hint}"] if hint else [])
        super().__init__("\n".join(lines))
