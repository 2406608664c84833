"""A DICOM series, or a multi-frame file, as a volume in HU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mome.errors import InputError
from mome.volumes.check import checked_volume
from mome.volumes.dicom.contradictions import check_units, contradictions, doubtful_slices, missing_parts
from mome.volumes.dicom.elements import printable
from mome.volumes.dicom.files import DicomFiles, UnusableFile, folder_files, read_files
from mome.volumes.dicom.geometry import Layout, lay_out
from mome.volumes.dicom.headers import require_pydicom
from mome.volumes.dicom.kinds import reason_not_hu, series_doubts
from mome.volumes.dicom.options import DEFAULT_DICOM, DicomOptions
from mome.volumes.dicom.phases import check_one_acquisition, one_per_place
from mome.volumes.dicom.pixels import read_pixels
from mome.volumes.dicom.planes import large_gaps, largest_small_gap, layout_notes, regular_step, resample_planes
from mome.volumes.dicom.slices import Slice
from mome.volumes.dicom.source import SOURCE_KEY, SourceSlices
from mome.volumes.dicom.stacks import choose_stack, stacks_of
from mome.volumes.grid import Volume
from mome.volumes.other_files import no_scan_in, other_kind
from mome.volumes.scan_files import ENDINGS_HINT, is_dicom_folder, listed
from mome.volumes.sizes import MOST_VOXELS

_MOST_NAMED = 5
# The share of padding above which its value is doubted; a round field of view leaves 21 % of a square (our choice).
_MUCH_PADDING = 0.6


def read_dicom(path: Path, options: DicomOptions = DEFAULT_DICOM, *, frame: int | None = None) -> Volume:
    """Reads the CT series of a folder, or a multi-frame CT file, as float32 HU.

    The affine comes from ImagePositionPatient, ImageOrientationPatient and PixelSpacing of every slice; a gantry tilt
    stays in it as shear. Where the steps between slices differ, slices are interpolated linearly from where they lie
    to planes of equal steps. Duplicates and localizers are left out. `Volume.notes` says what was done.

    Args:
        path: A folder or a file.
        options: What to read and what to accept.
        frame: The time point, from 0, of a series that has several images at every place.

    Raises:
        InputError: There is no CT, or there are several series and none is chosen; a slice is damaged or does not say
            where it lies; slices are shifted in their plane; there is a gap that could hide a structure; images at one
            place differ and no phase is chosen; slices of several acquisitions take turns; lengths are not in mm; the
            patient is an animal; values are not HU; or a package is not installed.
    """
    require_pydicom(str(path))
    files = read_files(folder_files(path) if path.is_dir() else [path])
    stacks = stacks_of(files)
    if not stacks:
        raise _nothing_to_read(files, path)
    stack = choose_stack(stacks, options.series, path)
    if path.is_file() and stack.header.frames == 1:
        raise InputError(
            "the file holds one slice of a series", where=str(path), hint="give the folder that holds the whole series"
        )
    notes = list(stack.notes)
    unusable = [
        file for file in files.damaged + files.unplaced if file.series_uid in (None, "", stack.header.series_uid)
    ]
    notes += _left_out(unusable, options, path)
    elsewhere = [file.name for file in files.damaged + files.unplaced if file not in unusable]
    if elsewhere:
        named = ", ".join(elsewhere[:_MOST_NAMED]) + (", …" if len(elsewhere) > _MOST_NAMED else "")
        notes.append(f"{len(elsewhere)} damaged files name another series in their headers and are not read: {named}")
    below = [folder.name for folder in listed(path) if is_dicom_folder(folder)] if path.is_dir() else []
    if below:
        named = ", ".join(printable(name) for name in below[:_MOST_NAMED])
        notes.append(f"{len(below)} folders inside hold DICOM files, too, which are not read: {named}")
    if not stack.header.series_uid:
        notes.append("the slices have no SeriesInstanceUID: all with one SeriesNumber are taken for one series")
    if files.objects:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(files.objects.items()))
        notes.append(f"files without an image are not read: {kinds}")
    if len({image.header.origin for image in stack.slices}) > 1:
        raise InputError(
            "the slices of the series come from several patients, studies, frames of reference or kernels",
            where=str(path),
            hint="give a folder with the slices of one of them",
        )
    reason = reason_not_hu(stack.slices)
    if reason is not None:
        raise InputError(
            f"the series is no CT in HU: {reason}", where=str(path), hint="give a series whose values are HU"
        )
    if stack.header.is_animal:
        raise InputError(
            "AnatomicalOrientationType is QUADRUPED: the axes of the positions are those of an animal",
            where=str(path),
            hint="only scans of people are segmented",
        )
    notes += series_doubts(stack.slices)
    bare = [image for image in stack.slices if image.slope is None or image.intercept is None]
    if not any(image.has_rescale for image in stack.slices):
        notes.append("the slices have neither RescaleSlope nor RescaleIntercept: slope 1 and intercept 0 are used")
        bare = []
    elif len(bare) == len(stack.slices):
        raise InputError(
            "no slice has both a valid RescaleSlope and a valid RescaleIntercept",
            where=str(path),
            hint="export the series again, or give a series whose values are HU",
        )
    notes += _left_out(
        [UnusableFile(image.name, "no valid RescaleSlope or RescaleIntercept") for image in bare], options, path
    )
    slices = [image for image in stack.slices if image not in bare]
    missing = missing_parts(slices)
    if missing is not None:
        notes += _left_out([UnusableFile(missing, "the others are missing")], options, path)
    _check_size(slices, path)
    check_units(slices, path)
    _check_gaps(lay_out(slices, path), options, path)  # before pixels are decoded
    array, damaged, padded, foreign = read_pixels(slices)
    notes += _left_out([UnusableFile(slices[k].name, why) for k, why in damaged.items()], options, path)
    kept = [k for k in range(len(slices)) if k not in damaged]
    if not kept:
        raise InputError("no slice of the series can be read", where=str(path), hint="copy or download it again")
    if damaged:
        slices, array = [slices[k] for k in kept], array[kept]
    if padded:
        share = padded / array.size
        much = f", {share:.0%} of all: is PixelPaddingValue right?" if share > _MUCH_PADDING else ""
        notes.append(f"{padded} pixels have the padding value and are read as air{much}")
    if foreign:
        notes.append(f"{foreign} pixels have bits above HighBit, as of an overlay, which are left out")
    if any(image.header.bits[2] + 1 != image.header.bits[1] for image in slices):
        notes.append("HighBit is not BitsStored − 1: values are read from the upper bits, as the old standard says")
    return _volume(slices, array, options, path, frame, notes)


def _volume(
    slices: list[Slice], array: np.ndarray, options: DicomOptions, path: Path, frame: int | None, notes: list[str]
) -> Volume:
    """Puts decoded slices onto a regular grid.

    Args:
        slices: The slices in any order.
        array: (slices, rows, columns), HU.
        options: What to accept.
        path: The folder, for errors.
        frame: The time point of a series that has several.
        notes: Notes so far.
    """
    layout = lay_out(slices, path)
    _check_gaps(layout, options, path)
    chosen = one_per_place(layout, slices, array, frame, path, notes)
    used = [slices[k] for k in chosen]
    notes += check_one_acquisition(used, layout, path)
    notes += contradictions(used, layout)
    notes += doubtful_slices(array if chosen == list(range(len(slices))) else array[chosen])
    if chosen != list(range(len(slices))):
        array = array[chosen]
    if layout.step is None:
        step = regular_step(layout.distances)
        voxels = resample_planes(array, layout, step, path)
    else:
        step = layout.step
        voxels = np.ascontiguousarray(array.transpose(2, 1, 0))
    if len(layout.places) == 1:
        notes.append(f"the series has one slice; its thickness, {step:.4g} mm, is the size of its voxels")
    notes += layout_notes(layout, step)
    # A qform cannot hold shear; code 0 tells readers to take the sform alone.
    header: dict[str, Any] = {"sform_code": 1, "qform_code": 0 if layout.is_sheared else 1, "xyzt_units": 2}
    shape: Any = voxels.shape
    header[SOURCE_KEY] = SourceSlices(used, layout.distances, step, layout.step is not None, shape)
    return checked_volume(Volume(voxels, layout.affine(step), header, tuple(notes)), str(path))


def _check_size(slices: Sequence[Slice], path: Path) -> None:
    """Refuses a size that cannot be that of a CT before memory is taken for it."""
    header = slices[0].header
    if header.rows * header.columns * len(slices) > MOST_VOXELS:
        raise InputError(
            f"the series has {header.columns} × {header.rows} × {len(slices)} voxels, more than can be read",
            where=str(path),
            hint="check Rows and Columns in its headers, or split the series",
        )


def _check_gaps(layout: Layout, options: DicomOptions, path: Path) -> None:
    gaps = large_gaps(layout)
    if gaps and not options.allow_gaps:
        steps = np.diff(layout.distances)
        largest, after = steps.max(), int(steps.argmax()) + 1
        raise InputError(
            f"slices are missing: a gap of {largest:.4g} mm after slice {after} of {len(steps) + 1}, where they are "
            f"{layout.typical_step:.4g} mm apart; up to {largest_small_gap(layout):.4g} mm are interpolated",
            where=str(path),
            hint="copy the series again, or --allow-gaps (in Python DicomOptions(allow_gaps=True)) for air in the gap",
        )


def _left_out(unusable: Sequence[UnusableFile], options: DicomOptions, path: Path) -> list[str]:
    """Returns notes about files that are left out.

    Raises:
        InputError: There are such files and `allow_damaged` is not set.
    """
    if not unusable:
        return []
    named = "; ".join(f"{file.name} ({file.reason})" for file in unusable[:_MOST_NAMED])
    more = f"; and {len(unusable) - _MOST_NAMED} more" if len(unusable) > _MOST_NAMED else ""
    count = "1 slice" if len(unusable) == 1 else f"{len(unusable)} slices"
    if not options.allow_damaged:
        raise InputError(
            f"{count} cannot be read: {named}{more}",
            where=str(path),
            hint="copy or export the series again, or --allow-damaged (in Python DicomOptions(allow_damaged=True))",
        )
    return [f"{count} left out: {named}{more}"]


def _nothing_to_read(files: DicomFiles, path: Path) -> InputError:
    """Returns the error for a folder without images that could be read."""
    if files.unplaced:
        file = files.unplaced[0]
        return InputError(
            f"the series does not say where its slices lie: {len(files.unplaced)} files have {file.reason}",
            where=str(path),
            hint="export the series again from the archive or the scanner",
        )
    if files.damaged:
        file = files.damaged[0]
        other = other_kind(path / file.name) if path.is_dir() else None
        return InputError(
            f"no DICOM image can be read: {file.name} ({file.reason})",
            where=str(path),
            hint=other[1] if other is not None else "copy or export the series again",
        )
    if files.objects:
        kinds = ", ".join(sorted(files.objects))
        return InputError(f"not a CT but {kinds}, without an image", where=str(path), hint="give a CT series")
    if path.is_dir():
        return no_scan_in(path)
    return InputError("not a DICOM image", where=str(path), hint=f"give a DICOM series, or {ENDINGS_HINT}")
