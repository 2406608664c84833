"""The tables of `kernels/README.md`, made from `benchmarks/results/*.json`: `python kernels/benchmarks/table.py`.

Where no GPU has run a shape, the table says "not yet measured" and nothing else.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from shapes import SHAPES  # noqa: E402

README = Path(__file__).resolve().parents[1] / "README.md"
RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"


def table(results: dict | None) -> str:
    """One row per shape: ours, the fraction of the roofline, and the best peer's time over ours."""
    lines = [
        "| shape | forward | of roofline | best peer / ours | forward + backward | best peer / ours |",
        "|---|---|---|---|---|---|",
    ]
    steps = {} if results is None else results["steps"]
    for name, shape in SHAPES.items():
        step = steps.get(f"layer {name} {shape.load} {shape.activation}", {})
        ours = step.get("mome", {})
        if "forward_ms" not in ours:
            lines.append(f"| {name} {shape.text} |" + " not yet measured |" * 5)
            continue
        peers = [v for k, v in step.items() if k not in ("mome", "roofline_ms", "dense") and "forward_ms" in v]
        ratio = {
            key: f"{min(p[key] for p in peers) / ours[key]:.2f}×" if peers else "–" for key in ("forward_ms", "both_ms")
        }
        roofline = step.get("roofline_ms")
        of = f"{roofline['forward'] / ours['forward_ms']:.0%}" if roofline else "–"
        lines.append(
            f"| {name} {shape.text} | {ours['forward_ms']:.3f} ms | {of} | {ratio['forward_ms']} | "
            f"{ours['both_ms']:.3f} ms | {ratio['both_ms']} |"
        )
    return "\n".join(lines)


def tables(folder: Path = RESULTS) -> str:
    """A table per measured GPU, or one empty table."""
    parts = []
    for path in sorted(folder.glob("*.json")) if folder.is_dir() else []:
        data = json.loads(path.read_text())
        if isinstance(data, dict) and "steps" in data and not data.get("rehearsal"):
            versions = ", ".join(f"{key} {value}" for key, value in data["versions"].items() if value)
            parts.append(f"**{data['device']}** ({versions})\n\n{table(data)}")
    return "\n\n".join(parts) or table(None)


def insert(text: str, content: str) -> str:
    """The text with what lies between the markers replaced."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{content}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    README.write_text(insert(README.read_text(), tables()))
