"""A small synthetic data set, a recipe for it, and the command that trains it: shared by the tests of training."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import nibabel as nib
import numpy as np

REPOSITORY = Path(__file__).resolve().parent.parent
NAMES = ["parotid_gland_left", "parotid_gland_right", "mandible"]

RECIPE = """
preset: universal_ct_tiny
labels: [parotid_gland_left, parotid_gland_right, mandible]
cache: {root}/cache
model:
  encoder: unet(channels=[4, 8])
  text_encoder: learned
  head: dynamic(hidden=8)
  experts: swiglu(n=2, hidden=8)
  router: switch
  fusion: text_guided
  dim: 8
  patch_size: [16, 16, 16]
sources: [{{kind: cases, folder: "{root}/data", dataset: openkbp}}]
validation: [{{kind: cases, folder: "{root}/data", dataset: openkbp}}]
train:
  {{steps: 12, validate_every: 6, batch_size: 2, gradient_accumulation: 2, checkpoint_every: 3, threads: 1,
    ema: 0.9, tracker: none}}
"""


def write_cases(folder: Path, count: int = 3) -> Path:
    """A small synthetic data set with OpenKBP's numbers, its left-right axis running to the left."""
    rng = np.random.default_rng(0)
    affine = np.diag([-4.0, 4.0, 3.0, 1.0])
    cases = {}
    for kind in ("images", "labels"):
        (folder / kind).mkdir(parents=True)
    for i in range(count):
        hu = rng.normal(-20, 30, (24, 22, 20)).astype(np.int16)
        labels = np.zeros(hu.shape, np.uint8)
        labels[16:20, 8:12, 6:12] = 4  # left: the axis runs to the left
        labels[4:8, 8:12, 6:12] = 5
        labels[8:14, 14:18, 4:8] = 6
        hu[labels == 6] += 600
        hu[labels == 4] += 150
        nib.save(nib.Nifti1Image(hu, affine), folder / "images" / f"c{i}.nii.gz")
        nib.save(nib.Nifti1Image(labels, affine), folder / "labels" / f"c{i}.nii.gz")
        cases[f"c{i}"] = {"annotated": NAMES if i else NAMES[:2]}
    (folder / "cases.json").write_text(json.dumps(cases))
    return folder


def write_recipe(folder: Path) -> Path:
    """Writes the data set and its recipe into a folder; returns the recipe."""
    write_cases(folder / "data")
    recipe = folder / "run.yaml"
    recipe.write_text(RECIPE.format(root=folder))
    return recipe


def command(recipe: Path, *overrides: str) -> list[str]:
    return [sys.executable, str(REPOSITORY / "examples/train.py"), "--config", str(recipe), *overrides]


def losses(run: Path) -> dict[int, float]:
    lines = (run / "log.jsonl").read_text().splitlines()
    return {entry["step"]: entry["loss"] for entry in map(json.loads, lines)}
