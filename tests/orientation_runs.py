"""One CT in all 48 storage orientations, as NIfTI and DICOM, and in oblique, tilted and irregular grids.

`python tests/orientation_runs.py SCAN --out benchmarks/results/orientations.json` segments a scan in all orientations
with a bundled model, and compares the masks in the world with those of the scan as it is. `overlay_runs.py` does so for
the other grids.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from dicom_series import dataset, write
from pydicom.dataset import FileDataset
from scipy import ndimage

from mome.inference import Segmentation, Segmenter

LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


def stored(array: np.ndarray, affine: np.ndarray, axes: Any, flips: Any) -> tuple[np.ndarray, np.ndarray]:
    """The same volume with its array axes in another order and direction."""
    array, affine = array.transpose(axes), affine[:, [*axes, 3]].copy()
    for axis, flip in enumerate(flips):
        if flip:
            array = np.flip(array, axis)
            affine[:3, 3] += affine[:3, axis] * (array.shape[axis] - 1)
            affine[:3, axis] *= -1
    return np.ascontiguousarray(array), affine


def orientations() -> Iterator[tuple[Any, Any]]:
    """All 48: orders of the axes, and directions of each."""
    return itertools.product(itertools.permutations(range(3)), itertools.product((False, True), repeat=3))


def save_nifti(path: Path, array: np.ndarray, affine: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(np.round(array).astype(np.int16), affine)
    image.set_sform(affine, code=1)
    image.set_qform(affine, code=0 if is_sheared(affine) else 1)
    image.header.set_xyzt_units("mm")
    nib.save(image, path)
    return path


def is_sheared(affine: np.ndarray) -> bool:
    directions = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    return bool(np.abs(directions.T @ directions - np.eye(3)).max() > 1e-4)


def slices_of_volume(array: np.ndarray, affine: np.ndarray, heights: Any = None) -> list[FileDataset]:
    """CT slices of a volume (columns, rows, slices); the axes decide ImageOrientationPatient and the slices' order.

    Args:
        array: (i, j, k) of HU.
        affine: To RAS mm.
        heights: (k,) places of the slices along the third axis, in its steps; regular where None.
    """
    lps = LPS @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    row, column = lps[:3, 0] / spacing[0], lps[:3, 1] / spacing[1]
    heights = np.arange(array.shape[2]) if heights is None else heights
    return [
        dataset(
            np.round(lps[:3, 3] + height * lps[:3, 2], 6),
            [float(f"{v:.12g}") for v in (*row, *column)],
            array[:, :, k].T,
            PixelSpacing=[float(f"{spacing[1]:.10g}"), float(f"{spacing[0]:.10g}")],
            SliceThickness=float(f"{spacing[2]:.8g}"),
            InstanceNumber=k + 1,
            FrameOfReferenceUID="1.2.826.9",
        )
        for k, height in enumerate(heights)
    ]


def save_series(folder: Path, array: np.ndarray, affine: np.ndarray, heights: Any = None) -> Path:
    return write(folder, slices_of_volume(array, affine, heights))


def canonical(array: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A volume with its axes to the right, anterior and superior, by nibabel."""
    image = nib.as_closest_canonical(nib.Nifti1Image(array, affine))
    return np.asarray(image.dataobj), image.affine


def dice(one: np.ndarray, other: np.ndarray) -> float:
    total = int(one.sum()) + int(other.sum())
    return 2 * int((one.astype(bool) & other.astype(bool)).sum()) / total if total else 1.0


def sampled(array: np.ndarray, affine: np.ndarray, points: np.ndarray, order: int, fill: float) -> np.ndarray:
    """A volume at RAS points (…, 3), by scipy."""
    at = (points - affine[:3, 3]) @ np.linalg.inv(affine[:3, :3]).T
    # With the mode "constant", a rounding error would put the outermost planes outside of the volume.
    return ndimage.map_coordinates(
        array.astype(np.float32), np.moveaxis(at, -1, 0), order=order, mode="grid-constant", cval=fill
    )


def places(shape: Any, affine: np.ndarray) -> np.ndarray:
    """(i, j, k, 3) RAS mm of the voxel centres of a grid."""
    at = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    return at @ affine[:3, :3].T + affine[:3, 3]


def lowest(dices: dict[str, dict[str, float]]) -> dict[str, float]:
    """Structure → its lowest Dice."""
    names = next(iter(dices.values()))
    return {name: min(found[name] for found in dices.values()) for name in names}


