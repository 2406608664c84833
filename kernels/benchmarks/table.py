"""Writes the three tables of `kernels/README.md`: `python kernels/benchmarks/table.py`.

They come from `benchmarks/results/*.json` and from the shipped configurations. Until a GPU has been measured, one
sentence replaces its table. In a table, a shape has its numbers, or "wrong", "failed" or "not yet measured".
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from shapes import HEADS, SHAPES, head_name

README = Path(__file__).resolve().parents[1] / "README.md"
CONFIGS = README.parent / "torch-ext" / "mome_kernels" / "configs"
RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"

CPU_CASES = {
    "V1": "V1, 48 → 192, E 8",
    "V2": "V2, 96 → 384, K 2",
    "V3": "V3, 192 → 768, K 2",
    "V4": "V4, 384 → 1536, K 2",
    "V8": "V8, 768 → 3072, K 2",
    "V14": "V14, 64 → 64, K 2",
    "head": "head, 32 prompts × 96³, forward",
    "head_backward": "head, forward + backward",
}


COLUMNS = (
    "forward", "in a graph", "of roofline", "best peer / ours", "forward + backward", "in a graph", "of roofline",
    "best peer / ours", "memory",
)  # fmt: skip
NOTHING = "not yet measured"


def state(step: dict) -> str | None:
    """The reason why a step has no figures of ours, or None where it has them."""
    if "both_ms" in step.get("mome", {}):
        return None
    return "wrong" if step.get("wrong") else "failed" if step else NOTHING


def figures(step: dict) -> list[str]:
    """The cells under `COLUMNS` for a step with figures; `dense` is a bound, not a peer."""
    ours = step["mome"]
    peers = [v for k, v in step.items() if k not in ("mome", "bounds_ms", "dense") and isinstance(v, dict)]
    texts = []
    for bound in ("forward", "both"):
        key, graph = f"{bound}_ms", f"{bound}_graph_ms"
        bounds = step.get("bounds_ms", {}).get(bound)
        times = [peer[key] for peer in peers if key in peer]
        busy = ours.get(graph, ours[key])  # the launches by Python are not the kernels' time
        texts.append(f"{ours[key]:.3f} ms")
        texts.append(f"{ours[graph]:.3f} ms" if graph in ours else "–")
        texts.append(f"{max(bounds.values()) / busy:.0%} ({max(bounds, key=bounds.get)})" if bounds else "–")
        texts.append(f"{min(times) / ours[key]:.2f}×" if times else "–")
    peaks = [peer["peak_mib"] for peer in peers if peer.get("peak_mib")]
    texts.append(f"{ours['peak_mib'] / min(peaks):.2f}×" if peaks and ours["peak_mib"] else "–")
    return texts


def read(path: Path) -> Any:
    """The contents of a file of results. Raises ValueError with its name if it is not JSON."""
    try:
        return json.loads(path.read_text())
    except ValueError as problem:
        raise ValueError(f"{path} is not JSON: {problem}") from problem


def table(results: dict) -> str:
    """One row of `figures` per shape and head."""
    steps = results["steps"]
    rows = {f"{name} {s.text}": f"layer {name} {s.load} {s.activation}" for name, s in SHAPES.items()}
    rows |= {f"head, {p} prompts × 96³, S {s}, C {c}": head_name(p, s, c) for p, s, c in HEADS}
    lines = ["| shape | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for text, name in rows.items():
        step = steps.get(name, {})
        why = state(step)
        lines.append(f"| {text} | " + " | ".join([why, *["–"] * (len(COLUMNS) - 1)] if why else figures(step)) + " |")
    return "\n".join(lines)


def tables(folder: Path = RESULTS) -> str:
    """A table per measured GPU, or one sentence where none has been measured."""
    parts = []
    for path in sorted(folder.glob("*.json")) if folder.is_dir() else []:
        data = read(path)
        if isinstance(data, dict) and "ceilings" in data.get("steps", {}) and not data.get("rehearsal"):
            versions = ", ".join(f"{key} {value}" for key, value in data["versions"].items() if value)
            rates = data["steps"]["ceilings"]
            ceilings = (
                f"{rates['flops'] / 1e12:.0f} TFLOP/s, {rates['bandwidth'] / 1e12:.2f} TB/s, "
                f"{rates['instructions'] / 1e12:.1f} × 10¹² vector instructions/s"
            )
            parts.append(f"**{data['device']}** ({versions}; {ceilings})\n\n{table(data)}")
    if not parts:
        return "No GPU has been measured yet."
    explanation = (
        'The whole layer in bfloat16, the head in float32. "In a graph" is the time of a replay from a CUDA graph, '
        'without the launches by Python. "Of roofline" is the least possible time of a fused layer or head over that '
        "of the replay, with the resource that bounds it, at the rates measured in the same call. The peers' times are "
        'those of plain calls, as ours beside them. "Memory" is our peak in forward + backward over that of the '
        "leanest peer."
    )
    return "\n\n".join([explanation, *parts])


def _times(values: dict[str, Any], key: str) -> str:
    return f"{values[key]:.2f}×" if key in values else "–"


def cpu_table(path: Path = RESULTS / "kernels_cpu.json") -> str:
    """One row per case of `benchmarks/kernels_cpu.py`: ours, the best other, and the ratios under both allocators."""
    data = read(path)
    means = data["geometric_means_of_layers"]
    speeds = {key: " and ".join(_times(means[a], key) for a in ("default", "keeping")) for key in means["default"]}
    lines = [
        f"{data['processor']}, {data['threads']} threads, torch {data['torch']}. Geometric means of the layers' speed, "
        f"default allocator and keeping: {speeds['speed']}; beside the tuned loop: {speeds['speed_to_tuned_loop']}.",
        "",
        "| case (float32, forward + backward) | tokens | ours | best other | speed | tuned loop | speed, keeping "
        "| tuned loop, keeping | memory | gradients alone |",
        "|---" * 10 + "|",
    ]
    for name, text in CPU_CASES.items():
        case = data["cases"][name]
        default, keeping = case["default"], case.get("keeping", {})
        ms = default["ms"]
        rival = min((key for key in ms if key not in ("mome", "tuned_loop")), key=ms.get)
        cells = [text, str(data["tokens"].get(name, "–")), f"{ms['mome']:.0f} ms", f"{ms[rival]:.0f} ms ({rival})"]
        cells += [_times(at, key) for at in (default, keeping) for key in ("speed", "speed_to_tuned_loop")]
        cells += [_times(case, "memory"), _times(case, "parameter_gradients")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def fused_table() -> str:
    """The largest token width with a configuration of each fused kernel, by architecture, dtype, and gated or not."""
    kinds = {"half": (2, 0), "half, gated": (2, 1), "float32": (4, 0), "float32, gated": (4, 1)}
    lines = ["| `mlp` / `mlp_dx` / `mlp_dw` | " + " | ".join(kinds) + " |", "|---" * (len(kinds) + 1) + "|"]
    for path in sorted(CONFIGS.glob("*.json")):
        data = json.loads(path.read_text())
        cells = []
        for size, gated in kinds.values():
            widths = []
            for kernel in ("mlp", "mlp_dx", "mlp_dw"):
                rows = [row["up_to"] for row in data[kernel] if "f" not in row["up_to"]]
                fit = [row["d"] for row in rows if row.get("bytes", 4) >= size and row.get("gated", 1) >= gated]
                widths.append(str(max(fit, default="–")))
            cells.append(" / ".join(widths))
        lines.append(f"| {path.stem} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def insert(text: str, content: str, name: str = "table") -> str:
    """The text with the lines between the markers of `name` replaced."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, rest = text.split(begin)
    return f"{before}{begin}\n{content}\n{end}{rest.split(end)[1]}"


def main() -> int:
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args()
    text = README.read_text()
    try:
        for name, content in {"table": tables(), "fused": fused_table(), "cpu": cpu_table()}.items():
            text = insert(text, content, name)
    except ValueError as problem:
        print(f"table.py: {problem}", file=sys.stderr)
        return 2
    temporary = README.with_suffix(".tmp")
    temporary.write_text(text)
    os.replace(temporary, README)
    print(f"{README}: tables written from {RESULTS}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
