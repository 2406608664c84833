"""The scores of a run's validations, and what follows from them: the best step, and an early end."""

from __future__ import annotations

import json
import math
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from mome.text_file import read_text
from mome.training.progress import StepLog


class ValidationHistory:
    """`validation.jsonl`: a JSON line per validation, with its step and scores; a score that is NaN is null there.

    All processes hold the same history. The score that counts is `dice/mean`.

    Args:
        accelerator: Its main process writes the file.
        out: Folder of the run.
        start: Steps of the checkpoint that the run continues from; later lines are removed.

    Attributes:
        best: Step and score of the best validation; the earliest where scores are equal. None before the first.
        without_improvement: Validations since the best one.
    """

    def __init__(self, accelerator: Accelerator, out: Path, start: int) -> None:
        self.log = StepLog(out / "validation.jsonl", start) if accelerator.is_main_process else None
        kept = [_read(self.log.path) if self.log is not None else []]
        broadcast_object_list(kept)
        self.best: tuple[int, float] | None = None
        self.without_improvement = 0
        for step, score in kept[0]:
            self._count(step, score)

    def add(self, step: int, scores: dict[str, float]) -> None:
        """Adds a validation.

        Raises:
            OutputError: The line cannot be written.
        """
        self._count(step, scores.get("dice/mean", math.nan))
        if self.log is not None:
            finite = {name: score if math.isfinite(score) else None for name, score in scores.items()}
            self.log.write(step=step, **finite)

    def is_improvement(self, scores: dict[str, float]) -> bool:
        """Says whether a validation that was not added yet is better than all before it."""
        score = scores.get("dice/mean", math.nan)
        return math.isfinite(score) and (self.best is None or score > self.best[1])

    def _count(self, step: int, score: float) -> None:
        if self.is_improvement({"dice/mean": score}):
            self.best, self.without_improvement = (step, score), 0
        else:
            self.without_improvement += 1


def _read(path: Path) -> list[tuple[int, float]]:
    """Returns step and mean Dice of every line of the file; NaN where there is none."""
    entries = [json.loads(line) for line in read_text(path, "the validations").splitlines()]
    scores = [(entry["step"], entry.get("dice/mean")) for entry in entries]
    return [(step, float(score) if isinstance(score, int | float) else math.nan) for step, score in scores]
