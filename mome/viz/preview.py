"""A preview: three planes through the labelled structures, masks as contours in the class colours."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from mome.atomic import atomic_write
from mome.labels import load_table
from mome.volumes import Grid, Volume, network_grid, resample

_VIEWS = (("axial", 2), ("coronal", 1), ("sagittal", 0))


def save_preview(
    path: str | Path,
    volume: Volume,
    masks: Mapping[str, np.ndarray],
    *,
    window: tuple[float, float] = (-160, 240),
) -> Path:
    """Writes a PNG with an axial, a coronal and a sagittal plane, each where it cuts the most structures.

    Planes are shown as radiologists do: the patient's right on the left, anterior and superior up.

    Args:
        path: Of the PNG.
        volume: CT in HU.
        masks: Name → binary mask on the volume's grid.
        window: HU shown as black and as white.

    Raises:
        OutputError: The file cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    grid = _upright(volume.grid)
    hu = resample(volume.array, volume.grid, grid, fill=-1024.0).numpy()
    planes, shown = _cuts(masks, volume.grid, grid)
    labels = load_table()
    physical = [n * s for n, s in zip(grid.shape, grid.spacing, strict=True)]
    widths = [physical[0], physical[0], physical[1]]
    height = max(physical[1], physical[2])
    figure, panels = plt.subplots(
        1,
        3,
        figsize=(15, 15 * height / sum(widths) + 1.1),
        gridspec_kw={"width_ratios": widths, "wspace": 0.03},
        facecolor="black",
    )
    colors = {}
    for panel, (title, axis) in zip(panels, _VIEWS, strict=True):
        across, up = [a for a in range(3) if a != axis]
        image = np.take(hu, planes[axis], axis=axis).T
        extent = (0, physical[across], 0, physical[up])
        panel.imshow(image, cmap="gray", vmin=window[0], vmax=window[1], origin="lower", extent=extent, aspect="equal")
        xs = (np.arange(grid.shape[across]) + 0.5) * grid.spacing[across]
        ys = (np.arange(grid.shape[up]) + 0.5) * grid.spacing[up]
        for index, (name, cuts) in enumerate(shown.items()):
            color = np.array(labels[name].color) / 255 if name in labels else plt.cm.tab10(index % 10)[:3]
            cut = cuts[axis].T
            colors[name] = color
            if cut.max() > 0.5 and min(cut.shape) > 1:  # a contour needs two rows and columns
                panel.contourf(xs, ys, cut, levels=[0.5, 2], colors=[color], alpha=0.25)
                panel.contour(xs, ys, cut, levels=[0.5], colors=[color], linewidths=1.6)
        ends = {0: ("R", "L"), 1: ("P", "A"), 2: ("I", "S")}
        left, right = ends[across]
        bottom, top = ("P", "A") if up == 1 else ("I", "S")
        for x, y, letter in ((0.02, 0.5, left), (0.98, 0.5, right), (0.5, 0.02, bottom), (0.5, 0.97, top)):
            panel.text(
                x,
                y,
                letter,
                transform=panel.transAxes,
                color="#ffd400",
                ha="center",
                va="center",
                fontsize=11,
            )
        panel.set_title(title, color="white", fontsize=12)
        panel.axis("off")
        panel.set_anchor("S")
    handles = [plt.Line2D([], [], color=color, lw=4, label=name.replace("_", " ")) for name, color in colors.items()]
    if handles:
        figure.legend(
            handles=handles,
            loc="lower center",
            ncol=min(7, len(handles)),
            frameon=False,
            labelcolor="white",
            fontsize=11,
        )
    path = Path(path)
    try:
        with atomic_write(path, "the preview") as part:
            figure.savefig(part, format="png", dpi=100, facecolor="black", bbox_inches="tight", pad_inches=0.15)
    finally:
        plt.close(figure)
    return path


def _upright(grid: Grid) -> Grid:
    """A grid whose first axis runs to the patient's left, so that their right is on the left of the picture."""
    finest = max(1.0, min(grid.spacing))
    return network_grid(grid, spacing=(finest,) * 3, orientation="LAS")


def _cuts(
    masks: Mapping[str, np.ndarray], source: Grid, grid: Grid
) -> tuple[dict[int, int], dict[str, dict[int, np.ndarray]]]:
    """The plane of each axis, and what of every mask that is not empty lies in it, as soft values on `grid`.

    Every mask is resampled twice, for its areas and then for the planes that all areas together choose: one mask
    on the picture's grid is held at a time, not all of them.
    """
    present, areas = [], []
    for name, mask in masks.items():
        if np.any(mask):
            inside = resample(mask, source, grid).numpy() > 0.5
            present.append(name)
            areas.append([inside.sum(axis=tuple(a for a in range(3) if a != axis)) for axis in range(3)])
    planes = {axis: _busiest([area[axis] for area in areas], grid.shape[axis]) for axis in range(3)}
    shown: dict[str, dict[int, np.ndarray]] = {}
    for name, area in zip(present, areas, strict=True):
        if any(area[axis][plane] for axis, plane in planes.items()):
            soft = resample(masks[name], source, grid).numpy()
            shown[name] = {axis: np.take(soft, plane, axis=axis) for axis, plane in planes.items()}
        else:  # it is in the legend all the same
            shown[name] = {axis: np.zeros([n for a, n in enumerate(grid.shape) if a != axis]) for axis in planes}
    return planes, shown


def _busiest(areas: list[np.ndarray], size: int) -> int:
    """The plane that cuts the most structures; among equals, the one with the most of them.

    Args:
        areas: Voxels in every plane, one array per structure.
        size: Planes there are.
    """
    if not areas:
        return size // 2
    stacked = np.stack(areas)
    share = stacked / np.maximum(stacked.max(axis=1, keepdims=True), 1)
    return int(np.argmax((stacked > 0).sum(0) + 0.5 * share.sum(0)))
