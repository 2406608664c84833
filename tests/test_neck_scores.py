"""The comparison of the neck study's arms: the code gives the pairs that the results show."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


def test_the_pairs_of_the_results_are_those_that_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    scores = importlib.import_module("study_scores")
    assert len(set(scores.PAIRS)) == len(scores.PAIRS)
    names = importlib.import_module("neck_names")
    assert {arm for pair in scores.PAIRS for arm in pair} == {*names.ARMS, *names.CANDIDATES}
    results = [json.loads((BENCHMARKS / "results" / f"{name}.json").read_text()) for name in scores.STUDIES]
    expected = (("swiglu", "plain"), ("swiglu_random", "universal"), ("swiglu", "universal"))
    for result, pair in zip(results, expected, strict=True):
        seeds = {arm: set(entry["seeds"]) for arm, entry in result["arms"].items()}
        shown = [(entry["one"], entry["other"]) for entry in result["differences"]]
        assert scores.compared(seeds) == shown and pair in shown
    assert scores.compared({"swiglu": {"0"}, "universal": {"1"}}) == []
    assert scores.page(*results) == (BENCHMARKS / "results" / "neck_study.md").read_text()
