"""An argument parser whose errors have the form of all our errors."""

from __future__ import annotations

import argparse
from typing import NoReturn

from mome.errors import InputError


class Parser(argparse.ArgumentParser):
    """argparse, raising InputError instead of exiting; options are never abbreviated."""

    def __init__(self, **kwargs: object) -> None:
        super().__init__(allow_abbrev=False, **kwargs)  # type: ignore[arg-type]

    def error(self, message: str) -> NoReturn:
        """Bad arguments."""
        raise InputError(message, hint=f"{self.prog} --help")
