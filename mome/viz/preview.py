"""A preview of a segmented scan: three planes through the structures, with masks as contours in their label colours."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mome.atomic import atomic_write
from mome.labels import load_table
from mome.volumes import Grid, Volume, network_grid, resample

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PLANES = (("axial", 2), ("coronal", 1), ("sagittal", 0))
# What is above is body, not air; and the air that is shown around the body.
BODY_HU, _MARGIN_MM = -400.0, 12.0
# At 100 dots per inch a preview is about 2,000 pixels wide; rows of the legend lie below the planes.
_WIDEST_INCHES, _TITLE_INCHES, _LEGEND_ROW_INCHES, _LEGEND_COLUMNS = 20.0, 0.4, 0.28, 7
_LONGEST_SIDE = 3.0
# A plane has a few hundred pixels in the picture; more voxels take time and memory and are not seen (our choice).
_MOST_VOXELS = 40_000_000
# Letters at the low and the high end of every axis of the picture's grid.
ENDS = {0: ("R", "L"), 1: ("P", "A"), 2: ("I", "S")}


def save_preview(
    path: str | Path,
    volume: Volume,
    masks: Mapping[str, np.ndarray],
    *,
    window: tuple[float, float] = (-160, 240),
) -> Path:
    """Writes a PNG with an axial, a coronal and a sagittal plane, each where it cuts the most structures.

    Planes are shown in radiological convention: the patient's right is on the left, anterior and superior are up.

    Args:
        path: Path of the PNG.
        volume: CT in HU.
        masks: Name → binary mask (i, j, k) on the volume's grid.
        window: HU shown as black and as white.

    Returns:
        The path.

    Raises:
        OutputError: The file cannot be written.
    """
    from matplotlib.figure import Figure  # pyplot would change the backend of a notebook

    grid = picture_grid(volume.grid)
    hu = resample(volume.array, volume.grid, grid, fill=-1024.0).numpy()
    planes, cuts = cut_masks(masks, volume.grid, grid)
    images = {axis: np.take(hu, planes[axis], axis=axis) for _, axis in PLANES}
    shown = {axis: {name: cut[axis] for name, cut in cuts.items()} for _, axis in PLANES}
    frames = {axis: _widened(visible_frame(images[axis], list(shown[axis].values()), grid, axis)) for _, axis in PLANES}
    # Every plane is drawn at the same height, so that none is small; its own frame decides its width.
    widths = [frame_aspect(frames[axis]) for _, axis in PLANES]
    height = min(9.0, _WIDEST_INCHES / sum(widths))
    colors = _colors(list(cuts))
    below = _LEGEND_ROW_INCHES * -(-len(colors) // _LEGEND_COLUMNS) + 0.2
    whole = below + height + _TITLE_INCHES
    figure = Figure(figsize=(max(9.0, height * sum(widths)), whole), facecolor="black")
    panels = figure.subplots(
        1,
        3,
        gridspec_kw={
            "width_ratios": widths,
            "wspace": 0.03,
            "left": 0.01,
            "right": 0.99,
            "bottom": below / whole,
            "top": 1 - _TITLE_INCHES / whole,
        },
    )
    for panel, (title, axis) in zip(panels, PLANES, strict=True):
        _draw_plane(panel, grid, axis, images[axis], shown[axis], colors, window)
        left, right, bottom, top = frames[axis]
        panel.set_xlim(left, right)
        panel.set_ylim(bottom, top)
        panel.set_title(title, color="white", fontsize=12)
    _add_legend(figure, colors)
    path = Path(path)
    with atomic_write(path, "the preview") as part:
        figure.savefig(part, format="png", dpi=100, facecolor="black", bbox_inches="tight", pad_inches=0.15)
    return path


def _draw_plane(
    panel: Axes,
    grid: Grid,
    axis: int,
    image: np.ndarray,
    cuts: dict[str, np.ndarray],
    colors: dict[str, Any],
    window: tuple[float, float],
) -> None:
    """Draws one plane with the contours of its masks and the letters of its directions."""
    across, up = [a for a in range(3) if a != axis]
    extent = (0, grid.shape[across] * grid.spacing[across], 0, grid.shape[up] * grid.spacing[up])
    panel.imshow(image.T, cmap="gray", vmin=window[0], vmax=window[1], origin="lower", extent=extent, aspect="equal")
    xs = (np.arange(grid.shape[across]) + 0.5) * grid.spacing[across]
    ys = (np.arange(grid.shape[up]) + 0.5) * grid.spacing[up]
    for name, cut in cuts.items():
        if cut.max() > 0.5 and min(cut.shape) > 1:  # contours need at least two rows and columns
            panel.contourf(xs, ys, cut.T, levels=[0.5, 2], colors=[colors[name]], alpha=0.25)
            # A dark line below the contour separates pale colours from bone and dark ones from soft tissue.
            panel.contour(xs, ys, cut.T, levels=[0.5], colors=["black"], linewidths=4.2)
            panel.contour(xs, ys, cut.T, levels=[0.5], colors=[colors[name]], linewidths=2.0)
    (left, right), (bottom, top) = ENDS[across], ENDS[up]
    style: dict[str, Any] = {"color": "#ffd400", "ha": "center", "va": "center", "fontsize": 11}
    for x, y, letter in ((0.02, 0.5, left), (0.98, 0.5, right), (0.5, 0.02, bottom), (0.5, 0.97, top)):
        panel.text(x, y, letter, transform=panel.transAxes, **style)
    panel.axis("off")


def visible_frame(
    image: np.ndarray, cuts: list[np.ndarray], grid: Grid, axis: int
) -> tuple[float, float, float, float]:
    """The part of a plane that holds the body and the structures, with a margin; all of it where there is neither.

    Returns:
        Left, right, bottom and top in mm.
    """
    across, up = [a for a in range(3) if a != axis]
    inside = image > BODY_HU
    for cut in cuts:
        inside = inside | (cut > 0.5)
    edges: list[float] = []
    for side, spacing in ((0, grid.spacing[across]), (1, grid.spacing[up])):
        held = np.flatnonzero(inside.any(axis=1 - side))
        first, last = (held[0], held[-1] + 1) if len(held) else (0, image.shape[side])
        low, high = first * spacing - _MARGIN_MM, last * spacing + _MARGIN_MM
        edges += [max(0.0, low), min(image.shape[side] * spacing, high)]
    return edges[0], edges[1], edges[2], edges[3]


def _widened(frame: tuple[float, float, float, float]) -> tuple[float, float, float, float]:
    """Adds black to a thin frame, up to `_LONGEST_SIDE` : 1, so that its letters and its title do not overlap."""
    left, right, bottom, top = frame
    width = max(right - left, (top - bottom) / _LONGEST_SIDE)
    height = max(top - bottom, (right - left) / _LONGEST_SIDE)
    across, up = (left + right) / 2, (bottom + top) / 2
    return across - width / 2, across + width / 2, up - height / 2, up + height / 2


def frame_aspect(frame: tuple[float, float, float, float]) -> float:
    left, right, bottom, top = frame
    return (right - left) / (top - bottom)


def _colors(names: list[str]) -> dict[str, Any]:
    """RGB in [0, 1] of every structure: that of the class table, or one of ten for names that are not in it."""
    from matplotlib import colormaps

    labels = load_table()
    return {
        name: np.array(labels[name].color) / 255 if name in labels else colormaps["tab10"](index % 10)[:3]
        for index, name in enumerate(names)
    }


def _add_legend(figure: Figure, colors: dict[str, Any]) -> None:
    """Names the structures below the planes; without structures there is no legend."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=color, lw=4, label=name.replace("_", " ")) for name, color in colors.items()]
    if handles:
        figure.legend(
            handles=handles,
            loc="lower center",
            ncol=min(_LEGEND_COLUMNS, len(handles)),
            frameon=False,
            labelcolor="white",
            fontsize=11,
        )


