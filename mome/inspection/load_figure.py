"""Draws loads as tables: the share of every expert in each region, and the weights of the scales."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

from mome.atomic import atomic_write
from mome.inspection.inspect import Inspection
from mome.inspection.regions import BODY, SCAN


class _Table(NamedTuple):
    """One panel: rows are regions, columns are experts or scales; a row without numbers is an empty region."""

    title: str
    columns: list[str]
    rows: list[tuple[str, list[float] | None]]


def save_loads(path: Path, inspection: Inspection) -> Path | None:
    """Writes the tables as PNG; None where the model has neither routers nor fusion weights."""
    tables = _tables(inspection)
    if not tables:
        return None
    from matplotlib.figure import Figure  # pyplot would change the backend of a notebook

    across = 1 if max(len(table.columns) for table in tables) > 16 else min(2, len(tables))
    down = math.ceil(len(tables) / across)
    width = max(4.2, 0.55 * max(len(table.columns) for table in tables)) + 2.3
    height = max(0.34 * max(len(table.rows) for table in tables), 1.2) + 1.1
    figure = Figure(figsize=(width * across, height * down), layout="constrained")
    panels = figure.subplots(down, across, squeeze=False)
    for panel in panels.ravel()[len(tables) :]:
        panel.axis("off")
    for panel, table in zip(panels.ravel(), tables, strict=False):
        _draw(panel, table)
    with atomic_write(path, "the picture") as part:
        figure.savefig(part, format="png", dpi=130)
    return path


def _draw(panel: Any, table: _Table) -> None:
    numbers = [values or [math.nan] * len(table.columns) for _, values in table.rows]
    panel.imshow(numbers, cmap="cividis", vmin=0, vmax=1, aspect="auto")
    panel.set_title(table.title, fontsize=11)
    panel.set_xticks(range(len(table.columns)), table.columns, fontsize=9)
    panel.set_yticks(range(len(table.rows)), [name.replace("_", " ") for name, _ in table.rows], fontsize=9)
    panel.tick_params(length=0)
    for y, values in enumerate(numbers):
        for x, value in enumerate(values):
            shown = "–" if math.isnan(value) else f"{100 * value:.0f}"
            color = "black" if math.isnan(value) or value > 0.55 else "white"
            panel.text(x, y, shown, ha="center", va="center", fontsize=9, color=color)


def _tables(inspection: Inspection) -> list[_Table]:
    report = inspection.report
    prompts = report["fusion"]["prompts"]
    tables = []
    if prompts:
        scales = len(inspection.scale_names)
        rows = [(name, regions[name]["weight"]) for name, regions in prompts.items()]
        title = f"fusion {report['fusion']['name']}: mean weight of the scales in each structure, %"
        tables.append(_Table(title, [f"scale {s}" for s in range(scales)], rows))
    for name, router in report["routers"].items():
        rows = []
        for prompt, regions in router["load"].items():
            for region, entry in regions.items():
                shared = prompt == "all prompts"
                label = region if shared or region == prompt else f"{prompt}: {region}"
                if shared or region in (BODY, prompt):
                    rows.append((label if region != SCAN else "whole scan", entry["load"]))
        title = f"router of {name.replace('_', ' ')}: load of the experts, %"
        short = "expert " if router["experts"] <= 8 else ""
        tables.append(_Table(title, [f"{short}{e}" for e in range(router["experts"])], rows))
    return tables
