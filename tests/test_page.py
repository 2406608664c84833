"""HTML pages of results: what they hold, that nothing in them is executed or loaded, and how they look in a browser."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from browser import document, screenshot

from mome.viz import niivue_source as niivue
from mome.viz.page import json_in_html, page
from mome.viz.page_file import save_page
from mome.viz.page_layers import MOST_VOXELS, ct_file, grid_note, mask_layers, page_grid
from mome.volumes import Grid, Volume, resample

HOSTILE = "</script><script>document.documentElement.dataset.hacked='1'</script><img src=x onerror=alert(1)>{{data}}"


def structure(name: str, color: tuple[int, int, int] = (255, 0, 0), warning: str | None = None) -> dict:
    return {"name": name, "color": list(color), "volume_ml": 1.5, "warning": warning}


def nifti(data: bytes) -> nib.Nifti1Image:
    return nib.Nifti1Image.from_bytes(gzip.decompress(data))


class Elements(HTMLParser):
    """The elements of a page with their attributes, and the text of its scripts."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self._inside = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        self._inside = tag == "script"
        if self._inside:
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.scripts[-1] += data

    def handle_endtag(self, tag: str) -> None:
        self._inside = False


def test_niivue_is_the_file_that_its_readme_names() -> None:
    folder = Path(niivue.__file__).parent / "niivue"
    script = gzip.decompress((folder / "niivue.umd.js.gz").read_bytes())
    assert hashlib.sha256(script).hexdigest() == niivue.SHA256
    readme = (folder / "README.md").read_text()
    assert niivue.SHA256 in readme and niivue.VERSION in readme
    assert niivue.niivue_source().encode() == script and b"</script" not in script.lower()
    assert "Copyright (c) 2021, Niivue" in niivue.niivue_licences()
    assert (folder / "niivue.umd.js.gz").stat().st_size < 850_000


def test_a_damaged_niivue_is_not_used(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "niivue.umd.js.gz").write_bytes(gzip.compress(b"alert(1)"))
    monkeypatch.setattr(niivue, "_FOLDER", tmp_path)
    niivue.niivue_source.cache_clear()
    with pytest.raises(RuntimeError, match="damaged"):
        niivue.niivue_source()
    niivue.niivue_source.cache_clear()


def test_names_notes_and_titles_are_never_html_or_script() -> None:
    volume = Volume(np.zeros((4, 4, 4), np.float32), np.eye(4))
    layers = mask_layers(
        {HOSTILE: np.ones((4, 4, 4), np.uint8)}, [structure(HOSTILE, warning=HOSTILE)], *[volume.grid] * 2
    )
    text = page(HOSTILE, ct_file(volume, volume.grid), layers, notes=[HOSTILE])
    plain = page("plain", ct_file(volume, volume.grid), layers)
    assert [tag for tag, _ in Elements(text).found] == [tag for tag, _ in Elements(plain).found]
    data = json.loads(Elements(text).scripts[0])
    assert data["notes"] == [HOSTILE] and data["layers"][0]["structures"][0]["name"] == HOSTILE
    assert json.loads(json_in_html({HOSTILE: "<!--\u2028"})) == {HOSTILE: "<!--\u2028"}


def test_a_page_loads_nothing_and_runs_its_own_scripts_alone() -> None:
    elements = Elements(page("a", b"x", [], scripts=["let more = 1;"]))
    attributes = [name for _, found in elements.found for name in found]
    assert not {name for name in attributes if name in ("src", "href", "action") or name.startswith("on")}
    policy = next(a["content"] for tag, a in elements.found if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; ") and "connect-src data: blob:; " in policy
    hashes = set(re.findall(r"'sha256-([^']+)'", policy))
    assert "'unsafe-inline'" not in policy.split("script-src")[1].split(";")[0]
    assert len(elements.scripts) == 5 and elements.scripts[-1] == "let more = 1;"
    for script in elements.scripts[1:]:
        assert base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() in hashes
    with pytest.raises(ValueError, match="</script"):
        page("a", scripts=["x = '</SCRIPT>'"])
    assert json.loads(Elements(page("a")).scripts[0]) is None
    served = page("a", "/ct.nii.gz", [{"url": "/m.nii.gz", "structures": []}], connect="'self'")
    assert json.loads(Elements(served).scripts[0])["layers"][0]["url"] == "/m.nii.gz"
    assert "connect-src data: blob: 'self'" in Elements(served).found[3][1]["content"]


def test_a_ct_is_stored_in_steps_of_4_hu_where_it_is() -> None:
    rng = np.random.default_rng(0)
    array = rng.uniform(-1100, 3200, (5, 6, 7)).astype(np.float32)
    array[0, 0, 0] = np.nan
    affine = np.array([[0, -2.0, 0, 5], [3, 0, 0, -7], [0, 0, 1.5, 9], [0, 0, 0, 1]])
    volume = Volume(array, affine)
    image = nifti(ct_file(volume, page_grid(volume.grid)))
    assert image.get_data_dtype() == np.int16 and np.allclose(image.affine, affine)
    clipped = np.nan_to_num(array, nan=-1024).clip(-1024, 3068)
    assert np.abs(image.get_fdata() - clipped).max() <= 2.001 and image.get_fdata()[0, 0, 0] == -1024


def test_a_large_scan_gets_a_coarser_grid_and_says_so() -> None:
    fine = Grid((512, 512, 133), np.diag([-0.7, -0.7, 2.5, 1.0]))
    shown = page_grid(fine)
    assert 0.8 * MOST_VOXELS < np.prod(shown.shape) <= MOST_VOXELS
    assert shown.orientation == fine.orientation and shown.spacing[2] == pytest.approx(2.5)
    note = grid_note(fine, shown)
    assert "0.7×0.7×2.5 mm" in note and f"{shown.spacing[0]:.2f}".rstrip("0") in note
    small = Grid((64, 64, 64), np.diag([2.0, 2, 2, 1]))
    assert page_grid(small) is small and grid_note(small, small) is None


def test_an_oblique_or_sheared_scan_is_shown_along_the_axes_of_the_patient() -> None:
    angle = np.radians(20)
    affine = np.diag([2.0, 2, 3, 1])
    affine[:2, :2] = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) * 2
    affine[1, 2] = 0.8  # a gantry tilt
    oblique = Grid((20, 24, 16), affine)
    shown = page_grid(oblique)
    assert np.count_nonzero(shown.affine[:3, :3]) == 3 and "along the axes of the patient" in grid_note(oblique, shown)
    corners = np.array([[i, j, k, 1] for i in (0, 19) for j in (0, 23) for k in (0, 15)], float) @ affine.T
    inside = (np.linalg.inv(shown.affine) @ corners.T)[:3].T
    assert inside.min() > -0.5 and np.all(inside.max(0) < np.array(shown.shape) - 0.5)
    mask = np.zeros(oblique.shape, np.uint8)
    mask[5:15, 6:12, 4:11] = 1
    (layer,) = mask_layers({"a": mask}, [structure("a")], oblique, shown)
    drawn = np.asarray(nifti(layer["data"]).dataobj)
    assert np.array_equal(drawn > 0, resample(mask, oblique, shown).numpy() > 0.5) and drawn.sum() > 300


