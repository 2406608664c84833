"""`benchmarks/zoo_runs.py`: its arms are built from their strings, and no patient is both trained on and scored."""

from __future__ import annotations

import argparse
import importlib
import json
from pathlib import Path

import pytest
import torch

from mome.training.setup import build_model

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def arms(monkeypatch):
    """The module `zoo_arms`."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("zoo_arms")


def test_every_arm_is_a_model(arms, tmp_path):
    settings = argparse.Namespace(out=tmp_path, steps=1, patch=32, precision="no", threads=0)
    assert len(arms.ARMS) >= 14
    kinds = []
    for arm, parts in arms.ARMS.items():
        run = arms.recipe(arm, settings)
        with torch.device("meta"):
            model, _ = build_model(run)
        assert {key: getattr(model.config, key)["name"] for key in parts} == {
            key: value.partition("(")[0] for key, value in parts.items()
        }
        kinds.append(tuple(str(getattr(model.config, key)) for key in ("experts", "router", "fusion", "head")))
    assert len(set(kinds)) == len(kinds), "two arms are the same model"


def test_patients_that_are_scored_are_not_trained_on(arms, tmp_path):
    source = tmp_path / "data" / "openkbp" / "train"
    source.mkdir(parents=True)
    complete = ["spinal_cord", "mandible"]
    cases = {f"case_{i:02d}": {"annotated": complete if i % 3 == 0 else complete[:1]} for i in range(60)}
    (source / "cases.json").write_text(json.dumps(cases))
    arms.split(tmp_path / "data", tmp_path)
    trained, held_out = (json.loads((tmp_path / kind / "cases.json").read_text()) for kind in ("trained", "held_out"))
    assert len(trained) == arms.TRAINED and len(held_out) == arms.HELD_OUT
    assert not set(trained) & set(held_out)
    assert all(case["annotated"] == complete for case in held_out.values())
    links = sorted(path.name for path in (tmp_path / "held_out" / "images").iterdir())
    assert links == [f"{name}.nii.gz" for name in held_out]
