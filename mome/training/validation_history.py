"""The scores of a run's validations, and what follows from them: the best step, and an early end."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from mome.text_file import read_json, read_text
from mome.training.progress import StepLog
from mome.training.weight_average import RECORD


class ValidationHistory:
    """`validation.jsonl`: a JSON line per validation, with its step and scores; a score that is NaN is null there.

    All processes hold the same history. The score that counts is `dice/mean`. Scores of other validation cases are not
    compared with those of this run: a resumed run may have other cases.

    Args:
        accelerator: Its main process writes the file.
        out: Folder of the run; `best` in it is the best model so far, with a record of its validation.
        start: Steps of the checkpoint that the run continues from; later lines are removed.
        cases: A checksum of the validation cases; empty where the run does not validate, and then all lines count.

    Attributes:
        best: Step and score of the best validation; the earliest where scores are equal. None before the first.
        without_improvement: Validations since the best one.
    """

    def __init__(self, accelerator: Accelerator, out: Path, start: int, cases: str = "") -> None:
        self.cases = cases[:12]
        self.log = StepLog(out / "validation.jsonl", start) if accelerator.is_main_process else None
        found: list[Any] = [_read(self.log.path), _read_record(out / "best" / RECORD)] if self.log else [[], None]
        broadcast_object_list(found)
        lines, record = found
        self.best: tuple[int, float] | None = None
        self.without_improvement = 0
        for step, score, of in lines:
            if self._counts(of):
                self._count(step, score)
        # The model in `best` may be of a step after the checkpoint. It stays the best until a better one replaces it.
        if start and record is not None and self._counts(record[2]) and (self.best is None or record[1] > self.best[1]):
            self.best, self.without_improvement = (record[0], record[1]), 0

    def add(self, step: int, scores: dict[str, float]) -> None:
        """Adds a validation.

        Raises:
            OutputError: The line cannot be written.
        """
        self._count(step, scores.get("dice/mean", math.nan))
        if self.log is not None:
            finite = {name: score if math.isfinite(score) else None for name, score in scores.items()}
            self.log.write(step=step, cases=self.cases, **finite)

    def record(self, step: int, scores: dict[str, float]) -> dict[str, Any]:
        """Returns what is written beside a model that is the best so far."""
        return {"step": step, "dice/mean": scores["dice/mean"], "cases": self.cases}

    def is_improvement(self, scores: dict[str, float]) -> bool:
        """Says whether a validation that was not added yet is better than all before it."""
        score = scores.get("dice/mean", math.nan)
        return math.isfinite(score) and (self.best is None or score > self.best[1])

    def _counts(self, cases: str | None) -> bool:
        """Says whether a score is of this run's cases; earlier releases did not write of which cases it is."""
        return not self.cases or cases in (None, self.cases)

    def _count(self, step: int, score: float) -> None:
        if self.is_improvement({"dice/mean": score}):
            self.best, self.without_improvement = (step, score), 0
        elif self.best is None or step > self.best[0]:  # those before the best are repeated, after a resume
            self.without_improvement += 1


def _read(path: Path) -> list[tuple[int, float, str | None]]:
    """Returns step, mean Dice and cases of every line of the file; NaN where there is no Dice."""
    entries = [json.loads(line) for line in read_text(path, "the validations").splitlines()]
    return [(entry["step"], _score(entry), entry.get("cases")) for entry in entries]


def _read_record(path: Path) -> tuple[int, float, str | None] | None:
    """Returns step, mean Dice and cases of the record beside the best model; None where there is none."""
    if not path.is_file():
        return None
    entry = read_json(path, "the record of the best model", hint="remove it; then the next validation decides")
    step, score = entry.get("step"), _score(entry)
    return (step, score, entry.get("cases")) if isinstance(step, int) and math.isfinite(score) else None


def _score(entry: dict[str, Any]) -> float:
    score = entry.get("dice/mean")
    return float(score) if isinstance(score, int | float) else math.nan