def test_overlapping_masks_lie_in_layers_of_their_own() -> None:
    grid = Grid((12, 12, 12), np.eye(4))
    masks = {name: np.zeros(grid.shape, np.uint8) for name in ("a", "b", "c", "none")}
    masks["a"][:6], masks["b"][4:9], masks["c"][9:] = 1, 1, 1
    layers = mask_layers(masks, [structure(name) for name in masks], grid, grid)
    assert [[s["name"] for s in layer["structures"]] for layer in layers] == [["a", "c", "none"], ["b"]]
    for layer in layers:
        image = nifti(layer["data"])
        assert image.header.get_intent()[0] == "label" and image.get_data_dtype() == np.uint8
        for entry in layer["structures"]:
            assert np.array_equal(np.asarray(image.dataobj) == entry["id"], masks[entry["name"]] > 0)


def test_masks_on_a_coarser_grid_are_those_of_the_resampled_whole() -> None:
    rng = np.random.default_rng(1)
    fine = Grid((61, 50, 33), np.diag([1.0, -1.3, 2.0, 1.0]))
    shown = page_grid(fine, 8_000)
    for _ in range(4):
        mask = np.zeros(fine.shape, np.uint8)
        low = rng.integers(0, 25, 3)
        mask[tuple(slice(a, a + int(rng.integers(3, 30))) for a in low)] = 1
        (layer,) = mask_layers({"a": mask}, [structure("a")], fine, shown)
        expected = resample(mask, fine, shown).numpy() > 0.5
        assert np.array_equal(np.asarray(nifti(layer["data"]).dataobj) > 0, expected)


@pytest.mark.wide
def test_a_browser_shows_the_masks_on_their_side_and_runs_no_name(tmp_path: Path) -> None:
    """The mask of the left is red and drawn on the right, in the axial plane and in 3D; a hostile name does nothing."""
    hu = np.full((40, 40, 40), -1000, np.float32)  # black, so that the masks' colours are pure
    left, right = np.zeros(hu.shape, np.uint8), np.zeros(hu.shape, np.uint8)
    left[4:14, 14:26, 10:30], right[26:36, 14:26, 10:30] = 1, 1  # RAS: the first voxels are at the patient's left
    path = save_page(
        tmp_path / "page.html",
        HOSTILE,
        Volume(hu, np.diag([2.0, 2, 2, 1])),
        {HOSTILE: left, "right": right},
        [structure(HOSTILE, (255, 0, 0), HOSTILE), structure("right", (0, 0, 255))],
        [HOSTILE],
    )
    made = document(path, tmp_path)
    root = re.search(r"<html[^>]*>", made)[0]
    assert 'data-state="ready"' in root and "hacked" not in root
    assert made.count("&lt;/script&gt;&lt;script&gt;") >= 4 and "<img" not in made
    picture = screenshot(path, tmp_path)
    stage = picture[60:, 310:]
    middle = stage.shape[0] // 2, stage.shape[1] // 2
    for name, rows in (("axial and coronal", slice(0, middle[0])), ("sagittal and 3D", slice(middle[0], None))):
        part = stage[rows]
        red = (part[..., 0] > 70) & (part[..., 1:].max(-1) < 40)
        blue = (part[..., 2] > 70) & (part[..., :2].max(-1) < 40)
        tiles = {"left": slice(0, middle[1]), "right": slice(middle[1], None)}
        for side, columns in tiles.items():
            seen = red[:, columns].sum(), blue[:, columns].sum()
            if name == "sagittal and 3D" and side == "left":  # a sagittal plane cuts one of them
                assert max(seen) > 300, (name, side, seen)
                continue
            assert min(seen) > 300, (name, side, seen)
            across = np.arange(part[:, columns].shape[1])
            assert np.average(across, weights=red[:, columns].sum(0)) > np.average(
                across, weights=blue[:, columns].sum(0)
            ), (name, side)