def turned(affine: np.ndarray, shape: Any, degrees: float) -> np.ndarray:
    """The grid turned around its middle about an oblique axis."""
    axis, angle = np.array([1.0, 2.0, 3.0]) / np.sqrt(14), np.radians(degrees)
    cross = np.array([[0, -axis[2], axis[1]], [axis[2], 0, -axis[0]], [-axis[1], axis[0], 0]])
    rotation = np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross
    middle = affine @ [*(np.asarray(shape) - 1) / 2, 1]
    made = affine.copy()
    made[:3, :3] = rotation @ affine[:3, :3]
    made[:3, 3] = middle[:3] - made[:3, :3] @ ((np.asarray(shape) - 1) / 2)
    return made


def tilted_grid(affine: np.ndarray, shape: Any, degrees: float) -> np.ndarray:
    """The grid with its slices tilted about their rows, as by a gantry: the line of positions stays as it is."""
    made, spacing = affine.copy(), np.linalg.norm(affine[:3, :3], axis=0)
    column, normal = affine[:3, 1] / spacing[1], affine[:3, 2] / spacing[2]
    made[:3, 1] = spacing[1] * (np.cos(np.radians(degrees)) * column + np.sin(np.radians(degrees)) * normal)
    middle = (np.asarray(shape[:2]) - 1) / 2
    made[:3, 3] += affine[:3, 1] * middle[1] - made[:3, 1] * middle[1]
    return made


def translation(voxels: float) -> np.ndarray:
    """(4, 4), a move by voxels along every axis."""
    made = np.eye(4)
    made[:3, 3] = voxels
    return made


def irregular_heights(count: int) -> np.ndarray:
    """Places of slices whose step doubles half-way, with one slice missing."""
    heights = np.concatenate([np.arange(count // 2), np.arange(count // 2, count, 2)]).astype(float)
    return np.delete(heights, 3)


def main() -> None:
    """Runs the orientations of one scan with a bundled model, and adds the result to a JSON file by the scan's name."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("scan", type=Path)
    parser.add_argument("--model", default="mome-ct-tiny")
    parser.add_argument("--every", type=int, default=1, help="take every n-th orientation only")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    segmenter, prompts = bundled(arguments.model)
    with tempfile.TemporaryDirectory() as folder:
        array, affine = read_nifti(arguments.scan)
        found = compared_orientations(segmenter, prompts, array, affine, Path(folder), arguments.every)[0]
    add_result(arguments.out, arguments.scan.name, {"model": arguments.model, **found})


def bundled(model: str) -> tuple[Segmenter, Any]:
    """A bundled model in float32, and prompts of all labels that it was trained on."""
    segmenter = Segmenter(model, precision="fp32")
    return segmenter, segmenter.prepare(segmenter.understand(sorted(segmenter.model.config.trained_labels)))


def read_nifti(scan: Path) -> tuple[np.ndarray, np.ndarray]:
    image = nib.load(scan)
    return np.asarray(image.get_fdata(), dtype=np.float32), image.affine


def add_result(out: Path, name: str, result: dict[str, Any]) -> None:
    """Adds the result of one scan to a JSON file that holds those of others."""
    held = json.loads(out.read_text()) if out.is_file() else {}
    out.write_text(json.dumps({**held, name: result}, indent=1, ensure_ascii=False) + "\n")


def compared_orientations(
    segmenter: Segmenter, prompts: Any, array: np.ndarray, affine: np.ndarray, folder: Path, every: int
) -> tuple[dict[str, Any], Segmentation]:
    """Segments a scan in every n-th orientation; returns the lowest Dice by form, and the result for the scan."""
    plain = segmenter.segment(save_nifti(folder / "plain.nii.gz", array, affine), prompts)
    reference = {name: canonical(plain.masks[name], plain.grid.affine)[0] for name in plain.masks}
    forms: dict[str, dict[str, dict[str, float]]] = {"nifti": {}, "dicom": {}}
    chosen = list(orientations())[::every]
    for number, (axes, flips) in enumerate(chosen):
        other, other_affine = stored(array, affine, axes, flips)
        files = {
            "nifti": save_nifti(folder / f"{number}.nii.gz", other, other_affine),
            "dicom": save_series(folder / f"{number}", other, other_affine),
        }
        for form, file in files.items():
            found = segmenter.segment(file, prompts)
            print(f"{number + 1} of {len(chosen)}, {form}", file=sys.stderr, flush=True)
            forms[form][f"{''.join(map(str, axes))} {flips}"] = {
                name: dice(canonical(found.masks[name], found.grid.affine)[0], reference[name]) for name in reference
            }
    return {
        "orientations": len(chosen),
        "voxels": {name: int(plain.masks.voxels[name]) for name in reference},
        **{f"lowest Dice, {form}": lowest(dices) for form, dices in forms.items()},
    }, plain


if __name__ == "__main__":
    main()
