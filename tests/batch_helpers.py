"""What the tests of batches and of cohorts share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from small_scans import save_patient
from stand_in_models import Contrast

from mome.inference import Segmenter
from mome.processing import MoMEProcessor


def segmenter(**options: Any) -> Segmenter:
    """Masks of the bone: liver above 300 HU, spleen above 400 HU."""
    processor = MoMEProcessor(spacing=[8, 9, 10], hu_window=[-200, 800])
    return Segmenter(Contrast(thresholds=(0.5, 0.6)), processor, **options)


def scans(folder: Path, names: str = "abc") -> list[Path]:
    return [save_patient(folder / f"{name}.nii.gz") for name in names]


def report(out: Path) -> dict[str, dict[str, Any]]:
    return {entry["name"]: entry for entry in json.loads((out / "report.json").read_text())["studies"]}
