"""Compares the losses of one process and of two with the same global batch, over 20 steps in float64.

    python benchmarks/training_processes.py --out benchmarks/results/training_processes.json

The run is the small one of the tests (`tests/training_runs.py`); the two processes are joined by gloo on the CPU. Only
the order in which sums are rounded may differ between the two.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from processes import commit_of, machine, write_results

REPOSITORY = Path(__file__).resolve().parent.parent
TESTS = REPOSITORY / "tests"
# What differs from the recipe: a router that draws noise, as `switch` does, draws its own in every process.
ARMS = {
    "switch without noise": ["router=switch(jitter=0.0)"],
    "topk, one expert": ["router=topk(k=1)"],
    "topk, two experts, losses": ["router=topk(k=2, balance_weight=0.01, z_weight=0.001)"],
    "linear experts": ["experts=linear"],
    "two batches a step": ["router=topk(k=1)", "train.gradient_accumulation=2"],
}


def train(recipe: Path, name: str, processes: int, overrides: list[str]) -> tuple[list[float], str]:
    """Trains with a batch of two over all processes; returns the losses and the text of the validations."""
    out = recipe.parent / name
    settings = [f"train.out={out}", f"train.batch_size={2 // processes}", "train.steps=20", "train.validate_every=10",
                "train.gradient_accumulation=1", *overrides]  # fmt: skip
    program = [str(TESTS / "training_double.py"), str(recipe.parent / f"{name}-records")]
    launched([*program, "--config", str(recipe), *settings], processes)
    return losses_of(out), (out / "validation.jsonl").read_text()


def launched(program: list[str], processes: int) -> str:
    """Runs a program of Python, with torchrun where it has several processes; returns what it printed."""
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--standalone"]
    paths = [str(REPOSITORY), str(REPOSITORY / "kernels" / "torch-ext"), str(TESTS)]
    return subprocess.run(
        [sys.executable, *(launcher if processes > 1 else []), *program],
        check=True, stdout=subprocess.PIPE, text=True, timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)},
    ).stdout  # fmt: skip


def losses_of(run: Path) -> list[float]:
    """The losses of a run's steps."""
    return [json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines()]


def compare(out: Path | None) -> dict[str, Any]:
    """Trains every arm with one process and with two."""
    sys.path.insert(0, str(TESTS))
    from training_runs import write_recipe

    report: dict[str, Any] = {
        "command": "python benchmarks/training_processes.py",
        "machine": machine(),
        "commit": commit_of(REPOSITORY),
        "arms": {},
    }
    for arm, overrides in ARMS.items():
        with tempfile.TemporaryDirectory() as folder:
            recipe = write_recipe(Path(folder))
            (one, scores), (two, others) = (train(recipe, str(n), n, overrides) for n in (1, 2))
        differences = [abs(a - b) for a, b in zip(one, two, strict=True)]
        report["arms"][arm] = {
            "overrides": overrides,
            "steps": len(one),
            "largest_difference": max(differences),
            "first_difference": differences[0],
            "last_loss": one[-1],
            "same_validation": scores == others,
        }
        write_results(out, report)
    return report


def table(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    lines = [
        "# One process and two",
        "",
        f"`{report['command']}`, commit {report['commit'][:12]}. Losses of 20 steps in float64 with the same",
        "global batch; torchrun and gloo join the two processes. Validations are those after 10 and 20 steps.",
        "",
        "| run | largest difference of a loss | last loss | validations |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {arm} | {one['largest_difference']:.1e} | {one['last_loss']:.4f} | "
        f"{'identical' if one['same_validation'] else 'different'} |"
        for arm, one in report["arms"].items()
    ]
    return "\n".join(lines) + "\n"


def compare_and_tabulate(
    description: str | None, compare: Callable[[Path | None], dict[str, Any]], table: Callable[[dict[str, Any]], str]
) -> None:
    """Runs a comparison as a command with the option --out.

    Args:
        description: Of the command.
        compare: Makes the report, and writes it to a file on the way.
        table: The report as Markdown.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the results to this .json, and a table beside it as .md")
    args = parser.parse_args()
    report = compare(args.out)
    if args.out is not None:
        args.out.with_suffix(".md").write_text(table(report))
    print(table(report))


if __name__ == "__main__":
    compare_and_tabulate(__doc__, compare, table)
