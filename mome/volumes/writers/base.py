"""What every mask writer has."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

from mome.errors import InputError
from mome.spec import canonical
from mome.volumes.grid import Volume
from mome.volumes.mask_set import MaskSet
from mome.volumes.writers import WRITERS


class MaskWriter(Protocol):
    """Writes the masks of a scan in one file format. `mome.volumes.mask_names` names the files.

    Attributes:
        ending: Ending of its files, with the dot.
        separate: Whether every structure gets a file of its own; False where one file holds all structures.
        multilabel: Whether it can also write one map of ids, in which structures do not overlap.
    """

    ending: ClassVar[str]
    separate: ClassVar[bool]
    multilabel: ClassVar[bool]

    def check_source(self, source: Path | None) -> None:
        """Checks, before the network runs, that masks of this scan can be written.

        Args:
            source: The scan's file or DICOM folder; None where the scan was passed as an array.

        Raises:
            InputError: The format needs something that this scan lacks, such as a DICOM series.
        """
        ...

    def check_volume(self, volume: Volume) -> None:
        """Checks, once the scan was read and before the network runs, that masks of it can be written.

        Args:
            volume: The scan; its files are still there.

        Raises:
            InputError: The format needs something that the files which were read lack, such as UIDs.
        """
        ...

    def write(self, path: Path, masks: MaskSet, *, multilabel: bool = False) -> Sequence[str] | None:
        """Writes one file: complete, or not at all.

        Args:
            path: Where the file goes; its folder may be missing.
            masks: What the file holds: a single structure where files are separate.
            multilabel: Write one map of ids.

        Returns:
            Sentences for the user about what the file holds otherwise than the masks; None for nothing to say.

        Raises:
            OutputError: The file cannot be written; nothing is left behind.
        """
        ...


def one_file_per_structure(writer: MaskWriter, *, multilabel: bool) -> bool:
    """Says whether `writer` makes a file for every structure.

    Raises:
        InputError: `multilabel` is asked of a writer that writes no map of ids.
    """
    if multilabel and not writer.multilabel:
        raise InputError(
            f"{type(writer).__name__} writes no map of ids", hint="leave out multilabel, or choose writer='nifti'"
        )
    return writer.separate and not multilabel


def build_writer(spec: str | dict[str, Any]) -> MaskWriter:
    """Builds a writer from its config string or dict.

    In a config string a bare word names a part. Writers contain no parts, so a word is text here, and
    `dicom_seg(kind=binary)` needs no second pair of quotes on a command line.

    Raises:
        InputError: There is no such writer, it has no such argument, or a package that it needs is not installed.
    """
    given = canonical(spec)
    words = {
        key: value["name"] if isinstance(value, dict) and list(value) == ["name"] else value
        for key, value in given.items()
    }
    return WRITERS.build(words)
