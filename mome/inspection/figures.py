"""Draws what an inspection saw on the planes of each prompt: the scales of the fusion, and the experts of each router.

Planes are shown as in `mome segment --preview`: the patient's right is on the left, anterior and superior are up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import ndimage

from mome.atomic import atomic_write
from mome.inspection.inspect import Inspection
from mome.inspection.palette import OTHERS, colors_of
from mome.inspection.regions import BODY
from mome.inspection.views import View
from mome.viz.preview import BODY_HU, ENDS, PLANES, frame_aspect, visible_frame

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# HU shown as black and as white. Below colours the window is wider, because white bone would make every colour pale.
_WINDOW, _WINDOW_BELOW_COLORS = (-160, 240), (-300, 900)
_ALPHA = 0.7
_SOFT_TISSUE_HU = 40
_HEAD_INCHES, _FOOT_INCHES = 0.75, 0.35
_ROW_INCHES, _WIDTH_INCHES, _LEGEND_INCHES = 4.0, 11.0, 3.4


@dataclass
class _Row:
    """One row of three planes.

    Attributes:
        title: What is drawn.
        values_N: For every network voxel of the view a choice (−1 is left uncoloured) or a weight; None for the CT.
        names: The choices in words, with their shares; empty where the values are weights.
        colors: The colours of the choices.
    """

    title: str
    values_N: Any = None
    names: Sequence[str] = ()
    colors: Sequence[str] = ()


def save_scales(path: Path, inspection: Inspection, view: View) -> Path:
    """Writes the picture of a prompt's fusion: the structure, the scale that weighs most, and its weight."""
    fusion = inspection.report["fusion"]
    rows = [_Row("CT, and the predicted structure")]
    numbers = fusion["prompts"].get(view.name)
    if numbers is not None:
        inside = numbers[view.name] if numbers[view.name]["voxels"] else numbers[BODY]
        where = "structure" if numbers[view.name]["voxels"] else BODY
        names = [
            f"{name}\nwins {_percent(wins)} of the {where}, mean weight {weight:.2f}"
            for name, wins, weight in zip(inspection.scale_names, inside["wins"], inside["weight"], strict=True)
        ]
        rows.append(_Row("scale with the largest weight", view.scale_N, names, colors_of(inside["wins"])))
        rows.append(_Row("weight of that scale", view.weight_N))
    return _save(path, f"{_words(view.name)}: which scale decides", rows, view, fusion["note"])


def save_experts(path: Path, inspection: Inspection, view: View) -> Path:
    """Writes the picture of the experts on a prompt's planes, a row for each router."""
    rows = []
    for name, winner_N in view.experts.items():
        router = inspection.report["routers"][name]
        loads = router["load"].get(view.name) or router["load"]["all prompts"]
        place = view.name if loads.get(view.name, {}).get("voxels") else BODY
        where = "structure" if place == view.name else BODY
        wins = loads[place]["wins"] or [0.0] * router["experts"]
        colors = colors_of(loads[BODY]["wins"] or wins)
        names = [f"expert {e} wins {_percent(share)} of the {where}" for e, share in enumerate(wins)]
        per_prompt = "" if "all prompts" in router["load"] else ", for this prompt"
        rows.append(_Row(f"{_words(name)}: expert with\nthe largest weight{per_prompt}", winner_N, names, colors))
    return _save(path, f"{_words(view.name)}: which expert decides", rows, view, None)


def _save(path: Path, title: str, rows: list[_Row], view: View, note: str | None) -> Path:
    from matplotlib.figure import Figure  # pyplot would change the backend of a notebook

    frames = {axis: visible_frame(view.images[axis], list(_cut(view, axis)), view.grid, axis) for _, axis in PLANES}
    widths = [float(np.clip(frame_aspect(frames[axis]), 1 / 3, 3)) for _, axis in PLANES]
    height = min(_ROW_INCHES, _WIDTH_INCHES / sum(widths))
    legend = _LEGEND_INCHES / height
    size = (height * sum(widths) + _LEGEND_INCHES, height * len(rows) + _HEAD_INCHES + _FOOT_INCHES)
    figure = Figure(figsize=size, facecolor="black")
    ratios = [*widths, legend]
    panels = figure.subplots(
        len(rows), 4, squeeze=False, gridspec_kw={"width_ratios": ratios, "wspace": 0.1, "hspace": 0.06}
    )
    tall = figure.get_figheight()
    figure.subplots_adjust(left=0.01, right=0.99, top=1 - _HEAD_INCHES / tall, bottom=_FOOT_INCHES / tall)
    for r, row in enumerate(rows):
        for panel, (plane, axis) in zip(panels[r], PLANES, strict=False):
            image = _draw(panel, row, view, axis)
            left, right, bottom, top = frames[axis]
            panel.set_xlim(left, right)
            panel.set_ylim(bottom, top)
            if r == 0:
                panel.set_title(plane, color="white", fontsize=12)
        _explain(figure, panels[r][3], row, view, image)
    figure.suptitle(title, color="white", fontsize=14, y=0.995, va="top")
    notes = [] if view.cuts else ["The mask is empty: the planes cut the middle of the scan."]
    notes += [f"Note: {note}."] if note else []
    if notes:
        figure.text(0.5, 0.005, "  ".join(notes), color="white", fontsize=11, ha="center", va="bottom")
    with atomic_write(path, "the picture") as part:
        figure.savefig(part, format="png", dpi=130, facecolor="black", bbox_inches="tight", pad_inches=0.15)
    return path


