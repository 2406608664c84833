"""Where DICOM objects made of masks put them, read with pydicom alone, and by the place of every pixel in the world."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from matplotlib.path import Path as Outline

from mome.volumes import Volume
from mome.volumes.mask_set import MaskSet

Slices = dict[tuple[str, int], np.ndarray]
"""(SOPInstanceUID, frame from 1; 0 for a file of one frame) → (rows, columns, 3) LPS mm of every pixel."""


def pixel_places(position: Any, orientation: Any, spacing: Any, rows: int, columns: int) -> np.ndarray:
    row, column = np.reshape(np.asarray(orientation, dtype=float), (2, 3))
    j, i = np.mgrid[:rows, :columns].astype(float)
    return (
        np.asarray(position, dtype=float)
        + i[..., None] * float(spacing[1]) * row
        + j[..., None] * float(spacing[0]) * column
    )


def source_places(folder: Path) -> Slices:
    """The places of the pixels of every slice of a series, from its own headers."""
    found: Slices = {}
    for path in sorted(folder.iterdir()):
        header = pydicom.dcmread(path)
        if "PerFrameFunctionalGroupsSequence" not in header:
            found[header.SOPInstanceUID, 0] = pixel_places(
                header.ImagePositionPatient,
                header.ImageOrientationPatient,
                header.PixelSpacing,
                header.Rows,
                header.Columns,
            )
            continue
        shared = header.SharedFunctionalGroupsSequence[0]
        for number, frame in enumerate(header.PerFrameFunctionalGroupsSequence, 1):
            found[header.SOPInstanceUID, number] = pixel_places(
                frame.PlanePositionSequence[0].ImagePositionPatient,
                shared.PlaneOrientationSequence[0].ImageOrientationPatient,
                shared.PixelMeasuresSequence[0].PixelSpacing,
                header.Rows,
                header.Columns,
            )
    return found


def seg_frames(path: Path) -> list[tuple[int, np.ndarray, np.ndarray, tuple[str, int]]]:
    """Per frame and segment of a SEG: the number, the mask (rows, columns), the pixels' places, the source slice."""
    seg = pydicom.dcmread(path)
    pixels = np.reshape(seg.pixel_array, (seg.NumberOfFrames, seg.Rows, seg.Columns))
    shared, found = seg.SharedFunctionalGroupsSequence[0], []
    for frame, array in zip(seg.PerFrameFunctionalGroupsSequence, pixels, strict=True):
        places = pixel_places(
            frame.PlanePositionSequence[0].ImagePositionPatient,
            shared.PlaneOrientationSequence[0].ImageOrientationPatient,
            shared.PixelMeasuresSequence[0].PixelSpacing,
            seg.Rows,
            seg.Columns,
        )
        (item,) = frame.DerivationImageSequence[0].SourceImageSequence
        source = (item.ReferencedSOPInstanceUID, int(item.get("ReferencedFrameNumber", 0)))
        if seg.SegmentationType == "LABELMAP":
            numbers = [n for n in np.unique(array) if n]
            found += [(int(n), array == n, places, source) for n in numbers]
        else:
            group = frame if "SegmentIdentificationSequence" in frame else shared
            found.append(
                (int(group.SegmentIdentificationSequence[0].ReferencedSegmentNumber), array > 0, places, source)
            )
    return found


def seg_numbers(path: Path) -> dict[str, int]:
    """Label → segment number, without the background."""
    return {
        item.SegmentLabel: item.SegmentNumber for item in pydicom.dcmread(path).SegmentSequence if item.SegmentNumber
    }


def masks_of_seg(path: Path, source: Slices) -> dict[str, dict[tuple[str, int], np.ndarray]]:
    """Label → slice → mask (rows, columns). Every frame must lie exactly on the slice that it refers to."""
    names = {number: name for name, number in seg_numbers(path).items()}
    found: dict[str, dict[tuple[str, int], np.ndarray]] = {name: {} for name in names.values()}
    for number, mask, places, slice_id in seg_frames(path):
        np.testing.assert_allclose(places, source[slice_id], atol=0.02)
        assert slice_id not in found[names[number]]
        found[names[number]][slice_id] = mask
    return found


