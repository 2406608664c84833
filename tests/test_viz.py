"""Previews and the phantom that is drawn for them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib import image as mpl_image

from mome.data.phantom import phantom
from mome.labels import load_table
from mome.viz.preview import save_preview
from mome.volumes import Volume


def test_phantom_is_deterministic_and_has_its_truth() -> None:
    a, b, c = phantom(3), phantom(3), phantom(4)
    assert np.array_equal(a.array, b.array) and not np.array_equal(a.array.shape, ()) and a.array.dtype == np.float32
    assert a.array.shape != c.array.shape or not np.array_equal(a.array, c.array)
    wanted = {
        "spinal_cord",
        "brainstem",
        "esophagus",
        "parotid_gland_left",
        "parotid_gland_right",
        "mandible",
        "larynx",
    }
    assert wanted <= set(a.masks) and all(name in load_table() for name in a.masks)
    assert np.sum(list(a.masks.values()), axis=0).max() == 1  # disjoint

    def centre(name: str) -> np.ndarray:
        return np.argwhere(a.masks[name]).mean(0) @ a.affine[:3, :3].T + a.affine[:3, 3]

    assert centre("parotid_gland_left")[0] < -30 < 30 < centre("parotid_gland_right")[0]  # RAS: +x is right
    assert centre("brainstem")[2] > centre("larynx")[2] and centre("mandible")[1] > centre("spinal_cord")[1]
    assert np.median(a.array[a.masks["mandible"]]) > 300 and np.median(a.array[a.masks["brainstem"]]) < 100


def test_preview(tmp_path: Path) -> None:
    made = phantom(1)
    masks = {name: made.masks[name] for name in ("parotid_gland_left", "mandible")}
    path = save_preview(tmp_path / "deep" / "p.png", Volume(made.array, made.affine), masks)
    assert [p.name for p in path.parent.iterdir()] == ["p.png"]
    picture = mpl_image.imread(path)[..., :3]
    assert picture.shape[1] > 800 and picture.shape[0] > 250
    colour = np.array(load_table()["parotid_gland_left"].color) / 255
    panels = picture[: int(picture.shape[0] * 0.85)]  # above the legend
    drawn = np.abs(panels - colour).max(-1) < 0.06
    columns = np.nonzero(drawn.any(0))[0]
    axial = columns[columns < picture.shape[1] * 0.38]
    assert len(axial) and axial.mean() > 0.19 * picture.shape[1]  # the patient's left is on the picture's right
    plain = save_preview(tmp_path / "q.png", Volume(made.array, made.affine), {})
    assert mpl_image.imread(plain).shape[1] > 800
