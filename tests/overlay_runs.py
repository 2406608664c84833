"""One CT on other slices: stored as sagittal slices, oblique, tilted, and with irregular steps.

`python tests/overlay_runs.py SCAN --models mome-ct-torso-tiny --out benchmarks/results/overlays.json` resamples a scan
to such slices, writes them as DICOM, segments them, and writes a DICOM SEG and an RT Structure Set. It reports two Dice
per structure. `overlay` compares each file, as independent readers see it on the slices of the CT, with the masks of
this segmentation. `Dice` compares the same file with the masks of the scan as it is, at the same places in the patient.

With `--models threshold`, a threshold stands for the network, so that only reading, resampling and writing count.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import highdicom
import numpy as np
import SimpleITK
from dicom_readback import Slices, masks_of_seg, masks_of_structure_set, seg_numbers, source_places
from orientation_runs import (
    add_result,
    bundled,
    canonical,
    compared_orientations,
    dice,
    irregular_heights,
    read_nifti,
    sampled,
    save_nifti,
    save_series,
    stored,
    tilted_grid,
    translation,
    turned,
)
from scipy import ndimage
from stand_in_models import Contrast

from mome.inference import Segmentation, Segmenter
from mome.processing import MoMEProcessor

Read = dict[str, tuple[np.ndarray, np.ndarray]]
"""Structure → mask of every pixel of the slices, (pixels,), and where these lie, (pixels, 3) RAS mm."""


def main() -> None:
    """Runs the other slices of one scan, and adds the result to a JSON file by scan and model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scan", type=Path)
    parser.add_argument("--models", nargs="+", default=["mome-ct-torso-tiny"], help="bundled models, or threshold")
    parser.add_argument("--forms", nargs="*", default=(), help="some forms of slices only, as in axial; all where none")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    array, affine = read_nifti(arguments.scan)
    voxel_ml = abs(np.linalg.det(affine[:3, :3])) / 1000
    for model in arguments.models:
        segmenter, prompts = threshold() if model == "threshold" else bundled(model)
        with tempfile.TemporaryDirectory() as folder:
            plain = segmenter.segment(save_nifti(Path(folder) / "plain.nii.gz", array, affine), prompts)
            found = compared_grids(segmenter, prompts, array, affine, Path(folder), plain, arguments.forms)
        volumes = {name: round(int(plain.masks.voxels[name]) * voxel_ml, 1) for name in plain.masks}
        key = f"{arguments.scan.name}, {model}"
        held = json.loads(arguments.out.read_text()).get(key, {}) if arguments.out.is_file() else {}
        add_result(arguments.out, key, {"ml": volumes, **held, **found})


def threshold() -> tuple[Segmenter, Any]:
    """A network that looks at one voxel: `body` is above −200 HU, `bones` above 200 HU, on a grid of 3 mm."""
    low, high = -500.0, 500.0
    model = Contrast(("body", "bones"), [(level - low) / (high - low) for level in (-200, 200)], patch=64)
    segmenter = Segmenter(model, MoMEProcessor(spacing=[3, 3, 3], hu_window=[low, high]))
    return segmenter, segmenter.prepare(["body", "bones"])


def compared(
    segmenter: Segmenter, prompts: Any, array: np.ndarray, affine: np.ndarray, folder: Path, every: int
) -> dict[str, Any]:
    """Segments a scan in every n-th orientation and on other slices, and compares the masks with those of the scan."""
    report, plain = compared_orientations(segmenter, prompts, array, affine, folder, every)
    return {**report, **compared_grids(segmenter, prompts, array, affine, folder, plain)}


def run_with_bundled_model(scan: Path, every: int = 1) -> dict[str, Any]:
    """`compared` of a scan with mome-ct-tiny."""
    segmenter, prompts = bundled("mome-ct-tiny")
    with tempfile.TemporaryDirectory() as folder:
        return compared(segmenter, prompts, *read_nifti(scan), Path(folder), every)


def compared_grids(
    segmenter: Segmenter,
    prompts: Any,
    array: np.ndarray,
    affine: np.ndarray,
    folder: Path,
    plain: Segmentation,
    only: Sequence[str] = (),
) -> dict[str, Any]:
    """Segments a scan on other slices; returns both Dice of the module's description per form and reader."""
    array, affine = canonical(array, affine)
    axial, sagittal = ((0, 1, 2), (True, True, False)), ((1, 2, 0), (True, True, False))
    forms: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray | None]] = {
        "axial": (*stored(array, affine, *axial), None),
        "sagittal": (*stored(array, affine, *sagittal), None),
        "oblique by 20°": _resliced(array, affine, turned(affine, array.shape, 20)),
        "tilted by 15°": _resliced(array, affine, tilted_grid(affine, array.shape, 15)),
        "irregular steps": _resliced(array, affine, affine, irregular_heights(array.shape[2])),
        # What one more interpolation of the scan changes, without any turn.
        "moved by half a voxel": _resliced(array, affine, affine @ translation(0.5)),
    }
    report: dict[str, Any] = {}
    assert set(only) <= set(forms), f"forms: {', '.join(forms)}"
    for form, (hu, grid, heights) in forms.items():
        if only and form not in only:
            continue
        series = save_series(folder / form / "ct", hu, grid, heights)
        found = segmenter.segment(series, prompts)
        read = read_files(found, series, folder / form, itk=heights is None and "tilted" not in form)
        report[f"overlay, {form}"] = {reader: _dices(files, found, 0) for reader, files in read.items()}
        report[f"Dice, {form}"] = {
            kind: _dices(read[reader], plain, 1)
            for kind, reader in {"dicom_seg": "SEG by pydicom", "rtstruct": "RTSTRUCT by pydicom"}.items()
        }
        print(form, file=sys.stderr, flush=True)
    return report


