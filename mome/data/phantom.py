"""A synthetic CT of torso, neck and head with known masks, for the demo, for tests and as additional training data.

Every structure is a smooth shape in mm. A voxel at its edge takes a share of its HU (partial volume). Noise is Gaussian
and correlated over about one voxel. Proportions are those of adults on public scans and vary with the seed. Physics of
a scanner is not simulated. All shapes and numbers are our choice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

# vary(value, spread=0.08): a value within ± spread of `value`, drawn for this person.
Vary = Callable[..., float]

# Increase it when phantoms change, so that caches of older phantoms are not reused.
PHANTOM_VERSION = 1


@dataclass(frozen=True)
class Phantom:
    """One synthetic CT.

    Attributes:
        array: float32 HU (i, j, k) on RAS axes.
        affine: (4, 4), voxel centres to RAS mm.
        masks: Label name → bool (i, j, k); disjoint.
    """

    array: np.ndarray
    affine: np.ndarray
    masks: dict[str, np.ndarray]


class _Canvas:
    """Paints soft shapes; a later shape covers earlier ones.

    Args:
        shape: Voxels (i, j, k).
        affine: (4, 4), voxel centres to mm.
    """

    def __init__(self, shape: Sequence[int], affine: np.ndarray) -> None:
        self.spacing = np.abs(np.diag(affine)[:3])
        axes = [affine[a, 3] + affine[a, a] * np.arange(n) for a, n in enumerate(shape)]
        self.x, self.y, self.z = (
            axes[0][:, None, None].astype(np.float32),
            axes[1][None, :, None].astype(np.float32),
            axes[2][None, None, :].astype(np.float32),
        )
        self.hu = np.full(tuple(shape), -1000.0, dtype=np.float32)
        self.masks: dict[str, np.ndarray] = {}
        self.edge = float(self.spacing.mean())

    def paint(self, distance: np.ndarray, hu: float, name: str | None = None) -> None:
        """Paints one shape.

        Args:
            distance: (i, j, k), distance to the surface in mm, negative inside; edge voxels get a share of `hu`.
            hu: HU inside.
            name: Structure whose mask the shape is added to; None only takes its voxels from the other masks.
        """
        cover = np.clip(0.5 - distance / self.edge, 0, 1)
        self.hu += cover * (np.float32(hu) - self.hu)
        inside = cover >= 0.5
        for mask in self.masks.values():
            mask &= ~inside
        if name is not None:
            self.masks[name] = inside | self.masks[name] if name in self.masks else inside.copy()

    def ellipsoid(self, centre: Sequence[float], radii: Sequence[float]) -> np.ndarray:
        """Distance (i, j, k) in mm to an ellipsoid, exact to first order near its surface; `radii` in mm."""
        u = [(w - c) / r for w, c, r in zip((self.x, self.y, self.z), centre, radii, strict=True)]
        scaled = np.sqrt(u[0] ** 2 + u[1] ** 2 + u[2] ** 2)
        slope = np.sqrt(sum((v / r) ** 2 for v, r in zip(u, radii, strict=True))) / np.maximum(scaled, 1e-3)
        return (scaled - 1) / np.maximum(slope, 1e-6)

    def tube(self, points: Sequence[Sequence[float]], radii: Sequence[float] | float) -> np.ndarray:
        """Distance (i, j, k) in mm to a tube along a polyline; one radius (mm) for each point, or one for all."""
        nodes = np.asarray(points, dtype=np.float32)
        width = np.broadcast_to(np.asarray(radii, dtype=np.float32), (len(nodes),))
        best = np.full(self.hu.shape, np.inf, dtype=np.float32)
        for a, b, ra, rb in zip(nodes[:-1], nodes[1:], width[:-1], width[1:], strict=True):
            along = b - a
            t = (self.x - a[0]) * along[0] + (self.y - a[1]) * along[1] + (self.z - a[2]) * along[2]
            t = np.clip(t / float(along @ along), 0, 1)
            squared = sum((w - a[i] - t * along[i]) ** 2 for i, w in enumerate((self.x, self.y, self.z)))
            np.minimum(best, np.sqrt(squared) - (ra + t * (rb - ra)), out=best)
        return best


def phantom(
    seed: int,
    *,
    spacing: tuple[float, float, float] = (3.90625, 3.90625, 2.5),
    z_range: tuple[float, float] = (-150.0, 170.0),
    noise: float = 12.0,
) -> Phantom:
    """Draws one person.

    Args:
        seed: Decides the person's proportions and the noise.
        spacing: Voxel size in mm along R, A, S.
        z_range: Lower and upper end of the scan in mm; 0 is at the chin, −420 in the pelvis.
        noise: Standard deviation of the noise in HU.

    Returns:
        The CT, and the masks of all structures that have voxels in it.
    """
    rng = np.random.default_rng(seed)
    size = rng.uniform(0.92, 1.08)

    def vary(value: float, spread: float = 0.08) -> float:
        return float(value * rng.uniform(1 - spread, 1 + spread))

    half_x, y_low, y_high = 235.0, -150.0, 125.0
    shape = [
        int(2 * half_x / spacing[0]),
        int((y_high - y_low) / spacing[1]),
        int((z_range[1] - z_range[0]) / spacing[2]),
    ]
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = (
        -half_x + rng.uniform(-8, 8),
        y_low + rng.uniform(-8, 8),
        z_range[0] + rng.uniform(-4, 4),
    )
    canvas = _Canvas(shape, affine / np.array([[size], [size], [size], [1.0]]))
    _body(canvas, vary)
    _torso(canvas, vary)
    _spine(canvas, vary)
    _neck_and_head(canvas, vary, rng)
    grain: np.ndarray = rng.standard_normal(canvas.hu.shape, dtype=np.float32)
    for axis in range(3):
        grain = (grain + 0.5 * np.roll(grain, 1, axis)) / np.float32(1.25**0.5)
    masks = {name: mask for name, mask in canvas.masks.items() if mask.any()}
    return Phantom(canvas.hu + np.float32(noise) * grain, affine, masks)


def _body(c: _Canvas, vary: Vary) -> None:
    """Skin, fat and muscle of trunk, shoulders, neck and head."""
    fat, muscle = vary(-100), vary(50)
    trunk = c.ellipsoid((0, -20, -270), (vary(175), vary(112), vary(250, 0.03)))
    shoulders = c.ellipsoid((0, -25, -125), (vary(205, 0.05), vary(85), 68))
    neck = c.tube([(0, -18, -110), (0, 0, 20)], [vary(72), vary(56)])
    skull = c.ellipsoid((0, 12, 95), (vary(76, 0.04), vary(96, 0.04), vary(92, 0.04)))
    jaw = c.ellipsoid((0, 45, 30), (vary(60), vary(58), 52))
    skin = np.minimum.reduce([trunk, shoulders, neck, skull, jaw])
    c.paint(skin, fat)
    c.paint(np.minimum.reduce([trunk + 16, shoulders + 12, neck + 6, skull + 5, jaw + 6]), muscle)


def _torso(c: _Canvas, vary: Vary) -> None:
    """Organs and bones of chest and abdomen."""
    for side, sign in (("left", -1), ("right", 1)):
        lung = c.ellipsoid((sign * 72, -25, -235), (vary(56), vary(76), vary(112)))
        c.paint(lung, vary(-820, 0.04), f"lung_{side}")
        c.paint(
            c.tube([(sign * 170, -30, -112), (sign * 85, 15, -100), (sign * 18, 35, -118)], 7),
            420,
            f"clavicula_{side}",
        )
        c.paint(c.ellipsoid((sign * 172, -25, -135), (26, 26, 32)), 330, f"humerus_{side}")
        c.paint(c.ellipsoid((sign * 58, -65, -385), (27, 27, vary(52))), vary(150), f"kidney_{side}")
    c.paint(c.ellipsoid((-18, 8, -270), (vary(52), vary(44), vary(52))), vary(130), "heart")
    c.paint(c.ellipsoid((58, 5, -345), (vary(82), vary(72), vary(58))), vary(105), "liver")
    c.paint(c.ellipsoid((-100, -45, -345), (vary(28), vary(40), vary(44))), vary(120), "spleen")
    c.paint(c.ellipsoid((-55, 30, -345), (vary(38), vary(34), vary(42))), vary(35), "stomach")
    c.paint(
        c.tube([(18, -35, -420), (14, -38, -250), (8, -20, -190), (-10, 12, -168), (4, 2, -150)], vary(11)),
        vary(170),
        "aorta",
    )
    c.paint(c.ellipsoid((0, 62, -215), (14, 7, 62)), 260, "sternum")


def _spine(c: _Canvas, vary: Vary) -> None:
    """Vertebrae, discs, the spinal canal and the cord in it."""
    curve = [
        (0, -62, -420),
        (0, -72, -300),
        (0, -70, -180),
        (0, -48, -90),
        (0, -28, -20),
        (0, -18, 40),
        (0, -8, 72),
    ]
    bodies = [(x, y + 22, z) for x, y, z in curve]
    bone, disc = vary(290), 90.0
    vertebrae = c.tube(bodies, [20, 19, 17, 13, 11, 11, 11])
    level = np.cos(2 * np.pi * (c.z + 420) / np.where(c.z < -100, 28.0, 18.0))
    c.paint(vertebrae, bone)
    c.paint(np.maximum(vertebrae, (level + 0.75) * 12), disc)
    arch = [(x, y - 12, z) for x, y, z in curve]
    c.paint(np.maximum(c.tube(arch, [14, 13, 12, 10, 9, 9, 9]), -8 - level * 14), bone)
    c.paint(c.tube(curve, [10, 10, 9.5, 9, 9, 9, 9.5]), -5)  # the canal: fat and fluid
    c.paint(c.tube(curve, vary(6.3)), vary(38, 0.3), "spinal_cord")


def _neck_and_head(c: _Canvas, vary: Vary, rng: np.random.Generator) -> None:
    """Skull, brain and brainstem; jaws, tongue and parotid glands; airway, larynx and oesophagus."""
    head = c.ellipsoid((0, 12, 100), (vary(69, 0.03), vary(88, 0.03), vary(80, 0.03)))
    c.paint(np.maximum(head, -(c.z - 62) * 0.9), vary(850, 0.15), "skull")
    c.paint(np.maximum(head + 7, -(c.z - 69) * 0.9), vary(33), "brain")
    c.paint(c.ellipsoid((0, 48, 66), (30, 28, 12)), -600)  # nasal cavity and sinuses
    c.paint(
        c.tube([(0, -6, 66), (0, 2, 84), (0, 10, 106)], [vary(9.5), vary(13), vary(13.5)]),
        vary(25, 0.4),
        "brainstem",
    )
    # the maxilla, the mandible with its rami and teeth, the tongue
    c.paint(c.ellipsoid((0, 62, 48), (24, 20, 9)), 400)
    reach, front, low = vary(49, 0.06), vary(92, 0.05), vary(10, 0.3)
    arch = [
        (-reach, 22, 70),
        (-reach - 3, 26, 40),
        (-reach + 4, 36, 20),
        (-33, 66, low),
        (-14, front - 4, low),
        (0, front, low),
    ]
    mirrored = [(-x, y, z) for x, y, z in reversed(arch[:-1])]
    c.paint(c.tube(arch + mirrored, 7.0), vary(760, 0.15), "mandible")
    teeth = [(-24, 74, 30), (-12, 86, 31), (0, 89, 31), (12, 86, 31), (24, 74, 30)]
    c.paint(c.tube(teeth, 4.5), vary(1700, 0.25))
    c.paint(c.ellipsoid((0, 52, 24), (24, 26, 18)), vary(55))
    for side, sign in (("left", -1), ("right", 1)):
        gland = c.ellipsoid((sign * vary(58, 0.04), vary(8, 0.4), vary(46, 0.1)), (vary(11), vary(16), vary(24)))
        c.paint(gland, vary(-10, 1.5), f"parotid_gland_{side}")
        c.paint(c.tube([(sign * 28, -5, -105), (sign * 34, 5, -20), (sign * 30, 8, 50)], 4), vary(120, 0.4))
        c.paint(c.ellipsoid((sign * 20, 18, -62), (9, 9, 18)), vary(110))  # thyroid lobe
    # the airway, the larynx, the oesophagus
    top = vary(-4, 1.0)
    c.paint(c.ellipsoid((0, 24, top - 18), (vary(17), vary(18), vary(20))), vary(60, 0.3), "larynx")
    shaft = [(0, 10, -145), (0, 18, -70), (0, 22, top - 30)]
    c.paint(c.tube(shaft, vary(9)), -950, "trachea")
    lumen = c.tube([(0, 22, top - 34), (0, 24, top + 4), (0, 14, 30), (0, 18, 62)], [7, 5, 8, 8])
    larynx = c.masks["larynx"].copy() if "larynx" in c.masks else None
    c.paint(lumen, -900)
    if larynx is not None:  # manual contours of the larynx include the air in it
        c.masks["larynx"] |= larynx & ~c.masks.get("trachea", np.zeros_like(larynx))
    gullet = [(-4, -18, -150), (-7, -4, -90), (-3, 0, -45)]
    c.paint(c.tube(gullet, vary(7.5)), vary(40, 0.3), "esophagus")
    if rng.random() < 0.4:
        c.paint(c.tube(gullet, 2.2), -500, "esophagus")  # air in the oesophagus
