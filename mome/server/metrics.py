"""Numbers about the server in Prometheus' text format (version 0.0.4). No label holds what a client sent."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Metrics:
    """Counters since the server started.

    Attributes:
        accepted: Jobs that were accepted.
        refused: Uploads that were refused because the queue was full.
        unauthorized: Requests with a wrong token or none.
        upload_bytes: Bytes of accepted scans.
        worker_restarts: How often the worker was started again.
        job_seconds: Seconds of all jobs that are done.
        ended: State → jobs that ended in it.
    """

    accepted: int = 0
    refused: int = 0
    unauthorized: int = 0
    upload_bytes: int = 0
    worker_restarts: int = 0
    job_seconds: float = 0.0
    ended: dict[str, int] = field(default_factory=lambda: {"done": 0, "failed": 0, "cancelled": 0})

    def text(self, jobs: dict[str, int], uploading: int, *, is_ready: bool) -> str:
        """Returns all metrics.

        Args:
            jobs: State → jobs that are stored now.
            uploading: Uploads that are being received.
            is_ready: Whether the worker has loaded its model.
        """
        lines: list[str] = []

        def add(name: str, kind: str, help_text: str, values: dict[str, float]) -> None:
            lines.extend([f"# HELP mome_{name} {help_text}", f"# TYPE mome_{name} {kind}"])
            lines.extend(f"mome_{name}{labels} {value:.10g}" for labels, value in values.items())

        add("jobs", "gauge", "Jobs that are stored.", {f'{{state="{s}"}}': n for s, n in jobs.items()})
        add("uploads_in_progress", "gauge", "Uploads that are being received.", {"": uploading})
        add("jobs_accepted_total", "counter", "Jobs that were accepted.", {"": self.accepted})
        add("jobs_ended_total", "counter", "Jobs that ended.", {f'{{state="{s}"}}': n for s, n in self.ended.items()})
        add("job_seconds_total", "counter", "Seconds of the jobs that are done.", {"": self.job_seconds})
        add("uploads_refused_total", "counter", "Uploads refused because the queue was full.", {"": self.refused})
        add("upload_bytes_total", "counter", "Bytes of accepted scans.", {"": self.upload_bytes})
        add("unauthorized_total", "counter", "Requests with a wrong token or none.", {"": self.unauthorized})
        add("worker_restarts_total", "counter", "Restarts of the worker.", {"": self.worker_restarts})
        add("worker_ready", "gauge", "1 if the worker has loaded its model.", {"": float(is_ready)})
        memory, descriptors = process_use()
        if memory is not None:
            add("process_resident_bytes", "gauge", "Memory of the server's process.", {"": memory})
        if descriptors is not None:
            add("process_open_descriptors", "gauge", "Open descriptors of the server's process.", {"": descriptors})
        return "\n".join(lines) + "\n"


def process_use() -> tuple[int | None, int | None]:
    """Returns the resident bytes and the open descriptors of this process; None where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir("/proc/self/fd"))
    except (OSError, ValueError):
        return None, None
