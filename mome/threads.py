"""How many CPU threads or processes a user may ask for."""

from __future__ import annotations

import os

from mome.errors import InputError


def check_threads(count: int, option: str) -> None:
    """Checks a number of threads or processes; more than the system can start would end this process.

    Args:
        count: The number; 0 stands for a default.
        option: Its name in the error, as in "--threads".

    Raises:
        InputError: It is negative, or above 256 and above four per CPU.
    """
    most = max(256, 4 * (os.cpu_count() or 1))
    if count < 0:
        raise InputError(f"{option} is at least 0, got {count}")
    if count > most:
        raise InputError(f"{option} is at most {most}, got {count}", hint=f"this machine has {os.cpu_count()} CPUs")
