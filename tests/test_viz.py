"""Previews and the phantom that is drawn for them."""

from __future__ import annotations

import subprocess
import sys
import weakref
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from matplotlib import image as mpl_image
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from mome.data.phantom import phantom
from mome.labels import load_table
from mome.viz import preview
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


def pixels(path: Path) -> np.ndarray:
    return mpl_image.imread(path)[..., :3]


def near(picture: np.ndarray, name: str, within: float = 0.06) -> np.ndarray:
    """Where a picture has the colour of a structure's contour."""
    return np.abs(picture - np.array(load_table()[name].color) / 255).max(-1) < within


def white_box(code: str) -> tuple[Volume, np.ndarray]:
    """A bright block, and a mask in its left, anterior and superior corner, stored in any orientation."""
    hu, mask = np.full((60, 50, 40), 500, np.float32), np.zeros((60, 50, 40), np.float32)
    mask[6:18, 32:46, 26:36] = 1  # RAS: the first voxels are at the patient's left
    to = nib.orientations.axcodes2ornt(code)
    hu_image, mask_image = (
        nib.Nifti1Image(array, np.diag([2.0, 2, 2, 1])).as_reoriented(
            nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), to)
        )
        for array in (hu, mask)
    )
    volume = Volume(np.ascontiguousarray(hu_image.get_fdata(dtype=np.float32)), hu_image.affine)
    assert volume.grid.orientation == code
    return volume, np.asarray(mask_image.dataobj) > 0


@pytest.mark.parametrize("code", ["RAS", "LPS", "PIR", "SLA"])
def test_left_is_drawn_on_the_right_and_up_is_up(tmp_path: Path, code: str) -> None:
    volume, mask = white_box(code)
    picture = pixels(save_preview(tmp_path / "p.png", volume, {"parotid_gland_left": mask}))
    bright = picture.min(-1) > 0.9
    row = picture[int(np.argmax(bright.sum(1)))].max(-1) > 0.3  # through all three panels
    edges = np.flatnonzero(np.diff(np.concatenate([[0], row.astype(int), [0]])))
    starts, stops = edges[::2], edges[1::2]
    wide = [(a, b) for a, b in zip(starts, stops, strict=True) if b - a > 200]
    assert len(wide) == 3
    for start, stop in wide:  # axial: L and A; coronal: L and S; sagittal: A and S; all to the right and up
        panel = picture[:, start:stop]
        rows = np.flatnonzero((panel.min(-1) > 0.9).sum(1) > 0.4 * (stop - start))
        panel = panel[rows[0] : rows[-1] + 1]
        drawn = np.argwhere(near(panel, "parotid_gland_left", 0.1))
        assert len(drawn) > 100
        down, across = drawn.min(0) / panel.shape[:2], drawn.max(0) / panel.shape[:2]
        assert down[1] > 0.5 and across[0] < 0.5


def test_letters_and_titles(tmp_path: Path, monkeypatch) -> None:
    kept, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *a, **how: (kept.append(figure), save(figure, *a, **how)))
    volume, mask = white_box("LPS")
    save_preview(tmp_path / "p.png", volume, {"liver": mask, "my lesion": mask})
    (figure,) = kept
    found = {}
    for panel in figure.axes:
        at = {text.get_position(): text.get_text() for text in panel.texts}
        left, right = (at[min(at)], at[max(at)])
        bottom, top = (at[min(at, key=lambda p: p[1])], at[max(at, key=lambda p: p[1])])
        found[panel.get_title()] = left + right + bottom + top
    assert found == {"axial": "RLPA", "coronal": "RLIS", "sagittal": "PAIS"}
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["liver", "my lesion"]


def test_contours_change_pixels(tmp_path: Path) -> None:
    volume, mask = white_box("RAS")
    plain = pixels(save_preview(tmp_path / "plain.png", volume, {}))
    empty = pixels(save_preview(tmp_path / "empty.png", volume, {"liver": np.zeros_like(mask)}))
    assert np.array_equal(plain, empty)  # an empty mask draws nothing, not even a legend
    both = {"liver": mask, "spleen": np.flip(mask, 0).copy()}
    drawn = pixels(save_preview(tmp_path / "drawn.png", volume, both))
    for name in ("liver", "spleen"):
        assert near(plain, name).sum() == 0 and near(drawn, name).sum() > 500
    for picture in (plain, drawn):
        assert 800 < picture.shape[1] < 2500 and 250 < picture.shape[0] < 2500
    assert 5_000 < (tmp_path / "drawn.png").stat().st_size < 2_000_000
    assert sorted(p.name for p in tmp_path.iterdir()) == ["drawn.png", "empty.png", "plain.png"]
    assert plt.get_fignums() == []


