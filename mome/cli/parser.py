"""An argument parser that raises `InputError`."""

from __future__ import annotations

import argparse
from typing import NoReturn

from mome.errors import InputError


class Parser(argparse.ArgumentParser):
    """An argparse parser that raises `InputError` instead of exiting. Options cannot be abbreviated."""

    def __init__(self, **kwargs: object) -> None:
        super().__init__(allow_abbrev=False, **kwargs)  # type: ignore[arg-type]

    def error(self, message: str) -> NoReturn:
        """Called by argparse for bad arguments.

        Raises:
            InputError: Always.
        """
        raise InputError(" ".join(message.split())[:300], hint=f"{self.prog} --help")
