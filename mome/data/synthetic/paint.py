"""Gives HU to the voxels of a deformed anatomy."""

from __future__ import annotations

from fnmatch import fnmatchcase

import numpy as np
from scipy import ndimage

from mome.data.synthetic.body import FAT, INNER, LUNG, MUSCLE, OUTSIDE_MM, SKIN, SOFT
from mome.data.synthetic.tissues import Palette
from mome.labels import load_table


def paint(
    rng: np.random.Generator, ids: np.ndarray, distance: np.ndarray, palette: Palette, spacing: float
) -> tuple[np.ndarray, np.ndarray]:
    """Paints all voxels from the palette.

    Unlabelled voxels get the layers of a body from inside to outside: a mixture of fat and soft tissue, a wall of
    muscle, fat and skin, whose thicknesses are drawn anew. Bowel, colon and stomach are filled with gas, fluid and
    wall; kidneys get a cortex, bones a dense shell, lungs vessels, the liver vessels and sometimes lesions.

    Args:
        rng: Source of all randomness.
        ids: uint8 (i, j, k).
        distance: float32 (i, j, k), mm to the inner body.
        palette: HU by id.
        spacing: Voxel side in mm.

    Returns:
        HU as float32 (i, j, k), before the scanner's blur and noise, and the mask of the body.
    """
    coarse, fine = _noise(rng, ids.shape, 12 / spacing), _noise(rng, ids.shape, 4 / spacing)
    tissue = _layers(rng, ids, distance, coarse, fine)
    table = {label.name: label.id for label in load_table()}
    hu = palette.mean[tissue] + palette.texture[tissue] * (0.6 * coarse + 0.8 * fine)
    shell = (tissue != ndimage.grey_erosion(tissue, 3)) | (tissue != ndimage.grey_dilation(tissue, 3))
    _fill_bowel(rng, hu, tissue, shell, coarse, palette, table)
    bones = _ids(table, "vertebrae_*", "rib_*", "hip_*", "sacrum", "femur_*", "humerus_*", "scapula_*", "clavicula_*")
    dense = np.isin(tissue, bones) & shell
    hu[dense] += np.float32(rng.uniform(80, 350))
    if palette.phase == "arterial":
        cortex = np.isin(tissue, _ids(table, "kidney_right", "kidney_left")) & ndimage.binary_dilation(shell)
        hu[cortex] += np.float32(rng.uniform(10, 60))
    lungs = np.isin(tissue, _ids(table, "lung_left", "lung_right", "lung_*_lobe_*") + [LUNG])
    vessels = lungs & (fine > rng.uniform(1.6, 2.4))
    hu[vessels] += np.float32(rng.uniform(250, 800)) * np.clip(fine[vessels] - 1.5, 0, 1)
    _paint_liver(rng, hu, tissue, coarse, fine, palette, table)
    return hu.astype(np.float32), tissue > 0


def recolour(rng: np.random.Generator, hu: np.ndarray, ids: np.ndarray, palette: Palette) -> np.ndarray:
    """Moves the mean HU of each labelled organ of a real CT part of the way to the palette, and keeps its texture.

    Args:
        rng: Source of all randomness.
        hu: float32 (i, j, k), a real CT.
        ids: uint8 (i, j, k).
        palette: HU by id.

    Returns:
        float32 (i, j, k).
    """
    shares, shift = np.zeros(256, dtype=np.float32), np.zeros(256, dtype=np.float32)
    common = rng.uniform(0, 1)
    sample = (slice(None, None, 2),) * 3
    small_ids, small_hu = ids[sample], hu[sample]
    for number in np.unique(small_ids):
        inside = small_hu[small_ids == number]
        if number == 0 or len(inside) < 20:
            continue
        median = float(np.median(inside))
        if median > -300 and palette.mean[number] > -300:
            shares[number] = np.clip(common + 0.2 * rng.standard_normal(), 0, 1)
            limit = 25.0 if number in (FAT, MUSCLE) else 350.0
            shift[number] = np.clip(palette.mean[number] - median, -limit, limit) * shares[number]
    moved = ndimage.gaussian_filter(shift[ids], 0.8)
    soft = np.clip((hu + 250) / 150, 0, 1)  # gas inside organs stays gas
    return (hu + moved * soft).astype(np.float32)