def test_a_failed_write_keeps_the_old_picture(tmp_path: Path, monkeypatch) -> None:
    volume, mask = white_box("RAS")
    path = tmp_path / "p.png"
    path.write_bytes(b"old")

    def fail(self: object, target: Path, **options: object) -> None:
        Path(target).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", fail)
    with pytest.raises(OSError, match="No space left"):
        save_preview(path, volume, {"liver": mask})
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["p.png"]
    assert plt.get_fignums() == []


def test_a_single_thin_slice(tmp_path: Path) -> None:
    mask = np.zeros((40, 30, 1), bool)
    mask[5:15, 5:20] = True
    save_preview(tmp_path / "p.png", Volume(np.zeros((40, 30, 1), np.float32), np.eye(4)), {"liver": mask})


def test_a_name_without_an_ending(tmp_path: Path) -> None:
    volume, mask = white_box("RAS")
    save_preview(tmp_path / "p", volume, {"liver": mask})


def test_a_flipped_view_is_a_mask_too(tmp_path: Path) -> None:
    volume, mask = white_box("RAS")
    save_preview(tmp_path / "p.png", volume, {"liver": mask[::-1]})


def test_one_mask_at_a_time_is_held(tmp_path: Path, monkeypatch) -> None:
    """What is kept of a mask is three planes: its volume on the picture's grid is gone before the next but one."""
    volume, mask = white_box("RAS")
    made, alive, real = [], [], preview.resample

    class Tracked:
        def __init__(self, array: np.ndarray) -> None:
            self.array = array

        def numpy(self) -> np.ndarray:
            array, self.array = self.array, None
            made.append(weakref.ref(array))
            return array

    def counted(*arguments, **options):
        alive.append(sum(reference() is not None for reference in made))
        return Tracked(real(*arguments, **options).numpy().copy())

    monkeypatch.setattr(preview, "resample", counted)
    masks = {name: np.roll(mask, 2 * i, 0) for i, name in enumerate(("liver", "spleen", "pancreas", "aorta", "colon"))}
    save_preview(tmp_path / "p.png", volume, masks)
    assert len(made) >= 6 and max(alive) <= 2  # the CT itself, and one mask


def test_the_planes_of_a_preview_are_those_of_the_resampled_mask() -> None:
    volume, mask = white_box("PIR")
    masks = {"liver": mask, "spleen": np.flip(mask, 0).copy(), "empty": np.zeros_like(mask)}
    grid = preview.picture_grid(volume.grid)
    planes, shown = preview.cut_masks(masks, volume.grid, grid)
    assert list(shown) == ["liver", "spleen"]
    for name, cuts in shown.items():
        soft = preview.resample(masks[name], volume.grid, grid).numpy()
        for axis in range(3):
            expected = np.take(soft, planes[axis], axis=axis)
            assert cuts[axis].shape == expected.shape
            assert np.array_equal(cuts[axis] > 0.5, expected > 0.5)


def test_a_preview_leaves_the_plots_of_a_notebook_alone(tmp_path: Path) -> None:
    """Before, it changed matplotlib's backend, so that later plots of the user were not shown."""
    script = """
import sys, matplotlib, numpy as np
matplotlib.use("svg")
from matplotlib import pyplot as plt
from mome.viz.preview import save_preview
from mome.volumes import Volume
plt.figure()
save_preview(sys.argv[1], Volume(np.zeros((8, 8, 8), np.float32), np.eye(4)), {"liver": np.ones((8, 8, 8), np.uint8)})
print(matplotlib.get_backend(), plt.get_fignums())
"""
    command = [sys.executable, "-c", script, str(tmp_path / "p.png")]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "svg [1]\n"