def _draw(panel: Axes, row: _Row, view: View, axis: int) -> Any:
    """Draws one plane; returns the image of the weights, for the colour bar."""
    from matplotlib.colors import ListedColormap

    grid = view.grid
    across, up = [a for a in range(3) if a != axis]
    extent = (0, grid.shape[across] * grid.spacing[across], 0, grid.shape[up] * grid.spacing[up])
    same: dict[str, Any] = {"origin": "lower", "extent": extent, "aspect": "equal", "interpolation": "nearest"}
    low, high = _WINDOW if row.values_N is None else _WINDOW_BELOW_COLORS
    panel.imshow(view.images[axis].T, cmap="gray", vmin=low, vmax=high, **same)
    image = None
    if row.values_N is not None:
        values = view.on_plane(axis, row.values_N)
        air = ~ndimage.binary_fill_holes(view.images[axis] > BODY_HU)
        if row.names:
            values = np.ma.masked_where(air | (values.data < 0), values)
            scale: dict[str, Any] = {
                "cmap": ListedColormap(list(row.colors)),
                "vmin": -0.5,
                "vmax": len(row.colors) - 0.5,
            }
        else:
            values = np.ma.masked_where(air, values)
            scale = {"cmap": "cividis", "vmin": 0.0, "vmax": 1.0}
        image = panel.imshow(values.T, alpha=_ALPHA if row.names else 0.8, **scale, **same)
    xs = (np.arange(grid.shape[across]) + 0.5) * grid.spacing[across]
    ys = (np.arange(grid.shape[up]) + 0.5) * grid.spacing[up]
    for cut in _cut(view, axis):
        if cut.max() > 0.5 and min(cut.shape) > 1:
            panel.contour(xs, ys, cut.T, levels=[0.5], colors=["black"], linewidths=3.6)
            panel.contour(xs, ys, cut.T, levels=[0.5], colors=["white"], linewidths=1.6)
    (left, right), (bottom, top) = ENDS[across], ENDS[up]
    style: dict[str, Any] = {"color": "#ffd400", "ha": "center", "va": "center", "fontsize": 10}
    for x, y, letter in ((0.03, 0.5, left), (0.97, 0.5, right), (0.5, 0.04, bottom), (0.5, 0.96, top)):
        panel.text(x, y, letter, transform=panel.transAxes, **style)
    panel.axis("off")
    return image


def _explain(figure: Figure, panel: Axes, row: _Row, view: View, image: Any) -> None:
    """Fills the last column of a row: its title, and the names of the colours or the colour bar."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    panel.axis("off")
    panel.text(0.04, 0.98, row.title, color="white", fontsize=12, weight="bold", va="top", transform=panel.transAxes)
    handles: list[Any] = []
    if row.values_N is None:
        handles = [Line2D([], [], color="white", lw=2, label=_words(view.name))] if view.cuts else []
    elif row.names:
        shown = [(name, color) for name, color in zip(row.names, row.colors, strict=True) if color != OTHERS]
        handles = [Patch(color=_over_tissue(color), label=name) for name, color in shown]
        others = len(row.names) - len(shown)
        handles += [Patch(color=OTHERS, label=f"{others} other experts")] if others else []
    else:
        bar = figure.colorbar(image, cax=panel.inset_axes((0.06, 0.55, 0.7, 0.07)), orientation="horizontal")
        if bar.solids is not None:  # without it the bar is as pale as the map
            bar.solids.set_alpha(1)
        bar.set_ticks([0, 0.25, 0.5, 0.75, 1])
        bar.ax.tick_params(colors="white", labelsize=10)
        bar.ax.set_xlabel("0: unused, 1: the only one", color="white", fontsize=10)
    if handles:
        panel.legend(
            handles=handles,
            loc="upper left",
            bbox_to_anchor=(0.0, 0.84),
            frameon=False,
            labelcolor="white",
            fontsize=10,
        )


def _over_tissue(color: str) -> tuple[float, float, float]:
    """The colour as it looks over soft tissue, so that the legend shows what the planes show."""
    from matplotlib.colors import to_rgb

    low, high = _WINDOW_BELOW_COLORS
    tissue = (_SOFT_TISSUE_HU - low) / (high - low)
    red, green, blue = (_ALPHA * channel + (1 - _ALPHA) * tissue for channel in to_rgb(color))
    return red, green, blue


def _cut(view: View, axis: int) -> list[np.ndarray]:
    return [view.cuts[axis]] if view.cuts else []


def _words(name: str) -> str:
    return name.replace("_", " ")


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.005 or share == 0 else "under 1 %"
