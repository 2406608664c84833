"""What the viewer of the page shows, as one JSON file: the CT and its masks on a grid that browsers open at once."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mome.atomic import atomic_write
from mome.viz.page_layers import ct_file, grid_note, mask_layers, page_grid

if TYPE_CHECKING:
    from mome.inference.result import Segmentation
    from mome.volumes import Volume


def write_viewer(result: Segmentation, volume: Volume, path: Path) -> Path:
    """Writes the data of `momeViewer.show` (`mome/viz/assets/viewer.js`) and returns the path.

    Args:
        result: The masks.
        volume: The scan in HU.
        path: The file to write, `.json`.

    Raises:
        OutputError: The file cannot be written.
    """
    grid = page_grid(volume.grid)
    note = grid_note(volume.grid, grid)
    colors = {entry["name"]: entry["color"] for entry in result.label_entries()}
    structures = [
        {"name": p.name, "color": colors[p.name], "volume_ml": result.volume_ml(p.name), "warning": p.warning}
        for p in result.prompts
    ]
    layers = mask_layers(result.masks, structures, volume.grid, grid)
    data: dict[str, Any] = {
        "ct": {"base64": _base64(ct_file(volume, grid))},
        "layers": [{"base64": _base64(layer["data"]), "structures": layer["structures"]} for layer in layers],
        "notes": [*dict.fromkeys(result.notes), *([note] if note else [])],
    }
    with atomic_write(path, "the viewer's data") as temporary:
        temporary.write_text(json.dumps(data, allow_nan=False), encoding="utf-8")
    return path


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
