"""What is said of a label that the class table does not have under this name."""

from __future__ import annotations

from mome.errors import InputError, did_you_mean
from mome.labels.table import load_table


def unknown_label(name: str, hint: str = "mome list labels") -> InputError:
    """Returns the error for a label that is not in the class table; it names the label where `name` is a synonym.

    Args:
        name: What was given.
        hint: What to do where it is no synonym.
    """
    table = load_table()
    meant = table.names_of(name) if name.strip() else ()
    if meant:
        what = "another name for" if len(meant) == 1 else "a name for"
        return InputError(
            f"{name!r:.60} is {what} {', '.join(meant[:8])}, and labels are named as in the class table",
            hint=f"labels: [{', '.join(meant[:8])}]",
        )
    return InputError(f"{name!r:.60} is not a label of the class table{did_you_mean(name, table.names())}", hint=hint)