def picture_grid(grid: Grid) -> Grid:
    """An isotropic grid in LAS orientation, so that the patient's right is on the left of the picture.

    Its voxels are as long as the scan's shortest side, at least 1 mm, and longer where there would be too many of them.
    """
    step = max(1.0, min(grid.spacing))
    found = network_grid(grid, spacing=(step,) * 3, orientation="LAS")
    while (voxels := math.prod(found.shape)) > _MOST_VOXELS:
        step *= max(1.01, (voxels / _MOST_VOXELS) ** (1 / 3))
        found = network_grid(grid, spacing=(step,) * 3, orientation="LAS")
    return found


def cut_masks(
    masks: Mapping[str, np.ndarray], source: Grid, grid: Grid
) -> tuple[dict[int, int], dict[str, dict[int, np.ndarray]]]:
    """Chooses the planes and cuts the masks with them.

    Every mask is resampled twice: first for its area in every plane, then for its cut with the planes that the areas
    of all masks decide. So only one resampled mask is in memory at a time.

    Returns:
        Axis → index of its plane; and for every mask that is not empty, axis → its cut, as soft values.
    """
    present, areas = [], []
    for name, mask in masks.items():
        if np.any(mask):
            inside = resample(mask, source, grid).numpy() > 0.5
            present.append(name)
            areas.append([inside.sum(axis=tuple(a for a in range(3) if a != axis)) for axis in range(3)])
    planes = {axis: _busiest_plane([area[axis] for area in areas], grid.shape[axis]) for axis in range(3)}
    cuts: dict[str, dict[int, np.ndarray]] = {}
    for name, area in zip(present, areas, strict=True):
        if any(area[axis][plane] for axis, plane in planes.items()):
            soft = resample(masks[name], source, grid).numpy()
            cuts[name] = {axis: np.take(soft, plane, axis=axis) for axis, plane in planes.items()}
        else:  # no plane cuts it, but the legend names it
            cuts[name] = {axis: np.zeros([n for a, n in enumerate(grid.shape) if a != axis]) for axis in planes}
    return planes, cuts


def _busiest_plane(areas: list[np.ndarray], size: int) -> int:
    """The plane that cuts the most structures; among equals, the one that shows the largest shares of them.

    Args:
        areas: For every structure, its voxels in every plane.
        size: Number of planes.
    """
    if not areas:
        return size // 2
    stacked = np.stack(areas)
    share = stacked / np.maximum(stacked.max(axis=1, keepdims=True), 1)
    return int(np.argmax((stacked > 0).sum(0) + 0.5 * share.sum(0)))
