"""One whole CT on one device: `Segmenter` beside MONAI's sliding window over the same network and grid."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from gpu_training import begin_peak, peak_mib, wait
from inference_peers import OVERLAP, monai_masks, tile_logits

from mome.inference import Segmenter
from mome.volumes import Volume

MODEL, PROMPTS = "mome-ct-torso-tiny", 32
# Settings of `Segmenter`; of a side of MONAI, windows at once are beside them.
OURS: dict[str, dict[str, Any]] = {
    "exact": {"precision": "fp32", "exact": True},
    "default": {"precision": "fp32"},
    "default_bf16": {"precision": "bf16"},
}
MONAI: dict[str, tuple[int, dict[str, Any]]] = {
    "monai": (1, OURS["exact"]),
    "monai_bf16": (1, {"precision": "bf16", "exact": True}),
    "monai_bf16_8_windows": (8, {"precision": "bf16", "exact": True}),
}
SIDES = (*OURS, *MONAI)


def synthetic_ct(shape: tuple[int, int, int], spacing: tuple[float, float, float], seed: int = 0) -> Volume:
    """A body of ellipsoids with noise, in air; no patient's data. Only its sizes are those of a CT.

    Args:
        shape: Voxels (i, j, k), along R, A and S.
        spacing: Voxel size in mm.
        seed: Decides the noise.
    """
    rng = np.random.default_rng(seed)
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, side, dtype=np.float32) for side in shape), indexing="ij", sparse=True)

    def ellipsoid(centre: tuple[float, float, float], radii: tuple[float, float, float]) -> np.ndarray:
        parts = [((at - c) / r) ** 2 for at, c, r in zip((x, y, z), centre, radii, strict=True)]
        return (parts[0] + parts[1]) + parts[2] <= 1

    tube = 1e6  # a radius that makes a cylinder
    hu = np.full(shape, -1000, dtype=np.float32)
    hu[ellipsoid((0, 0, 0), (0.8, 0.6, tube))] = -90  # fat
    hu[ellipsoid((0, 0, 0), (0.72, 0.52, tube))] = 40
    for side in (-1, 1):
        hu[ellipsoid((0.36 * side, 0, 0.55), (0.26, 0.4, 0.45))] = -830  # lungs
        hu[ellipsoid((0.3 * side, -0.28, -0.3), (0.1, 0.09, 0.18))] = 150  # kidneys
        hu[ellipsoid((0.4 * side, -0.1, -0.95), (0.14, 0.2, 0.2))] = 400  # hips
    hu[ellipsoid((0.3, 0.1, 0), (0.35, 0.36, 0.22))] = 105  # liver
    hu[ellipsoid((-0.5, -0.15, 0.02), (0.14, 0.2, 0.14))] = 120  # spleen
    hu[ellipsoid((0, -0.4, 0), (0.09, 0.1, tube))] = 350  # spine
    hu[ellipsoid((-0.04, -0.24, 0), (0.035, 0.04, tube))] = 160  # aorta
    hu += 18 * rng.standard_normal(shape, dtype=np.float32)
    return Volume(np.maximum(hu, -1024), np.diag([*spacing, 1.0]))


class Scan:
    """A scan that the sides segment one after the other; the masks of each are kept for their Dice.

    Args:
        volume: The CT.
        device: `cuda` or `cpu`.
    """

    def __init__(self, volume: Volume, device: str) -> None:
        self.volume, self.device = volume, torch.device(device)
        self._masks: dict[str, dict[str, torch.Tensor]] = {}

    def run(self, side: str) -> dict[str, Any]:
        """Segments the scan and returns seconds, peak memory and the Dice with sides that ran before."""
        windows, settings = MONAI[side] if side in MONAI else (1, OURS[side])
        segmenter = Segmenter(MODEL, overlap=OVERLAP, device=str(self.device), **settings)
        prepared = segmenter.prepare(list(segmenter.model.config.labels[:PROMPTS]))
        if side in MONAI:
            import monai.inferers  # noqa: F401  # loading it is no part of the run
        with torch.inference_mode():
            patch = segmenter.predictor.patch_size
            logits = tile_logits(segmenter, prepared.text_PT.to(self.device))
            logits(torch.zeros(windows, 1, *patch, device=self.device))
            begin_peak(self.device)
            base = torch.cuda.memory_allocated() if self.device.type == "cuda" else 0
            began = time.perf_counter()
            if side in MONAI:
                masks, more = monai_masks(segmenter, prepared, self.volume, windows), {}
            else:
                result = segmenter.segment(self.volume, prepared)
                masks, more = result.masks, {"phases": result.seconds, "tiles": result.tiles}
            wait(self.device)
            seconds = time.perf_counter() - began
        peak = peak_mib(self.device)
        more |= {"precision": segmenter.precision, "tf32_convolutions": torch.backends.cudnn.allow_tf32}
        self._masks[side] = {name: torch.as_tensor(masks[name]).bool() for name in prepared.names}
        return {
            "seconds": seconds,
            "peak_mib": peak,
            "model_mib": base / 2**20,
            **more,
            "dice_with": {
                other: self._agreement(side, other)
                for other in ("exact", "monai")
                if other in self._masks and other != side
            },
        }

    def _agreement(self, side: str, other: str) -> dict[str, Any]:
        """The lowest and the mean Dice over the prompts of which one of both masks is not empty."""
        scores = {}
        for name in self._masks[side]:
            mask, reference = (self._masks[one][name].to(self.device) for one in (side, other))
            total = int(mask.sum()) + int(reference.sum())
            if total:
                scores[name] = 2 * int((mask & reference).sum()) / total
        if not scores:
            return {"not_empty": 0}
        worst = min(scores, key=scores.__getitem__)
        mean = sum(scores.values()) / len(scores)
        return {"lowest": scores[worst], "lowest_of": worst, "mean": mean, "not_empty": len(scores)}
