"""Attributes of the headers that contradict the positions of the slices: wrong units, tilts, thicknesses, counts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mome.errors import InputError
from mome.volumes.dicom.geometry import Layout
from mome.volumes.dicom.slices import Slice

# Ratios between a length and the same length in another unit: cm, dm, m.
_UNITS = (10.0, 100.0, 1000.0)
# No scanner reconstructs slices this near, in mm, whose pixels or thicknesses are this many times larger (our choice).
_NEAR, _TIMES_THICKER = 0.7, 8.0
_NEAREST, _TIMES_LARGER = 0.25, 3.0
_LARGEST_TILT_ERROR = 1.0
# Pictures that were made smaller have a half or a quarter of their pixels along a side (our choice).
_SHRUNK, _WIDER = (2.0, 4.0), 1.05
_LARGEST_HU = 32_767.0


def check_units(slices: Sequence[Slice], where: Path) -> None:
    """Checks that distances between slices agree in their unit with the other lengths of the headers.

    Args:
        slices: Slices of one size, pixel spacing and orientation.
        where: The folder, for errors.

    Raises:
        InputError: Positions or pixel spacings seem to be in another unit than mm.
    """
    first = slices[0]
    assert first.pixel_spacing is not None and first.orientation is not None
    normal = np.cross(first.orientation[:3], first.orientation[3:])
    heights = np.unique(np.round(np.stack([image.position for image in slices]) @ normal, 6))  # type: ignore[misc]
    pixel = float(first.pixel_spacing.max())
    if len(heights) > 1:
        step = float(heights[-1] - heights[0]) / (len(heights) - 1)
        contradiction = _step_contradiction(step, pixel, first.thickness, first.slice_spacing)
        if contradiction:
            raise InputError(
                f"slices are {step:.3g} mm apart by their positions, but {contradiction}: are they in mm?",
                where=str(where),
                hint="ImagePositionPatient or the other attribute is wrong: export the series again",
            )
    width = pixel * max(first.header.rows, first.header.columns)
    if first.diameter and first.diameter > 0 and _is_unit(max(first.diameter / width, width / first.diameter)):
        raise InputError(
            f"the image is {width:.4g} mm wide by PixelSpacing, but ReconstructionDiameter is {first.diameter:.4g} mm",
            where=str(where),
            hint="PixelSpacing is wrong or not in mm: export the series again",
        )


def contradictions(slices: Sequence[Slice], layout: Layout) -> list[str]:
    """Returns notes on attributes that contradict positions. The positions are used in any case.

    Args:
        slices: One slice for every place of `layout`.
        layout: Where the slices lie.
    """
    notes, first, step = [], slices[0], layout.typical_step
    several = len(layout.places) > 1
    spacing, thickness = first.slice_spacing, first.thickness
    if several and spacing is not None and abs(abs(spacing) - step) > max(0.05 * step, 0.06):
        notes.append(
            f"SpacingBetweenSlices is {spacing:.4g} mm, but slices are {step:.4g} mm apart by their positions, which "
            "are used"
        )
    elif several and thickness is not None and thickness > 0 and step > 1.5 * thickness:
        notes.append(
            f"slices are {thickness:.4g} mm thick and {step:.4g} mm apart: slices may be missing, and what lies "
            "between them is not seen"
        )
    notes += [note for note in (_other_locations(slices, layout), _other_width(first)) if note is not None]
    if len({image.thickness for image in slices}) > 1:
        notes.append("SliceThickness differs between slices; only positions are used")
    tilts = [image.gantry_tilt for image in slices if image.gantry_tilt is not None]
    tilt = max(tilts, key=lambda angle: abs(abs(angle) - layout.tilt), default=layout.tilt)
    if several and abs(abs(tilt) - layout.tilt) > _LARGEST_TILT_ERROR:
        notes.append(
            f"GantryDetectorTilt is {tilt:.4g}°, but by the positions of the slices the tilt is "
            f"{layout.tilt:.1f}°; the positions are used"
        )
    expected = first.header.acquisition_images
    if expected and expected > len(slices) and len({image.attributes["AcquisitionNumber"] for image in slices}) == 1:
        notes.append(f"ImagesInAcquisition is {expected}, but the series has {len(slices)} slices: some may be missing")
    if any(image.header.photometric == "MONOCHROME1" for image in slices):
        notes.append("PhotometricInterpretation is MONOCHROME1, which changes the display alone: HU are not inverted")
    if len({(image.slope, image.intercept) for image in slices}) > 1:
        notes.append("RescaleSlope or RescaleIntercept differs between slices; those of each slice are used")
    if any(image.header.is_lossy for image in slices):
        notes.append("the images were compressed with loss: small structures and HU may have changed")
    return notes


def _other_locations(slices: Sequence[Slice], layout: Layout) -> str | None:
    """Returns a note where SliceLocation gives other distances between the slices than their positions.

    SliceLocation is a position along the normal or along the table, of either sign and any origin.
    """
    if len(slices) < 2 or any(image.location is None for image in slices):
        return None
    stated = np.abs(np.array([image.location for image in slices]) - slices[0].location)  # type: ignore[operator]
    positions = np.stack([image.position for image in slices]) - slices[0].position  # type: ignore[misc]
    orientation = slices[0].orientation
    assert orientation is not None
    along = (np.cross(orientation[:3], orientation[3:]), *np.eye(3))
    lengths = [*(np.abs(positions @ axis) for axis in along), np.linalg.norm(positions, axis=1)]
    apart = min(float(np.abs(stated - length).max()) for length in lengths)
    if apart <= 0.5 * layout.typical_step:
        return None
    return (
        f"SliceLocation places slices up to {apart:.4g} mm elsewhere than ImagePositionPatient does; the positions are "
        "used"
    )


def _other_width(image: Slice) -> str | None:
    """Returns a note where the width of an image suggests that its pixels were merged or padded.

    A cropped image is narrower than ReconstructionDiameter, by any ratio. One whose pixels were merged without a new
    PixelSpacing is narrower by a power of two.
    """
    assert image.pixel_spacing is not None
    width = float(image.pixel_spacing.max()) * max(image.header.rows, image.header.columns)
    if not image.diameter or image.diameter <= 0:
        return None
    is_shrunk = any(abs(image.diameter / width / ratio - 1) < 0.01 for ratio in _SHRUNK)
    if not is_shrunk and width <= _WIDER * image.diameter:
        return None
    return (
        f"the image measures {width:.4g} mm by PixelSpacing, but ReconstructionDiameter is {image.diameter:.4g} mm: "
        "was it resized without a new PixelSpacing, or cropped or padded? PixelSpacing is used"
    )


def doubtful_slices(array: np.ndarray) -> list[str]:
    """Returns notes on slices that hold one value, or the same pixels as the slice before.

    Args:
        array: (slices, rows, columns), HU, in order along the line of positions.
    """
    one_value = [bool((image == image.flat[0]).all()) for image in array]
    repeated = sum(not one_value[k] and np.array_equal(array[k], array[k - 1]) for k in range(1, len(array)))
    notes = []
    if any(one_value) and not all(one_value):
        first = one_value.index(True)
        notes.append(
            f"{sum(one_value)} slices have one value everywhere, as slice {first + 1}, {array[first].flat[0]:.4g} HU: "
            "their pixels may be lost"
        )
    if array.max() > _LARGEST_HU:
        notes.append(f"values reach {array.max():,.0f} HU, more than any metal: is PixelRepresentation right?")
    if repeated:
        notes.append(f"{repeated} slices have the same pixels as the slice before, at another place: was one copied?")
    return notes


def missing_parts(slices: Sequence[Slice]) -> str | None:
    """Says which part of a multi-frame image that was split into several files is missing, or None."""
    parts: dict[str, set[int]] = {}
    totals: dict[str, int] = {}
    for image in slices:
        if image.header.concatenation is not None:
            uid, number, total = image.header.concatenation
            parts.setdefault(uid, set()).add(number)
            totals[uid] = max(totals.get(uid, 0), total)
    for uid, numbers in parts.items():
        total = max(totals[uid], *numbers)
        if len(numbers) < total:
            return f"{len(numbers)} of {total} files of a multi-frame image that was split"
    return None


def _step_contradiction(step: float, pixel: float, thickness: float | None, spacing: float | None) -> str | None:
    """Says which length of the headers differs from the step so that only another unit explains it."""
    if spacing and _is_unit(max(abs(spacing) / step, step / abs(spacing))):
        return f"SpacingBetweenSlices is {abs(spacing):.4g} mm"
    if thickness and thickness > 0 and step < _NEAR and thickness / step >= _TIMES_THICKER:
        return f"SliceThickness is {thickness:.4g} mm"
    if step < _NEAREST and pixel / step >= _TIMES_LARGER:
        return f"pixels are {pixel:.4g} mm large"
    return None


def _is_unit(ratio: float) -> bool:
    return any(abs(ratio / unit - 1) < 0.03 for unit in _UNITS)
