"""Labels six organs in two abdominal CT that have no labels, for the sixth stage of mome-ct-torso-tiny.

    export MOME_TEST_DATA=…      # the folder that contains unlabelled/
    python benchmarks/abdomen_labels.py --out runs/abdomen

Lungs are the dark voxels inside of the body. For liver, spleen and kidneys a random walker (Grady 2006, IEEE TPAMI
28:1768) starts inside of the masks of a model and stops at edges of the CT. `_BOWEL` was set by hand, where the walker
had leaked into bowel, stomach or the crura of the diaphragm. The masks were looked at, slice by slice; no person drew
them. The model that made the seeds was the mome-ct-torso-tiny of the fifth stage.

OUT/images and OUT/labels hold the CT, turned to RAS, and the label maps.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import nibabel
import numpy as np
from scipy import ndimage
from skimage.segmentation import random_walker

from mome.inference import Segmenter
from mome.labels import load_dataset
from mome.volumes import read_volume

_ORGANS = ("liver", "spleen", "kidney_left", "kidney_right")
_OTHERS = ("aorta", "inferior_vena_cava", "heart", "spinal_cord")  # the model's masks of them are no organ's seeds
# Voxels (i, j, k) of the RAS grid that belong to none of the organs.
_BOWEL: dict[str, list[tuple[int, int, int]]] = {
    "crlm-1004": [
        (81, 124, 18), (69, 126, 17), (71, 127, 16), (59, 140, 20), (65, 137, 22),
        (122, 121, 28), (108, 124, 30), (157, 143, 12), (157, 143, 14),
    ],
    "crlm-1006": [],
}  # fmt: skip
_IN_PLANE = np.ones((3, 3, 1), dtype=bool)
_FAR_MM = 25.0  # nothing farther from all of the model's masks is an organ's
_INNER_MM = 6.0  # seeds lie deeper than this in a mask of the model


def largest(mask: np.ndarray) -> np.ndarray:
    """Returns the largest component of a mask."""
    pieces, count = ndimage.label(mask)
    if count < 2:
        return mask
    return pieces == 1 + np.argmax(ndimage.sum(mask, pieces, range(1, count + 1)))


def lungs(hu: np.ndarray) -> dict[str, np.ndarray]:
    """Returns both lungs: the two largest dark pieces that do not reach the edge of a slice.

    Args:
        hu: (i, j, k), HU, RAS.
    """
    dark = hu < -400
    for k in range(hu.shape[2]):
        pieces, _ = ndimage.label(dark[..., k])
        edge = np.concatenate([pieces[0], pieces[-1], pieces[:, 0], pieces[:, -1]])
        dark[..., k] &= ~np.isin(pieces, edge[edge > 0])
    pieces, count = ndimage.label(dark)
    sizes = ndimage.sum(dark, pieces, range(1, count + 1))
    found = {}
    for number in np.argsort(sizes)[-2:] + 1:
        # Vessels inside of a lung belong to it.
        margin = ((5, 5), (5, 5), (0, 0))
        mask = fill_slices(ndimage.binary_closing(np.pad(pieces == number, margin), np.ones((7, 7, 1)))[5:-5, 5:-5])
        left = np.nonzero(mask)[0].mean() < hu.shape[0] / 2
        found["lung_left" if left else "lung_right"] = mask
    if len(found) != 2:
        raise SystemExit("the two largest dark pieces lie on one side")
    return found


def organs(
    hu: np.ndarray, spacing: np.ndarray, masks: dict[str, np.ndarray], bowel: list[tuple[int, int, int]]
) -> dict[str, np.ndarray]:
    """Returns liver, spleen and kidneys by a random walker.

    Args:
        hu: (i, j, k), HU, RAS.
        spacing: Voxel size in mm.
        masks: The model's masks of `_ORGANS` and `_OTHERS`.
        bowel: Voxels that belong to no organ.
    """
    smooth = ndimage.gaussian_filter(hu, (0.7, 0.7, 0))
    seeds = np.zeros(hu.shape, dtype=np.int32)
    background = len(_ORGANS) + 1
    outside = (smooth < -20) | (smooth > 320)
    outside |= ndimage.distance_transform_edt(~np.any([masks[name] for name in _ORGANS], axis=0), spacing) > _FAR_MM
    for name in _OTHERS:
        outside |= ndimage.binary_erosion(masks[name], _IN_PLANE)
    for number, name in enumerate(_ORGANS, 1):
        # A mask that ends with the scan is no less deep there.
        mask = np.pad(largest(masks[name]), 1, mode="edge")
        inner = ndimage.distance_transform_edt(mask, spacing)[1:-1, 1:-1, 1:-1] > _INNER_MM
        if name.startswith("kidney"):
            seeds[inner & (smooth > 110)] = number
        else:
            middle = np.median(smooth[inner])
            seeds[inner & (np.abs(smooth - middle) < 30)] = number
    seeds[outside] = background
    for point in bowel:
        away = np.ones(hu.shape, dtype=bool)
        away[point] = False
        seeds[ndimage.distance_transform_edt(away, spacing) < 4] = background
    walked = random_walker(
        np.clip(smooth, -60, 260), seeds, beta=400, mode="cg_j", tol=1e-3, spacing=spacing / spacing[0]
    )
    found = {}
    for number, name in enumerate(_ORGANS, 1):
        mask = walked == number
        if name.startswith("kidney"):
            mask |= poles(mask, (smooth > 130) & (smooth < 320) & (walked == background))
        found[name] = fill_slices(largest(ndimage.binary_opening(mask, _IN_PLANE)))
    return found


def fill_slices(mask: np.ndarray) -> np.ndarray:
    """Returns a mask with the holes of every slice filled."""
    return np.stack([ndimage.binary_fill_holes(mask[..., k]) for k in range(mask.shape[2])], axis=-1)


def poles(mask: np.ndarray, bright: np.ndarray) -> np.ndarray:
    """Returns bright voxels above and below a kidney, two slices far.

    The model's masks are seldom deep enough for a seed there.
    """
    grown = mask
    for _ in range(2):
        beside = np.zeros_like(mask)
        beside[..., 1:] |= grown[..., :-1]
        beside[..., :-1] |= grown[..., 1:]
        grown = grown | (beside & bright)
    return grown


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="mome-ct-torso-tiny")
    args = parser.parse_args()
    numbers = load_dataset("crlm_six_organs").name_to_id
    segmenter = Segmenter(args.model)
    for folder in ("images", "labels"):
        (args.out / folder).mkdir(parents=True, exist_ok=True)
    for case, bowel in _BOWEL.items():
        source = Path(os.environ["MOME_TEST_DATA"]) / "unlabelled" / f"{case}_1p6x5mm_ct_unlabelled.nii.gz"
        turned = nibabel.as_closest_canonical(nibabel.load(source))
        image = args.out / "images" / f"{case}.nii.gz"
        nibabel.save(turned, image)
        volume = read_volume(image)
        hu, spacing = np.asarray(volume.array, dtype=np.float32), np.array(volume.spacing)
        result = segmenter.segment(volume, [*_ORGANS, *_OTHERS, "lung_left", "lung_right"])
        masks = {name: mask.astype(bool) for name, mask in result.masks.items()}
        found = organs(hu, spacing, masks, bowel) | lungs(hu)
        labels = np.zeros(hu.shape, dtype=np.uint8)
        for name, mask in found.items():
            labels[mask & (labels == 0)] = numbers[name]
            mine = labels == numbers[name]
            agreement = 2 * (mine & masks[name]).sum() / (mine.sum() + masks[name].sum())
            print(f"{case} {name:12} {mine.sum() * spacing.prod() / 1000:7.1f} ml, model {agreement:.3f}", flush=True)
        nibabel.save(nibabel.Nifti1Image(labels, turned.affine), args.out / "labels" / f"{case}.nii.gz")


if __name__ == "__main__":
    main()
