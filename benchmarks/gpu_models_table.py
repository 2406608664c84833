"""Writes results/gpu_models.md from results/gpu_models_*.json: `python benchmarks/gpu_models_table.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def cell(values: dict[str, Any], key: str, digits: int = 1) -> str:
    """A number as text, or a dash."""
    return f"{values[key]:.{digits}f}" if isinstance(values.get(key), int | float) else "–"


def section(data: dict[str, Any]) -> str:
    """The tables of one device."""
    versions = ", ".join(f"{name} {version}" for name, version in data["versions"].items())
    lines = [f"## {data['device']}", f"Driver {data.get('driver')}, {versions}, MONAI {data.get('monai')}.", ""]
    if len({step.get("source") for step in data["steps"].values()}) > 1:
        lines += ["The steps belong to several states of the code (`source` in the JSON file).", ""]
    lines += [
        "| training | step (ms) | forward | backward | optimiser | MiB | tokens / s | inference (ms) |",
        "|---" * 8 + "|",
    ]
    other = []
    for name, step in data["steps"].items():
        train, forward = step.get("training"), step.get("inference", {})
        if train:
            numbers = [cell(train, key) for key in ("step_ms", "forward_ms", "backward_ms", "optimizer_ms")]
            numbers += [cell(train, "peak_mib", 0), cell(step, "tokens_per_second", 0), cell(forward, "forward_ms")]
            lines.append(f"| {name.removeprefix('train ')} | " + " | ".join(numbers) + " |")
        elif "seconds" in step:
            found = step.get("dice_with", {}).get("exact", {})
            dice = f"{cell(found, 'mean', 4)} ({cell(found, 'lowest', 4)})"
            numbers = [cell(step, "seconds", 2), cell(step, "peak_mib", 0), dice]
            other.append(f"| {name.removeprefix('segment ')} | " + " | ".join(numbers) + " |")
    lines += ["", "| one CT | s | MiB | mean (lowest) Dice with exact |", "|---" * 4 + "|", *other, ""]
    lines += [f"- {name}: {step['problem']}" for name, step in data["steps"].items() if "problem" in step]
    return "\n".join(lines)


def main() -> None:
    """Writes the file."""
    files = sorted(RESULTS.glob("gpu_models_*.json"))
    text = "\n\n".join(section(json.loads(path.read_text())) for path in files)
    (RESULTS / "gpu_models.md").write_text(f"# Whole models on a GPU\n{text or 'Not yet measured.'}\n")


if __name__ == "__main__":
    main()
