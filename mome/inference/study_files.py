"""Files that a study may have beside its masks: a page, a preview, and maps of uncertainty.

A new kind is one entry of `KINDS`. Pages and previews lie beside the masks; maps lie in folders of their own, so that
they are not taken for masks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mome.errors import InputError, did_you_mean
from mome.inference.result import Segmentation
from mome.inference.uncertainty_files import write_disagreement, write_maps
from mome.volumes import Volume
from mome.volumes.mask_names import mask_name, structure_parts


@dataclass(frozen=True)
class Kind:
    """One kind of file.

    Attributes:
        names: Returns the paths of a scan's files below the folder of the masks, from the scan's part of file names and
            the names of the structures.
        write: Writes them and returns their paths: of a result, its scan (None where `reads_scan` is false), the
            folder, and the scan's part of file names.
        reads_scan: Whether the CT is needed.
        options: What `Segmenter.segment` is asked for.
    """

    names: Callable[[str, Sequence[str]], list[str]]
    write: Callable[[Segmentation, Any, Path, str], list[Path]]
    reads_scan: bool = False
    options: tuple[str, ...] = ()


def _per_structure(kind: str) -> Callable[[str, Sequence[str]], list[str]]:
    return lambda scan, structures: [f"{kind}/{mask_name(scan, part)}" for part in structure_parts(structures)]


def _write_page(result: Segmentation, volume: Volume, folder: Path, scan: str) -> list[Path]:
    return [result.save_html(folder / f"{scan}.html", volume, scan)]


def _write_preview(result: Segmentation, volume: Volume, folder: Path, scan: str) -> list[Path]:
    from mome.viz.preview import save_preview

    return [save_preview(folder / f"{scan}_preview.png", volume, result.masks)]


KINDS = {
    "html": Kind(lambda scan, structures: [f"{scan}.html"], _write_page, reads_scan=True),
    "preview": Kind(lambda scan, structures: [f"{scan}_preview.png"], _write_preview, reads_scan=True),
    "probabilities": Kind(
        _per_structure("probabilities"),
        lambda result, volume, folder, scan: write_maps(result, folder, scan, "probabilities"),
        options=("probabilities",),
    ),
    "entropy": Kind(
        _per_structure("entropy"),
        lambda result, volume, folder, scan: write_maps(result, folder, scan, "entropy"),
        options=("probabilities",),
    ),
    "disagreement": Kind(
        lambda scan, structures: [f"disagreement/{mask_name(scan, None)}"],
        lambda result, volume, folder, scan: write_disagreement(result, folder, scan),
        options=("disagreement",),
    ),
}


def checked_kinds(kinds: Iterable[str]) -> tuple[str, ...]:
    """Returns kinds of files in the order of `KINDS`, each once.

    Raises:
        InputError: There is no such kind.
    """
    asked = set(kinds)
    for kind in asked:
        if kind not in KINDS:
            raise InputError(
                f"there is no kind of file {kind!r:.40}{did_you_mean(str(kind), KINDS)}", hint=", ".join(KINDS)
            )
    return tuple(kind for kind in KINDS if kind in asked)


def reads_scan(kinds: Iterable[str]) -> bool:
    """Says whether one of the kinds needs the CT."""
    return any(KINDS[kind].reads_scan for kind in kinds)


def segment_options(kinds: Iterable[str]) -> dict[str, bool]:
    """Returns what `Segmenter.segment` is asked for."""
    return {option: True for kind in kinds for option in KINDS[kind].options}


def file_names(kinds: Iterable[str], scan: str, structures: Sequence[str]) -> list[str]:
    """Returns the paths of a scan's files below the folder of the masks."""
    return [name for kind in kinds for name in KINDS[kind].names(scan, structures)]


def write_files(
    kinds: Iterable[str], result: Segmentation, volume: Volume | None, folder: Path, scan: str
) -> list[Path]:
    """Writes the files of one scan and returns their paths.

    Args:
        kinds: Names of `KINDS`.
        result: The result.
        volume: The CT in HU, where one of the kinds needs it.
        folder: The folder of the masks.
        scan: The scan's part of file names.

    Raises:
        OutputError: A file cannot be written.
    """
    return [path for kind in kinds for path in KINDS[kind].write(result, volume, folder, scan)]
