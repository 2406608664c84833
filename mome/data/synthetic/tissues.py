"""HU of tissues, and how contrast medium changes them.

The means are those of textbooks and of the CT of LIDC-IDRI-0001 (arterial), rounded; spreads are our choice.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np

from mome.data.synthetic import body
from mome.labels import load_table

PHASES = ("unenhanced", "arterial", "portal venous")
_SHARES = (0.3, 0.25, 0.45)


@dataclass(frozen=True)
class Tissue:
    """One tissue.

    Attributes:
        hu: Mean HU in the phases unenhanced, arterial and portal venous.
        spread: Standard deviation of the mean between people, in HU.
        texture: Standard deviation inside one person, in HU.
    """

    hu: tuple[float, float, float]
    spread: float
    texture: float


# The first pattern that fits a name of the class table counts.
_TISSUES: tuple[tuple[str, Tissue], ...] = (
    ("spleen", Tissue((48, 120, 122), 10, 7)),
    ("kidney_cyst*", Tissue((8, 9, 10), 6, 5)),
    ("kidney_*", Tissue((32, 150, 180), 15, 12)),
    ("gallbladder", Tissue((8, 9, 10), 8, 5)),
    ("liver", Tissue((56, 72, 108), 12, 7)),
    ("stomach", Tissue((30, 45, 45), 20, 20)),
    ("pancreas", Tissue((40, 100, 92), 12, 18)),
    ("adrenal_gland_*", Tissue((28, 70, 75), 10, 8)),
    ("lung_*", Tissue((-850, -845, -845), 35, 45)),
    ("esophagus", Tissue((36, 55, 60), 10, 14)),
    ("trachea", Tissue((-985, -985, -985), 10, 10)),
    ("thyroid_gland", Tissue((95, 190, 160), 20, 12)),
    ("small_bowel", Tissue((30, 55, 65), 15, 22)),
    ("duodenum", Tissue((30, 60, 65), 15, 18)),
    ("colon", Tissue((25, 40, 45), 20, 40)),
    ("urinary_bladder", Tissue((6, 6, 8), 8, 4)),
    ("prostate", Tissue((40, 60, 75), 8, 10)),
    ("heart", Tissue((42, 210, 135), 15, 22)),
    ("aorta", Tissue((42, 330, 155), 20, 8)),
    ("brachiocephalic_vein_*", Tissue((42, 220, 145), 60, 12)),
    ("superior_vena_cava", Tissue((42, 250, 145), 80, 15)),
    ("inferior_vena_cava", Tissue((40, 80, 130), 20, 12)),
    ("portal_vein_and_splenic_vein", Tissue((42, 110, 160), 15, 8)),
    ("iliac_vena_*", Tissue((42, 50, 110), 20, 10)),
    ("pulmonary_vein", Tissue((42, 340, 150), 40, 10)),
    ("atrial_appendage_left", Tissue((42, 330, 150), 40, 12)),
    ("*_artery_*", Tissue((42, 320, 150), 30, 12)),
    ("brachiocephalic_trunk", Tissue((42, 320, 150), 20, 10)),
    ("vertebrae_*", Tissue((175, 180, 185), 45, 45)),
    ("rib_*", Tissue((260, 262, 265), 60, 70)),
    ("costal_cartilages", Tissue((105, 106, 108), 20, 18)),
    ("sternum", Tissue((140, 142, 145), 40, 45)),
    ("skull", Tissue((700, 700, 700), 80, 150)),
    ("brain", Tissue((33, 36, 37), 3, 4)),
    ("spinal_cord", Tissue((28, 32, 34), 8, 8)),
    ("autochthon_*", Tissue((46, 50, 52), 10, 16)),
    ("gluteus_*", Tissue((50, 54, 57), 10, 14)),
    ("iliopsoas_*", Tissue((54, 58, 61), 8, 9)),
)
_BONES = Tissue((240, 242, 245), 50, 70)  # limbs, shoulder girdle and pelvis
_FILLINGS: dict[int, Tissue] = {
    body.FAT: Tissue((-106, -105, -104), 7, 9),
    body.MUSCLE: Tissue((50, 54, 57), 9, 16),
    body.INNER: Tissue((-95, -92, -88), 10, 14),
    body.SOFT: Tissue((38, 70, 75), 14, 14),
    body.BONE: Tissue((260, 262, 265), 60, 80),
    body.SKIN: Tissue((10, 14, 16), 15, 12),
    body.LUNG: Tissue((-850, -845, -845), 35, 46),
    body.GAS: Tissue((-950, -950, -950), 30, 20),
}


def tissue_of(name: str) -> Tissue:
    """Returns the tissue of a structure of the class table; what no pattern names is bone."""
    return next((tissue for pattern, tissue in _TISSUES if fnmatchcase(name, pattern)), _BONES)


@dataclass(frozen=True)
class Palette:
    """The HU of one image, by id.

    Attributes:
        mean: float32 (256,), HU.
        texture: float32 (256,), standard deviation in HU.
        phase: One of `PHASES`, or "random" for domain randomisation.
    """

    mean: np.ndarray
    texture: np.ndarray
    phase: str


def draw_palette(rng: np.random.Generator, randomised: bool) -> Palette:
    """Draws the HU of all tissues for one image.

    Args:
        rng: Source of all randomness.
        randomised: Domain randomisation: every soft tissue and bone gets a random mean and texture, as in SynthSeg
            (Billot et al. 2023, Medical Image Analysis 86:102789); gas and lungs stay dark. The ranges are our choice.
    """
    mean, texture = np.full(256, -1000, dtype=np.float32), np.zeros(256, dtype=np.float32)
    phase = int(rng.choice(3, p=_SHARES))
    strength = rng.uniform(0.55, 1.35)
    tissues = {label.id: tissue_of(label.name) for label in load_table()} | _FILLINGS
    shared: dict[Tissue, float] = {}  # kidneys, ribs and so on share their mean within one person
    for number, tissue in tissues.items():
        if tissue not in shared:
            shared[tissue] = float(rng.standard_normal())
        plain, enhanced = tissue.hu[0], tissue.hu[phase]
        value = plain + strength * (enhanced - plain) + tissue.spread * (0.9 * shared[tissue])
        mean[number] = value + 0.1 * tissue.spread * rng.standard_normal()
        texture[number] = tissue.texture * rng.uniform(0.5, 1.5)
    liver = next(label.id for label in load_table() if label.name == "liver")
    if rng.random() < 0.15:
        mean[liver] -= rng.uniform(15, 60)  # a fatty liver
    if rng.random() < 0.07:
        mean[[i for i, t in tissues.items() if t.hu[0] == 6]] += rng.uniform(40, 300)  # medium in the bladder
    if randomised:
        for number, tissue in tissues.items():
            if tissue.hu[0] > -500:
                mean[number] = mean[number] * 0.3 + 0.7 * rng.uniform(-120, 260)
                texture[number] = rng.uniform(2, 35)
            else:
                mean[number] = rng.uniform(-1000, -650)
    return Palette(mean, texture, "random" if randomised else PHASES[phase])
