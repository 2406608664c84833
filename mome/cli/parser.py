"""An argument parser that raises `InputError`, and the types of paths among its arguments."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import NoReturn

from mome.errors import InputError, did_you_mean
from mome.volumes.scan_files import scan_ending


class Parser(argparse.ArgumentParser):
    """An argparse parser that raises `InputError` instead of exiting. Options cannot be abbreviated."""

    def __init__(self, **kwargs: object) -> None:
        super().__init__(allow_abbrev=False, **kwargs)  # type: ignore[arg-type]

    def error(self, message: str) -> NoReturn:
        """Called by argparse for bad arguments.

        Raises:
            InputError: Always.
        """
        unknown = re.match(r"unrecognized arguments: (--?[\w-]+)", message)
        close = did_you_mean(unknown[1], self._option_string_actions) if unknown else ""
        raise InputError(" ".join(message.split())[:300] + close, hint=f"{self.prog} --help")

    def parse_intermixed_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def]
        """Parses arguments as argparse does, and refuses options whose value is empty.

        An unset variable of the shell, as in `-m "$MODEL"`, would otherwise stand for the default without a word.

        Raises:
            InputError: The arguments are wrong, or the value of an option is empty.
        """
        parsed = super().parse_intermixed_args(args, namespace)
        for action in self._actions:
            value = getattr(parsed, action.dest, None)
            if action.option_strings and isinstance(value, str) and not value.strip():
                name = "/".join(action.option_strings)
                raise InputError(f"the value of {name} is empty", hint=f"give a value, or leave {name} out")
        return parsed


def given_path(text: str) -> Path:
    """Returns the path of an input; an empty text, such as an unset variable of the shell, would be this folder.

    Raises:
        argparse.ArgumentTypeError: The text is empty.
    """
    if not text.strip():
        raise argparse.ArgumentTypeError("the path is empty; give a path, or . for this folder")
    return Path(text)


def output_folder(text: str) -> Path:
    """Returns the path of a folder that results are written to.

    Raises:
        argparse.ArgumentTypeError: The text is empty, or names a scan that is not there. Whether what is there is a
            folder, `mome.atomic.check_output_folder` says.
    """
    path = given_path(text)
    if scan_ending(path) is not None and not path.exists():
        raise argparse.ArgumentTypeError(
            f"{text} is the name of a file, results go into a folder; give a folder, as in -o masks"
        )
    return path
