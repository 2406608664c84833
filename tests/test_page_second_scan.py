"""The viewer after another scan was shown: the crosshair and its text belong to the new one, masks or none."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import numpy as np
import pytest
from driven_browser import DrivenBrowser

from mome.viz.page import page
from mome.viz.page_layers import ct_file, mask_layers
from mome.volumes import Volume


def shown(hu: float, origin: float, mask: np.ndarray) -> dict:
    """The data of `momeViewer.show` for a scan of one value, whose first voxel lies at `origin` mm on every axis."""
    affine = np.diag([2.0, 2, 2, 1])
    affine[:3, 3] = origin
    volume = Volume(np.full(mask.shape, hu, np.float32), affine)
    entry = {"name": "a", "color": [255, 0, 0], "volume_ml": mask.sum() * 0.008, "warning": None}
    layers = mask_layers({"a": mask}, [entry], volume.grid, volume.grid)
    text = lambda data: base64.b64encode(data).decode()  # noqa: E731
    return {
        "ct": {"base64": text(ct_file(volume, volume.grid))},
        "layers": [{"base64": text(layer["data"]), "structures": layer["structures"]} for layer in layers],
        "notes": [],
    }


@pytest.mark.wide
def test_a_second_scan_without_masks_is_shown_at_its_middle(tmp_path: Path) -> None:
    empty = np.zeros((20, 20, 20), np.uint8)
    mask = empty.copy()
    mask[2:5, 3:6, 4:7] = 1
    (tmp_path / "page.html").write_text(page("a"), encoding="utf-8")
    browser = DrivenBrowser()
    try:
        browser.open((tmp_path / "page.html").absolute().as_uri())
        place = "document.querySelector('[data-part=place]').textContent"
        for data, words in ((shown(400, 0, mask), "400 HU"), (shown(100, 500, empty), "100 HU")):
            browser.run(f"momeViewer.show({json.dumps(data)})")
            browser.until("document.documentElement.dataset.state === 'ready'")
            assert words in browser.run(place)
        found = [int(word) for word in browser.run(place).split(" mm")[0].split() if word.isdigit()]
        assert all(abs(mm - 519) <= 2 for mm in found) and len(found) == 3, found
    finally:
        browser.close()
