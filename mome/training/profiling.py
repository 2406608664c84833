"""Profiles some steps of a run with torch's profiler: a trace for viewers, and a short table."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from mome.atomic import atomic_write

_WAIT, _WARMUP = 1, 1  # steps before those that are recorded: the first steps allocate and choose algorithms
_ROWS = 12


class StepProfiler:
    """Records `steps` steps of a training, from the third on; a context manager. Losses stay as they are.

    `trace.json` opens in chrome://tracing or https://ui.perfetto.dev. `table.txt` lists the operations that took most
    time of their own, without that of the operations that they call.

    Args:
        folder: Where the trace and the table are written.
        steps: Steps to record; 0 records none.
        device: Where the steps run. On a GPU, the table has the time of the GPU, else that of the CPU.

    Attributes:
        table: The table; empty until the steps are recorded.

    Raises:
        OutputError: The trace cannot be written.
    """

    def __init__(self, folder: Path, steps: int, device: torch.device) -> None:
        self.folder, self.steps, self.table = folder, steps, ""
        self._on_gpu = device.type == "cuda"  # a machine with a GPU may train on its CPU
        self.profiler: profile | None = None

    def __enter__(self) -> StepProfiler:
        if self.steps:
            activities = [ProfilerActivity.CPU]
            activities += [ProfilerActivity.CUDA] if self._on_gpu else []
            self.profiler = profile(
                activities=activities,
                schedule=schedule(wait=_WAIT, warmup=_WARMUP, active=self.steps, repeat=1),
                on_trace_ready=self._write,
                acc_events=True,
            )
            self.profiler.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.profiler is not None:
            self.profiler.__exit__(kind, error, trace)
            self.profiler = None

    def step(self) -> None:
        """Says that a step has ended."""
        if self.profiler is not None:
            self.profiler.step()

    def _write(self, recorded: profile) -> None:
        """Writes the trace and the table of the recorded steps."""
        with atomic_write(self.folder / "trace.json", "the trace") as part:
            recorded.export_chrome_trace(str(part))
        self.table = _table(recorded, self.steps, self._on_gpu)
        with atomic_write(self.folder / "table.txt", "the table of the profile") as part:
            part.write_text(self.table)


def _table(recorded: profile, steps: int, on_gpu: bool) -> str:
    """Returns the operations with most time of their own, per step."""
    events = recorded.key_averages()

    def own(event: object) -> float:
        return float(getattr(event, "self_device_time_total" if on_gpu else "self_cpu_time_total"))

    total = sum(map(own, events)) or 1.0
    largest = sorted(events, key=own, reverse=True)[:_ROWS]
    place = "GPU" if on_gpu else "CPU"
    lines = [f"{'operation':<44}{f'ms of {place} a step':>18}{'share':>8}{'calls a step':>14}"]
    lines += [
        f"{event.key[:42]:<44}{own(event) / 1000 / steps:>18.1f}{own(event) / total:>8.1%}{event.count / steps:>14.1f}"
        for event in largest
    ]
    lines.append(f"{'all operations':<44}{total / 1000 / steps:>18.1f}")
    return "\n".join(lines) + "\n"
