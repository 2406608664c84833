"""Writes the HTML page of a segmented scan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mome.atomic import atomic_write
from mome.viz.page import page
from mome.viz.page_layers import MOST_VOXELS, ct_file, grid_note, mask_layers, page_grid
from mome.volumes import Volume


def save_page(
    path: str | Path,
    title: str,
    volume: Volume,
    masks: Mapping[str, np.ndarray],
    structures: Sequence[Mapping[str, Any]],
    notes: Sequence[str] = (),
    *,
    most_voxels: int = MOST_VOXELS,
) -> Path:
    """Writes a page that shows a CT with its masks; it needs no network and no other file.

    Args:
        path: Path of the page.
        title: Its heading, such as the scan's name.
        volume: CT in HU.
        masks: Structure → uint8 (i, j, k) of 0 and 1 on the volume's grid. One is read at a time.
        structures: `{"name", "color", "volume_ml", "warning"}` of each structure; `color` is (red, green, blue), each
            from 0 to 255.
        notes: Sentences for the reader.
        most_voxels: A scan of more voxels is shown on a coarser grid, with a note.

    Returns:
        The path.

    Raises:
        OutputError: The file cannot be written.
    """
    path = Path(path)
    grid = page_grid(volume.grid, most_voxels)
    note = grid_note(volume.grid, grid)
    text = page(
        title,
        ct_file(volume, grid),
        mask_layers(masks, structures, volume.grid, grid),
        notes=[*notes, *([note] if note else [])],
    )
    with atomic_write(path, "the page") as part:
        part.write_text(text, encoding="utf-8")
    return path
