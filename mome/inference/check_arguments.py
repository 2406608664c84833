"""Checks of what is given to a Segmenter: numbers, the scan and the prepared prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mome.errors import InputError
from mome.inference.prepared import PreparedPrompts
from mome.module_objects import weights_sha256
from mome.processor_settings import check_overlap
from mome.volumes import Volume
from mome.volumes.dicom import DEFAULT_DICOM, DicomOptions


def check_numbers(overlap: Any, prompt_chunk: Any) -> None:
    """Checks the numbers of a Segmenter.

    Raises:
        InputError: One is of another type or out of range.
    """
    if overlap is not None:
        check_overlap(overlap)
    if not isinstance(prompt_chunk, int) or isinstance(prompt_chunk, bool) or prompt_chunk < 1:
        raise InputError(f"prompt_chunk is a whole number of at least 1, got {prompt_chunk!r:.60}")


def check_scan(scan: Any, frame: int | None, dicom: DicomOptions) -> None:
    """Checks the type of a scan, and that options of files are given with a file.

    Raises:
        InputError: The scan is of another type, or `frame` or `dicom` are given with a Volume.
    """
    if not isinstance(scan, str | Path | Volume):
        raise _no_scan(scan)
    if isinstance(scan, Volume) and (frame is not None or dicom != DEFAULT_DICOM):
        raise InputError("frame and dicom concern files, and a Volume was given", hint="leave them out")


def check_prepared(prepared: PreparedPrompts, model: Any, mirror: tuple[str, ...]) -> None:
    """Checks that prompts were embedded for this model, whose masks would else be wrong without a word.

    Args:
        prepared: The prompts.
        model: The model of the Segmenter.
        mirror: The axes along which it mirrors tiles.

    Raises:
        InputError: They were embedded for another model, or for tiles that are mirrored otherwise.
    """
    theirs = prepared.model
    if theirs is None or (theirs is model and prepared.mirror == mirror):
        return
    if prepared.mirror != mirror or weights_sha256(theirs) != weights_sha256(model):
        what = "with other mirrored axes" if prepared.mirror != mirror else "for another model"
        raise InputError(f"the prompts were prepared {what}", hint="give what prepare of this Segmenter returned")


def _no_scan(given: Any) -> InputError:
    """Returns the error for a scan of another type; an array does not say where its voxels are."""
    shape = getattr(given, "shape", None)
    of_shape = f" of shape {tuple(shape)}" if isinstance(shape, tuple) else ""
    is_image = hasattr(given, "affine") and hasattr(given, "get_fdata")
    hint = "Volume(image.get_fdata(), image.affine)" if is_image else "Volume(array, affine), array (i, j, k) in HU"
    return InputError(
        f"a scan is a path or a mome.volumes.Volume, got {type(given).__name__}{of_shape}",
        hint=f"{hint}; affine (4, 4) goes from voxels to mm in RAS",
    )