def _resliced(
    array: np.ndarray, affine: np.ndarray, grid: np.ndarray, heights: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """HU of a scan, interpolated linearly, on slices of a grid or at heights along its third axis."""
    indices = np.arange(array.shape[2]) if heights is None else heights
    at = np.stack(np.meshgrid(*map(np.arange, array.shape[:2]), indices, indexing="ij"), -1)
    return np.round(sampled(array, affine, at @ grid[:3, :3].T + grid[:3, 3], order=1, fill=-1000)), grid, heights


def _dices(read: Read, result: Segmentation, order: int) -> dict[str, float]:
    """Dice of masks that were read from a file with those of a segmentation, at the places of the file's pixels."""
    places = next(iter(read.values()))[1]  # those of every structure
    to_voxels = np.linalg.inv(result.grid.affine)
    at = (places @ to_voxels[:3, :3].T + to_voxels[:3, 3]).T
    found = {}
    for name, (mask, _) in read.items():
        whole = result.masks[name]
        inside = np.argwhere(whole)
        wanted = np.zeros(len(places), bool)
        if len(inside):
            low, high = (edge[:, None] for edge in (inside.min(axis=0) - 1, inside.max(axis=0) + 1))
            near = ((at > low) & (at < high)).all(axis=0)
            # With the mode "constant", a rounding error would put the outermost planes outside of the volume.
            values = ndimage.map_coordinates(whole.astype(np.float32), at[:, near], order=order, mode="grid-constant")
            wanted[near] = values > 0.5
        found[name] = round(dice(mask, wanted), 4)
    return found


def read_files(found: Segmentation, series: Path, folder: Path, *, itk: bool) -> dict[str, Read]:
    """Writes a SEG of either kind and an RT Structure Set, and reads them with tools that share no code with mome.

    Args:
        found: The result for the series.
        series: The folder of the CT.
        folder: Where the files go.
        itk: Also by dcmqi, whose images hold neither a tilt nor irregular steps.

    Returns:
        Reader → masks.
    """
    (seg,) = found.save(folder, "ct", writer="dicom_seg")
    (binary,) = found.save(folder / "binary", "ct", writer="dicom_seg(kind=binary)")
    (structures,) = found.save(folder, "ct", writer="rtstruct")
    source = source_places(series)
    read = {
        "SEG by pydicom": _on_slices(masks_of_seg(seg, source), source),
        "SEG by highdicom": _on_slices(_by_highdicom(seg, source), source),
        "binary SEG by highdicom": _on_slices(_by_highdicom(binary, source), source),
        "RTSTRUCT by pydicom": _on_slices(masks_of_structure_set(structures, source), source),
    }
    return {**read, "SEG by dcmqi, CT by SimpleITK": _by_dcmqi(seg, series, folder / "dcmqi")} if itk else read


def _on_slices(masks: dict[str, dict[tuple[str, int], np.ndarray]], source: Slices) -> Read:
    """Masks of slices as masks of all pixels; a slice without one is empty."""
    at = np.concatenate([at.reshape(-1, 3) for at in source.values()]) * (-1, -1, 1)
    return {
        name: (np.concatenate([found.get(k, np.zeros(p.shape[:2])).ravel() for k, p in source.items()]) > 0, at)
        for name, found in masks.items()
    }


def _by_highdicom(path: Path, source: Slices) -> dict[str, dict[tuple[str, int], np.ndarray]]:
    """Label → slice → mask of a SEG, by the slices that its frames refer to."""
    read = highdicom.seg.segread(path)
    names = {number: name for name, number in seg_numbers(path).items()}
    masks = read.get_pixels_by_source_instance(
        [uid for uid, _ in source],
        segment_numbers=sorted(names),
        ignore_spatial_locations=False,
        assert_missing_frames_are_empty=True,
    )
    return {
        names[number]: dict(zip(source, masks[..., at] > 0, strict=True)) for at, number in enumerate(sorted(names))
    }


def _by_dcmqi(path: Path, series: Path, folder: Path) -> Read:
    """Masks of a SEG that dcmqi converts to images, put on the grid of the CT by SimpleITK."""
    tool = shutil.which(
        "segimage2itkimage", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    )
    assert tool is not None, "pip install dcmqi"
    folder.mkdir()
    command = [tool, "--inputDICOM", str(path), "--outputDirectory", str(folder), "--outputType", "nii"]
    subprocess.run(command, capture_output=True, check=True)
    files = SimpleITK.ImageSeriesReader.GetGDCMSeriesFileNames(str(series))
    ct = SimpleITK.ReadImage(files)
    i, j, k = ct.GetSize()
    at = np.stack(np.meshgrid(np.arange(i), np.arange(j), np.arange(k), indexing="ij"), -1).reshape(-1, 3)
    steps = np.reshape(ct.GetDirection(), (3, 3)) * ct.GetSpacing()
    places = (at @ steps.T + ct.GetOrigin()) * (-1, -1, 1)
    names = {number: name for name, number in seg_numbers(path).items()}
    read: Read = {name: (np.zeros(len(at), bool), places) for name in names.values()}
    for file in folder.glob("*.nii.gz"):  # one for a label map, one per segment for bits
        image = SimpleITK.Resample(
            SimpleITK.ReadImage(str(file)), ct, SimpleITK.Transform(), SimpleITK.sitkNearestNeighbor
        )
        labels = SimpleITK.GetArrayFromImage(image).transpose(2, 1, 0).ravel()
        for number, name in names.items():
            read[name] = (read[name][0] | (labels == number), places)
    return read


if __name__ == "__main__":
    main()