def masks_of_structure_set(path: Path, source: Slices) -> dict[str, dict[tuple[str, int], np.ndarray]]:
    """Label → slice → mask: pixels whose centres are inside an odd number of the slice's polygons (even-odd rule)."""
    read = pydicom.dcmread(path)
    names = {item.ROINumber: item.ROIName for item in read.StructureSetROISequence}
    found: dict[str, dict[tuple[str, int], np.ndarray]] = {name: {} for name in names.values()}
    for roi in read.ROIContourSequence:
        for contour in roi.get("ContourSequence", []):
            (item,) = contour.ContourImageSequence
            slice_id = (item.ReferencedSOPInstanceUID, int(item.get("ReferencedFrameNumber", 0)))
            places = source[slice_id]
            origin, along, down = places[0, 0], places[0, 1] - places[0, 0], places[1, 0] - places[0, 0]
            points = np.asarray(contour.ContourData, dtype=float).reshape(-1, 3) - origin
            assert contour.NumberOfContourPoints == len(points)
            at = np.stack([points @ along / (along @ along), points @ down / (down @ down)], axis=1)
            off = points - at @ np.stack([along, down])
            assert np.abs(off).max() < 0.02  # the contour lies in the plane of its slice
            mask = np.zeros(places.shape[:2], bool)
            # Pixels outside of the box around a polygon are outside of the polygon.
            low, high = np.floor(at.min(axis=0)).astype(int), np.ceil(at.max(axis=0)).astype(int) + 1
            columns, rows = (slice(max(a, 0), max(b, 0)) for a, b in zip(low, high, strict=True))
            j, i = np.mgrid[: mask.shape[0], : mask.shape[1]][:, rows, columns]
            inside = Outline(np.vstack([at, at[:1]])).contains_points(np.stack([i.ravel(), j.ravel()], axis=1))
            mask[rows, columns] = inside.reshape(i.shape)
            held = found[names[roi.ReferencedROINumber]]
            held[slice_id] = held[slice_id] ^ mask if slice_id in held else mask
    return found


def dice_in_world(
    found: dict[tuple[str, int], np.ndarray], source: Slices, inside: Callable[[np.ndarray], np.ndarray]
) -> float:
    """Dice of masks on slices with a body that is given by a function of LPS mm, over all pixels of all slices."""
    common = total = 0
    for slice_id, places in source.items():
        truth = inside(places)
        mask = found.get(slice_id, np.zeros(truth.shape, bool))
        common += int((mask & truth).sum())
        total += int(mask.sum()) + int(truth.sum())
    return 2 * common / total


def mask_set(volume: Volume, folder: Path | None, **bodies: Any) -> MaskSet:
    """Masks of bodies: functions of LPS mm, or arrays (i, j, k). `_` in names of free text stands for a space."""
    at = np.stack(np.meshgrid(*map(np.arange, volume.shape), indexing="ij"), -1).astype(float)
    lps = (at @ volume.affine[:3, :3].T + volume.affine[:3, 3]) * (-1, -1, 1)
    from mome.labels import load_table

    table, masks, labels = load_table(), {}, []
    for number, (name, body) in enumerate(bodies.items()):
        masks[name] = np.asarray(body(lps) if callable(body) else body).astype(np.uint8)
        label = table[name] if name in table else None
        labels.append(
            {
                "id": label.id if label else 900 + number,
                "name": name,
                "snomed": label.snomed if label else None,
                "color": list(label.color) if label else [255, 255, 255],
            }
        )
    voxels = {name: int(mask.sum()) for name, mask in masks.items()}
    return MaskSet(masks, labels, voxels, volume.grid, volume.header, folder, "mome-ct-tiny", "0123456789abcdef")


def ball(centre: Any, radii: Any) -> Callable[[np.ndarray], np.ndarray]:
    """An ellipsoid: centre LPS mm, radii mm."""
    return lambda places: (((places - np.asarray(centre)) / np.asarray(radii)) ** 2).sum(axis=-1) <= 1
