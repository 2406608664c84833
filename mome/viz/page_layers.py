"""The CT and the masks of a page: on one grid, small enough to embed, as NIfTI files."""

from __future__ import annotations

import gzip
from collections.abc import Mapping, Sequence
from typing import Any

import nibabel as nib
import numpy as np

from mome.volumes import Grid, Volume, network_grid, resample
from mome.volumes.boxes import bounding_box
from mome.volumes.orientation import closest_axes

# A page of this many voxels is about 20 MB large, which browsers open at once (our choice).
MOST_VOXELS = 12_000_000
# HU are stored in steps of 4, as numbers of 0 to 1023 that begin at −1024 HU: the noise of a CT is several times
# larger, and they compress to about half of what whole HU need (our choice).
_HU_STEP, _LOWEST_HU, _HIGHEST_HU = 4, -1024, 3068


def page_grid(grid: Grid, most_voxels: int = MOST_VOXELS) -> Grid:
    """Returns the grid on which a page shows a scan: the scan's own, where it is small and stands upright.

    A grid of more than `most_voxels` voxels is made coarser along the axes of its smallest voxels. An oblique or
    sheared one is replaced by one along the axes of the patient, so that the page's planes are true ones.

    Args:
        grid: The scan's grid.
        most_voxels: The most voxels of the result.
    """
    upright = grid if _is_upright(grid) else _enclosing(grid)
    shortest = min(upright.spacing)
    while int(np.prod(upright.shape)) > most_voxels:
        shortest *= 1.05
        spacing = tuple(max(shortest, step) for step in upright.spacing)
        coarser = network_grid(upright, spacing=spacing, orientation=upright.orientation)  # type: ignore[arg-type]
        if int(np.prod(coarser.shape)) <= most_voxels:
            return coarser
    return upright


def grid_note(scan: Grid, shown: Grid) -> str | None:
    """Says how the page's grid differs from the scan's; None where they are the same."""
    if shown.same_as(scan):
        return None
    stored, here = ("×".join(f"{step:.2f}".rstrip("0").rstrip(".") for step in g.spacing) for g in (scan, shown))
    turned = "" if _is_upright(scan) else ", along the axes of the patient"
    return (
        f"this page shows the scan and its masks with voxels of {here} mm{turned}; the scan has {stored} mm. Volumes "
        "are those of the scan's own grid"
    )


def ct_file(volume: Volume, grid: Grid) -> bytes:
    """Returns the CT on `grid` as a gzip-compressed NIfTI file, HU in steps of 4 from −1024 to 3068.

    Args:
        volume: CT in HU.
        grid: What `page_grid` returned.
    """
    if grid.same_as(volume.grid):
        hu = volume.array
    else:
        hu = resample(volume.array, volume.grid, grid, fill=float(_LOWEST_HU)).numpy()
    steps = np.nan_to_num(np.asarray(hu, dtype=np.float32), nan=_LOWEST_HU, posinf=_HIGHEST_HU, neginf=_LOWEST_HU)
    steps = np.rint((steps.clip(_LOWEST_HU, _HIGHEST_HU) - _LOWEST_HU) / _HU_STEP).astype(np.int16)
    return _nifti(steps, grid, slope=_HU_STEP, intercept=_LOWEST_HU)


def mask_layers(
    masks: Mapping[str, np.ndarray], structures: Sequence[Mapping[str, Any]], scan: Grid, grid: Grid
) -> list[dict[str, Any]]:
    """Puts masks into as few label maps as their overlaps allow; each is one layer of `mome.viz.page.page`.

    A mask goes into the first layer in which it covers no other one. One mask is unpacked at a time.

    Args:
        masks: Structure → uint8 (i, j, k) of 0 and 1 on the scan's grid.
        structures: `{"name", "color", "volume_ml", "warning"}` of each structure, in the order of the list.
        scan: The scan's grid.
        grid: The page's grid.

    Returns:
        `{"data": bytes, "structures": […]}`, with ids from 1 in every layer, and `order`, the place in the list.
    """
    maps: list[np.ndarray] = []
    entries: list[list[dict[str, Any]]] = []
    for order, structure in enumerate(structures):
        box, own = _in_box(masks[structure["name"]], scan, grid)
        number = next((n for n, taken in enumerate(maps) if not np.any(taken[box][own])), len(maps))
        if number == len(maps):
            maps.append(np.zeros(grid.shape, dtype=np.int16))
            entries.append([])
        entries[number].append({**structure, "id": len(entries[number]) + 1, "order": order})
        maps[number][box][own] = len(entries[number])
    return [
        {"data": _nifti(ids.astype(np.uint8) if len(listed) < 256 else ids, grid, labels=True), "structures": listed}
        for ids, listed in zip(maps, entries, strict=True)
    ]


