"""Runs probes in fresh processes, in alternating order, and summarises their numbers.

A probe is a script that prints one JSON object as its last line. Each probe has a process of its own, so that the
memory and the heap of one side change nothing for the other.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

# A bench that writes its results does not change what it measures.
_NO_RESULTS = ":(exclude,top)benchmarks/results"


def run_python(
    python: str, arguments: Sequence[str], *, packages: Sequence[str | Path], threads: int, folder: str | Path
) -> str:
    """Runs a Python interpreter in a folder and returns what it printed.

    Args:
        python: The interpreter.
        arguments: Its arguments.
        packages: Folders of packages, the content of PYTHONPATH.
        threads: CPU threads of its parallel loops; 0 for the libraries' choice.
        folder: Where it runs; an empty folder keeps it from importing what lies beside.

    Raises:
        SystemExit: The process failed; its last error lines are printed.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, packages)), "HF_HUB_OFFLINE": "1"}
    if threads:
        environment["OMP_NUM_THREADS"] = str(threads)
    done = subprocess.run(
        [python, *arguments], capture_output=True, text=True, check=False, cwd=folder, env=environment
    )
    if done.returncode:
        raise SystemExit(f"{packages[0]}: {' '.join(arguments)} failed\n{done.stderr[-2000:]}")
    return done.stdout


def probe(python: str, arguments: Sequence[str], *, packages: Sequence[str | Path], threads: int = 0) -> dict[str, Any]:
    """Runs a probe in an empty folder and returns the object that it printed last; see `run_python`."""
    with tempfile.TemporaryDirectory() as folder:
        printed = run_python(python, arguments, packages=packages, threads=threads, folder=folder)
    return json.loads(printed.splitlines()[-1])


def packages_of(checkout: Path) -> list[Path]:
    """The folders of a checkout of this repository that hold packages."""
    return [checkout, checkout / "kernels" / "torch-ext"]


def in_turns(
    sides: Mapping[str, Callable[[], dict[str, Any]]],
    rounds: int | Mapping[str, int],
    after_each: Callable[[dict[str, list[dict[str, Any]]]], None] | None = None,
) -> dict[str, list[dict[str, Any]]]:
    """Runs every side once per round, in every second round from the last to the first.

    A machine that becomes busy or warm in between then slows all sides alike.

    Args:
        sides: Name → what runs the side.
        rounds: The number of rounds; a side with a smaller number of its own takes part in the first of them.
        after_each: Called after each run with the results of all sides that have some, for a run that may be cut off.

    Returns:
        The results of each side in the order of the rounds.
    """
    counts = {name: rounds if isinstance(rounds, int) else rounds[name] for name in sides}
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    for turn in range(max(counts.values())):
        order = [name for name in sides if turn < counts[name]]
        for name in order if turn % 2 == 0 else reversed(order):
            results[name].append(sides[name]())
            if after_each is not None:
                after_each({side: entries for side, entries in results.items() if entries})
    return results


def medians(runs: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The median of every number that all runs report; True and False are not numbers."""
    keys = [key for key in runs[0] if all(_is_number(run.get(key)) for run in runs)]
    return {key: statistics.median(run[key] for run in runs) for key in keys}


def ratios(numerators: Sequence[float], denominators: Sequence[float]) -> dict[str, float]:
    """The median, the lowest and the highest ratio of two sides over the rounds in which both ran."""
    values = [above / below for above, below in zip(numerators, denominators, strict=False)]
    return {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}


def machine() -> dict[str, Any]:
    """What the numbers depend on: processor, cores, Python, and the load of the machine before the first probe."""
    name = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            name = line.partition(":")[2].strip()
            break
    return {
        "processor": name,
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "load": round(os.getloadavg()[0], 2),
    }


def commit_of(checkout: Path) -> str:
    """The commit of a checkout, with a remark where files other than results differ from it."""
    git = ["git", "-C", str(checkout)]
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    changes = subprocess.run(
        [*git, "status", "--porcelain", "--", ":(top)", _NO_RESULTS], capture_output=True, text=True, check=True
    ).stdout
    return commit + (" with uncommitted changes" if changes.strip() else "")


def write_results(path: Path | None, report: Mapping[str, Any]) -> None:
    """Writes a report as JSON; nothing where the path is None."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=1) + "\n")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
