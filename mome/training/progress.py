"""What a run reports of its steps: a line in `log.jsonl`, a progress bar, printed losses and a tracker."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from accelerate import Accelerator
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mome.atomic import atomic_write, output_errors
from mome.training.router_statistics import flat
from mome.training.trackers import tracker_errors


class StepLog:
    """`log.jsonl`: one JSON line per optimiser step. A resumed run keeps the lines up to its checkpoint.

    Args:
        path: The file.
        resume_step: The step of the checkpoint that the run continues from; 0 starts an empty log.
    """

    def __init__(self, path: Path, resume_step: int) -> None:
        self.path = path
        with atomic_write(path, "the log") as part, part.open("w") as file:
            if path.is_file() and resume_step:  # line by line: a long run has a long log
                with path.open(encoding="utf-8", errors="replace") as lines:
                    file.writelines(line.rstrip("\n") + "\n" for line in lines if 0 < _step_of(line) <= resume_step)

    def write(self, **values: Any) -> None:
        """Appends one line and flushes it.

        Raises:
            OutputError: The disk is full, or the like.
        """
        with output_errors(self.path, "the log"), self.path.open("a") as file:
            file.write(json.dumps(values) + "\n")


def _step_of(line: str) -> int:
    """Returns the step of a line of the log; 0 for a line that a killed run did not finish."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return 0
    step = entry.get("step") if isinstance(entry, dict) else None
    return step if type(step) is int else 0


class StepReporter:
    """Reports every optimiser step; a context manager, because the progress bar runs until the block ends.

    Only the main process writes the log and shows the bar.

    Args:
        accelerator: Prints, and knows the trackers.
        out: Folder of the run.
        start: Steps done so far.
        steps: Steps of the whole run.
        every: Steps between printed and tracked losses and between statistics; 0 prints and tracks none.
    """

    def __init__(self, accelerator: Accelerator, out: Path, start: int, steps: int, every: int) -> None:
        self.accelerator, self.out, self.steps, self.every = accelerator, out, steps, every
        self.log = StepLog(out / "log.jsonl", start) if accelerator.is_main_process else None
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self.bar = Progress(*columns, disable=not accelerator.is_main_process)
        self.task = self.bar.add_task("training", total=steps, completed=start)
        self.began = time.perf_counter()

    def __enter__(self) -> StepReporter:
        self.bar.start()
        self.began = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()

    def is_logged(self, done: int) -> bool:
        """Says whether the step that ends with `done` steps done is printed and tracked, with statistics."""
        return bool(self.every) and done % self.every == 0

    def step(self, done: int, losses: dict[str, float], rate: float, statistics: dict[str, Any] | None = None) -> None:
        """Reports one step.

        Args:
            done: Steps done, this one included.
            losses: `loss` and others by name.
            rate: The learning rate of this step.
            statistics: Of the routers and the fusion (`RouterStatistics.read`), in steps that are tracked.
        """
        statistics = statistics or {}
        if self.log is not None:
            seconds = round(time.perf_counter() - self.began, 3)
            self.log.write(step=done, **losses, lr=rate, seconds=seconds, **statistics)
        self.bar.update(self.task, completed=done, description=f"training  loss {losses['loss']:.4f}")
        if self.is_logged(done):
            if not self.bar.console.is_terminal:
                self.accelerator.print(f"step {done}/{self.steps}: loss {losses['loss']:.4f}", flush=True)
            with tracker_errors(self.out):
                self.accelerator.log({**losses, "learning_rate": rate, **flat(statistics)}, step=done)

    def validation(self, done: int, scores: dict[str, float]) -> None:
        """Reports the scores of a validation after `done` steps."""
        with tracker_errors(self.out):
            self.accelerator.log(scores, step=done)
        if self.accelerator.is_main_process:
            self.bar.console.print(
                f"step {done}: " + "  ".join(f"{name} {score:.3f}" for name, score in scores.items()),
                soft_wrap=not self.bar.console.is_terminal,  # a file or a pipe has no width
            )
