"""References of OpenKBP that cannot be right: what is measured of them, and what the report holds."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def test_references_that_cannot_be_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    references = importlib.import_module("openkbp_references")
    found = {
        "a": {"cord_ml": 30.0, "in_air": 0.0},
        "b": {"cord_ml": 500.0, "in_air": 0.01},
        "c": {"cord_ml": 20.0, "in_air": 0.3},
    }
    annotated = {name: ["spinal_cord", "brainstem"] for name in found}
    wrong = references.doubtful(found, annotated)
    assert wrong == {("b", "spinal_cord"), ("c", "spinal_cord"), ("c", "brainstem")}
    assert references.means({("a", "x"): 0.5, ("b", "x"): 0.7, ("a", "y"): 0.2}) == {"x": 0.6, "y": 0.2, "mean": 0.4}


def test_the_report_keeps_the_published_mean() -> None:
    report = json.loads((BENCHMARKS / "results" / "openkbp_references.json").read_text())
    published = json.loads((BENCHMARKS / "results" / "openkbp_val_mome_ct_tiny.json").read_text())["structures"]
    assert report["dice"]["all"] == {row["structure"]: round(row["dice"]["mean"], 3) for row in published}
    assert {entry["case"] for entry in report["doubtful"]} == {"openkbp_215", "openkbp_216", "openkbp_221"}