def _layers(
    rng: np.random.Generator, ids: np.ndarray, distance: np.ndarray, coarse: np.ndarray, fine: np.ndarray
) -> np.ndarray:
    """Returns the ids with the layers of the body wall drawn in."""
    tissue = ids.copy()
    tissue[(ids == FAT) & (distance > 0)] = 0  # drawn anew with another thickness
    unlabelled = (tissue == 0) | (tissue == INNER)
    muscle, fat = rng.uniform(4, 14), min(float(np.exp(rng.uniform(np.log(4), np.log(40)))), OUTSIDE_MM - 20)
    depth = np.arange(ids.shape[1], dtype=np.float32)[None, :, None] / ids.shape[1]
    thickness = fat * (1 + rng.uniform(-0.5, 0.5) * (depth - 0.5) * 2)  # more fat in front or behind
    rough = distance + 2 * coarse
    wall = unlabelled & (rough > -rng.uniform(2, 8)) & (rough <= muscle)
    tissue[wall & (fine > -1.4)] = MUSCLE
    tissue[wall & (fine <= -1.4)] = FAT
    rest = unlabelled & (rough > muscle)
    tissue[rest & (distance <= muscle + thickness)] = FAT
    skin = rest & (distance > muscle + thickness - 2) & (distance <= muscle + thickness + 1)
    tissue[skin] = SKIN
    tissue[rest & (distance > muscle + thickness + 1)] = 0
    inner = tissue == INNER
    share = rng.uniform(-0.2, 1.6)  # lean people have little fat between the organs
    tissue[inner & (0.7 * fine + 0.7 * coarse > share)] = SOFT
    return tissue


def _fill_bowel(
    rng: np.random.Generator,
    hu: np.ndarray,
    tissue: np.ndarray,
    shell: np.ndarray,
    coarse: np.ndarray,
    palette: Palette,
    table: dict[str, int],
) -> None:
    """Fills the hollow organs behind their wall; gas lies in front, as in a person on the back."""
    height = np.linspace(-1, 1, hu.shape[1], dtype=np.float32)[None, :, None]
    for name, gas in (("stomach", 0.5), ("colon", 0.6), ("small_bowel", 0.1), ("duodenum", 0.1)):
        inside = (tissue == table[name]) & ~shell
        if not inside.any():
            continue
        content = rng.choice([rng.uniform(0, 40), rng.uniform(-150, 60), rng.uniform(100, 500)], p=[0.6, 0.25, 0.15])
        share = rng.uniform(0.3, 1.0)
        filled = inside & (coarse + rng.uniform(-1, 1) > -share)
        hu[filled] = np.float32(content) + 0.5 * palette.texture[table[name]] * coarse[filled]
        if rng.random() < gas:
            middle = float(np.broadcast_to(height, hu.shape)[inside].mean())
            level = (height - middle) * rng.uniform(0, 6) + coarse
            hu[inside & (level > rng.uniform(0.0, 1.6))] = -970
    if rng.random() < 0.5:
        gullet = (tissue == table["esophagus"]) & ~shell & (coarse > rng.uniform(-0.5, 1.5))
        hu[gullet] = -800


def _paint_liver(
    rng: np.random.Generator,
    hu: np.ndarray,
    tissue: np.ndarray,
    coarse: np.ndarray,
    fine: np.ndarray,
    palette: Palette,
    table: dict[str, int],
) -> None:
    """Draws vessels into the liver, and dark lesions into some; both belong to the liver's mask."""
    liver = tissue == table["liver"]
    if not liver.any():
        return
    vessels = liver & (np.abs(coarse) < 0.12) & (fine > 0.2)
    hu[vessels] += 0.6 * (palette.mean[table["portal_vein_and_splenic_vein"]] - palette.mean[table["liver"]])
    if rng.random() < 0.25:
        hu[liver & (coarse > rng.uniform(1.5, 2.5))] -= np.float32(rng.uniform(15, 60))


def _ids(table: dict[str, int], *patterns: str) -> list[int]:
    return [number for name, number in table.items() if any(fnmatchcase(name, pattern) for pattern in patterns)]


def _noise(rng: np.random.Generator, shape: tuple[int, ...], width: float) -> np.ndarray:
    """Returns smooth noise of mean 0 and standard deviation 1; `width` in voxels."""
    step = max(int(width / 2), 1)
    small = [int(np.ceil(n / step)) + 1 for n in shape]
    noise = ndimage.gaussian_filter(rng.standard_normal(small, dtype=np.float32), width / step / 2)
    noise = ndimage.zoom(noise, [n / m for n, m in zip(shape, small, strict=True)], order=1)
    return (noise / max(float(noise.std()), 1e-6)).astype(np.float32)
