"""The scans of the inference benchmarks, made from real CT, and the signed distances of their structures.

The files go into a folder of the caller and are made once. The CT is that of MOME_TEST_DATA: `torso/ts_example_ct` and
`torso/lidc_totalseg` (512 × 512 × 133 voxels of 0.70 × 0.70 × 2.5 mm with 89 structures).
"""

from __future__ import annotations

import json
from pathlib import Path

import nibabel
import numpy as np
from known_logits import SignedDistances, masks_on

from mome.labels import load_table
from mome.processing import MoMEProcessor
from mome.volumes import Grid, Volume, network_grid, read_label_map, read_volume, resample

AIR_HU, BODY_HU = -1024.0, -300.0
LIDC = "LIDC-IDRI-0001.nii.gz"


def torso_at_2_mm(data: Path, folder: Path) -> Path:
    """`ts_example_ct`, resampled from 3 mm to 2 mm (183 × 152 × 168 voxels)."""
    path = folder / "torso_2mm.nii.gz"
    if not path.exists():
        scan = read_volume(data / "torso" / "ts_example_ct.nii.gz")
        target = network_grid(scan.grid, spacing=(2.0, 2.0, 2.0), orientation=scan.grid.orientation)
        hu = resample(scan.array, scan.grid, target, fill=AIR_HU).numpy()
        _write(path, hu.round().astype(np.int16), target)
    return path


def long_scan(data: Path, folder: Path, planes: int, spacing: float = 1.0) -> Path:
    """The LIDC scan, continued by its mirror image along the last axis until it has the wanted planes."""
    path = folder / f"lidc_512x512x{planes}.nii.gz"
    if not path.exists():
        scan = _continued(read_volume(data / "torso" / "lidc_totalseg" / "images" / LIDC), planes * spacing)
        target = long_grid(scan, planes, spacing)
        hu = resample(scan.array, scan.grid, target, fill=AIR_HU).numpy()
        _write(path, hu.round().astype(np.int16), target)
    return path


def structure_distances(
    data: Path, folder: Path, planes: int, processor: MoMEProcessor, spacing: float = 1.0
) -> tuple[list[str], SignedDistances]:
    """The 89 structures of the long scan: names, and signed distances on the network grid of `processor`."""
    settings = "x".join(f"{step:.4f}" for step in processor.spacing)
    path, names_path = folder / f"distances_{planes}_{settings}.npz", folder / "structures.json"
    if not (path.exists() and names_path.exists()):
        source = data / "torso" / "lidc_totalseg"
        names_by_id = json.loads((source / "labels.json").read_text())["labels"]
        labels = read_label_map(source / "labels" / LIDC)
        ids = [int(number) for number in np.unique(labels.array) if number]
        ids = [number for number in ids if names_by_id[str(number)] in load_table()]
        labels = _continued(labels, planes * spacing)
        network = processor.network_grid(long_grid(labels, planes, spacing))
        SignedDistances.of_masks(masks_on(network, labels, ids), network.spacing).save(path)
        names_path.write_text(json.dumps([names_by_id[str(number)] for number in ids]))
    return json.loads(names_path.read_text()), SignedDistances.load(path)


def body_distances(scan: Volume, processor: MoMEProcessor) -> SignedDistances:
    """The body and the table with the air in them as one structure, on the network grid."""
    from scipy.ndimage import binary_fill_holes

    network = processor.network_grid(scan.grid)
    body = resample(scan.array, scan.grid, network, fill=AIR_HU).numpy() > BODY_HU
    filled = np.stack([binary_fill_holes(plane) for plane in np.moveaxis(body, 2, 0)], axis=2)
    return SignedDistances.of_masks([filled], network.spacing)


def long_grid(continued: Volume, planes: int, spacing: float) -> Grid:
    """The grid of a long scan: the in-plane voxels of the source, and `planes` of `spacing` mm along the last axis."""
    affine = continued.affine.copy()
    direction = affine[:3, 2] / np.linalg.norm(affine[:3, 2])
    affine[:3, 3] += direction * 0.5 * (spacing - continued.spacing[2])  # the outer faces of the first planes coincide
    affine[:3, 2] = direction * spacing
    return Grid((continued.shape[0], continued.shape[1], planes), affine)


def _continued(volume: Volume, length_mm: float) -> Volume:
    """The volume and its mirror images along the last axis, until they are as long as wanted."""
    count = volume.shape[2]
    wanted = int(np.ceil(length_mm / volume.spacing[2]))
    there_and_back = [*range(count), *reversed(range(count))]
    planes = [there_and_back[index % len(there_and_back)] for index in range(wanted)]
    return Volume(volume.array[:, :, planes], volume.affine)


def _write(path: Path, array: np.ndarray, grid: Grid) -> None:
    """Writes a scan under another name first, so that a killed run leaves none that is cut off."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name("part_" + path.name)
    nibabel.save(nibabel.Nifti1Image(array, grid.affine), part)
    part.rename(path)