def _nifti(array: np.ndarray, grid: Grid, *, slope: float = 1.0, intercept: float = 0.0, labels: bool = False) -> bytes:
    image = nib.Nifti1Image(array, grid.affine)
    image.header.set_xyzt_units("mm")
    if labels:  # NiiVue then takes a colour for every number, and does not interpolate between colours
        image.header.set_intent("label")
    # nibabel replaces the slope when it writes an image; header and array are therefore joined here.
    header = image.header.copy()
    header["scl_slope"], header["scl_inter"] = slope, intercept
    header["vox_offset"] = 352
    return gzip.compress(header.binaryblock + bytes(4) + array.tobytes(order="F"), compresslevel=6, mtime=0)


def _is_upright(grid: Grid) -> bool:
    """Whether every axis of the grid runs along an axis of the patient, to a thousandth of a voxel over its length."""
    rest = grid.affine[:3, :3].copy()
    for axis, (world, _) in enumerate(closest_axes(grid.affine)):
        rest[world, axis] = 0
    drift = np.abs(rest).sum(axis=0) * np.asarray(grid.shape)
    return bool(drift.max() <= 1e-3 * min(grid.spacing))


def _enclosing(grid: Grid) -> Grid:
    """The upright grid around another one, in RAS orientation, with voxels as long as its own along each axis."""
    corners = np.array([[i, j, k, 1.0] for i in (0, 1) for j in (0, 1) for k in (0, 1)])
    corners[:, :3] = corners[:, :3] * np.asarray(grid.shape) - 0.5
    world = (corners @ grid.affine.T)[:, :3]
    spacing = np.empty(3)
    for axis, (along, _) in enumerate(closest_axes(grid.affine)):
        spacing[along] = grid.spacing[axis]
    low, high = world.min(axis=0), world.max(axis=0)
    shape = np.maximum(1, np.ceil((high - low) / spacing - 1e-3).astype(int))
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = low + spacing / 2
    return Grid((int(shape[0]), int(shape[1]), int(shape[2])), affine)


def _in_box(mask: np.ndarray, scan: Grid, grid: Grid) -> tuple[tuple[slice, slice, slice], np.ndarray]:
    """A mask on another grid: the box there that holds it, and the mask inside this box. Only the box is resampled."""
    source = bounding_box(mask)
    if any(part.start == part.stop for part in source):
        return (slice(0, 0),) * 3, np.zeros((0, 0, 0), dtype=bool)
    if grid.same_as(scan):
        return source, mask[source].astype(bool)
    # The antialiasing reads a few voxels around the box, which are outside the mask.
    to_grid = np.linalg.inv(grid.affine) @ scan.affine
    margin = [int(np.ceil(2 * step)) + 1 for step in np.maximum(1, 1 / np.linalg.norm(to_grid[:3, :3], axis=0))]
    wide = [
        (max(0, part.start - more), min(side, part.stop + more))
        for part, more, side in zip(source, margin, mask.shape, strict=True)
    ]
    corners = np.array([[i, j, k, 1] for i in wide[0] for j in wide[1] for k in wide[2]], dtype=float)
    reached = (corners @ to_grid.T)[:, :3]
    low = np.clip(np.floor(reached.min(axis=0)).astype(int) - 1, 0, grid.shape)
    high = np.clip(np.ceil(reached.max(axis=0)).astype(int) + 2, 0, grid.shape)
    part_of_scan, part_of_page = scan, grid
    for axis in range(3):
        part_of_scan = part_of_scan.crop(axis, *wide[axis])
        part_of_page = part_of_page.crop(axis, int(low[axis]), int(high[axis]))
    cut = mask[tuple(slice(*sides) for sides in wide)]
    inside = resample(cut, part_of_scan, part_of_page).numpy() > 0.5
    return (slice(low[0], high[0]), slice(low[1], high[1]), slice(low[2], high[2])), inside
