"""Compares runs whose model is spread over the processes (FSDP2, expert parallelism) with DDP and with one process.

    python benchmarks/training_spread.py --out benchmarks/results/training_spread.json

The run is the small one of the tests (`tests/training_runs.py`) in float32, with four experts per scale, of which a
voxel takes two, and four patches a step over all processes. The processes are joined by gloo on the CPU.
"""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from processes import commit_of, machine, write_results
from training_processes import REPOSITORY, TESTS, compare_and_tabulate, launched, losses_of

PATCHES, STEPS = 4, 20
MODEL = ["experts=swiglu(n=4, hidden=8)", "router=topk(k=2, balance_weight=0.01)", "head=plain"]
# processes, and what is spread
ARMS: dict[str, tuple[int, dict[str, int]]] = {
    "DDP, two processes": (2, {}),
    "FSDP2, two processes": (2, {"fsdp_size": 2}),
    "FSDP2, experts over two processes": (2, {"fsdp_size": 2, "ep_size": 2}),
    "DDP, four processes": (4, {}),
    "FSDP2 over four, experts over two": (4, {"fsdp_size": 4, "ep_size": 2}),
    "two groups of two with experts over two": (4, {"fsdp_size": 2, "ep_size": 2, "dp_replicate_size": 2}),
}


def train(recipe: Path, name: str, processes: int, sizes: dict[str, int]) -> tuple[list[float], list[int]]:
    """Trains; returns the losses, and the parameters of the first process and of the model if it is spread."""
    out = recipe.parent / name
    settings = [f"train.out={out}", f"train.batch_size={PATCHES // processes}", f"train.steps={STEPS}",
                "train.validate_every=0", "train.gradient_accumulation=1", "train.learning_rate=0.003", *MODEL,
                *(f"distributed.{key}={value}" for key, value in sizes.items())]  # fmt: skip
    printed = launched([str(REPOSITORY / "examples/train.py"), "--config", str(recipe), *settings], processes)
    held = re.search(r"holds ([\d,]+) of ([\d,]+) parameters", printed)
    return losses_of(out), [int(number.replace(",", "")) for number in held.groups()] if held else []


def compare(out: Path | None) -> dict[str, Any]:
    """Trains every arm, each beside one process with the same patches."""
    sys.path.insert(0, str(TESTS))
    from training_runs import write_recipe

    report: dict[str, Any] = {
        "command": "python benchmarks/training_spread.py",
        "machine": machine(),
        "commit": commit_of(REPOSITORY),
        "arms": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        recipe = write_recipe(Path(folder))
        one, _ = train(recipe, "one", 1, {})
        for number, (arm, (processes, sizes)) in enumerate(ARMS.items()):
            losses, parameters = train(recipe, str(number), processes, sizes)
            differences = [abs(a - b) for a, b in zip(one, losses, strict=True)]
            report["arms"][arm] = {
                "processes": processes,
                "distributed": sizes,
                "parameters": parameters,
                "largest_difference_of_6_steps": max(differences[:6]),
                "largest_difference": max(differences),
                "last_loss": losses[-1],
            }
            write_results(out, report)
    return report


def table(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    lines = [
        "# A model that is spread over processes",
        "",
        f"`{report['command']}`, commit {report['commit'][:12]}. Losses of {STEPS} steps in float32 beside those of",
        "one process with the same patches. Rounding grows with every step, since a voxel between two experts may go",
        "to either.",
        "",
        "| run | parameters in the first process | largest difference of a loss, 6 steps | 20 steps | last loss |",
        "|---|---|---|---|---|",
    ]
    for arm, one in report["arms"].items():
        held = "{:,} of {:,}".format(*one["parameters"]) if one["parameters"] else "all"
        lines.append(
            f"| {arm} | {held} | {one['largest_difference_of_6_steps']:.1e} | {one['largest_difference']:.1e} | "
            f"{one['last_loss']:.4f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    compare_and_tabulate(__doc__, compare, table)
