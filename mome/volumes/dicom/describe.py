"""The series of a folder in words, for a user who chooses one. Nothing that identifies the patient is in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mome.errors import InputError
from mome.volumes.dicom.contradictions import check_units
from mome.volumes.dicom.files import folder_files, read_files
from mome.volumes.dicom.geometry import lay_out
from mome.volumes.dicom.headers import require_pydicom
from mome.volumes.dicom.kinds import reason_not_hu
from mome.volumes.dicom.planes import layout_notes, regular_step
from mome.volumes.dicom.stacks import Stack, stacks_of


def list_series(folder: str | Path) -> dict[str, Any]:
    """Returns the series of a folder; only headers are read.

    Returns:
        `series`: per series `number` (for `DicomOptions.series`), `kind`, `images`, and for a CT `size` (columns,
        rows), `spacing (mm)` (columns, rows, slices), `description` where there is one, and `notes`. `damaged` and
        `without a position`: names of files with the reason, where there are any.

    Raises:
        InputError: pydicom is not installed.
    """
    folder = Path(folder)
    require_pydicom(str(folder))
    files = read_files(folder_files(folder))
    facts: dict[str, Any] = {
        "series": [_describe(number, stack, folder) for number, stack in enumerate(stacks_of(files), 1)]
    }
    if files.damaged:
        facts["damaged"] = [f"{file.name}: {file.reason}" for file in files.damaged]
    if files.unplaced:
        facts["without a position"] = [f"{file.name}: {file.reason}" for file in files.unplaced]
    if files.objects:
        facts["without an image"] = [f"{count} {kind}" for kind, count in sorted(files.objects.items())]
    return facts


def _describe(number: int, stack: Stack, folder: Path) -> dict[str, Any]:
    header = stack.header
    facts: dict[str, Any] = {"number": number, "kind": stack.not_ct or "CT", "images": stack.images}
    if header.description:
        facts["description"] = header.description
    if stack.not_ct is not None:
        return facts
    facts["size"] = [header.columns, header.rows]
    notes = list(stack.notes)
    reason = reason_not_hu(stack.slices)
    if reason is not None:
        notes.append(reason)
    try:
        check_units(stack.slices, folder)
        layout = lay_out(stack.slices, folder)
    except InputError as error:
        notes.append(error.what)
    else:
        step = layout.step or regular_step(layout.distances)
        spacing = stack.slices[0].pixel_spacing
        assert spacing is not None
        facts["spacing (mm)"] = [round(float(value), 4) for value in (spacing[1], spacing[0], layout.typical_step)]
        notes += layout_notes(layout, step)
        duplicates = sum(len(place) - 1 for place in layout.places)
        if duplicates:
            notes.append(f"{duplicates} images lie at the place of another one")
    if notes:
        facts["notes"] = notes
    return facts
