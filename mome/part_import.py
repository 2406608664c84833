"""Imports the class of a part, and says in words why that fails."""

from __future__ import annotations

import importlib
from typing import Any

from mome.errors import InputError


def import_part(target: str, part: str, *, package: str, extra: str | None) -> Any:
    """Returns what "package.module:Class" names.

    Args:
        target: The place of the class.
        part: The part in words, as in "expert 'mlp'".
        package: The package that registered it.
        extra: The extra of `mome` that installs what the module imports, or None.

    Raises:
        InputError: The module or the class does not exist, or the module fails when it is imported.
    """
    path, _, attribute = target.partition(":")
    try:
        return getattr(importlib.import_module(path), attribute)
    except AttributeError as error:
        raise InputError(
            f"{part} is registered as {target!r}, which does not exist",
            hint=f"is the class spelled so in {path}? It was registered by {package}",
        ) from error
    except InputError as error:  # the module declares a part in a way that is refused
        raise InputError(error.what, where=f"{part}: {target}, of the package {package}", hint=error.hint) from error
    except (SyntaxError, RuntimeError, NameError, TypeError) as error:
        raise InputError(
            f"{part} cannot be imported: {type(error).__name__}: {error}"[:300],
            where=f"{target}, of the package {package}",
            hint="uninstall or mend that package",
        ) from error
    except ImportError as error:
        missing = getattr(error, "name", None) or str(error)
        raise InputError(
            f"{part} needs {missing}, which is not installed",
            hint=f"pip install 'mome[{extra}]'" if extra else f"pip install {missing}",
        ) from error
