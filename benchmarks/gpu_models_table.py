"""Writes results/gpu_models.md from results/gpu_models_*.json: `python benchmarks/gpu_models_table.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
ABOUT = [
    "One scan of 512 × 512 × 300 voxels by `mome-ct-torso-tiny`, 32 prompts: a body of ellipsoids with noise. `exact`",
    "and `default` are our modes in float32, `default_bf16` with bfloat16 in the network; `monai` computes one window",
    "at a time, `8_windows` eight. MiB are those of the GPU, of which the model has 75. The second run of `exact` was",
    "compared with MONAI only.",
    "",
    "Dice with MONAI says little here: ours continues the scan by 15 mm beyond both ends, as this network wants it,",
    "most windows lie at other places, and the network knows nothing like this body. On a scan of 360 mm a side, on",
    "which all windows lie at the same places, and without the 15 mm, the masks are the same",
    "(`tests/test_monai_windows.py`, on the CPU in float32).",
    "",
    "On this GPU the default mode took longer than the exact one, and bfloat16 longer than float32 (0.56 and 0.72 s",
    "in the network instead of 0.37); why was not looked into. No tile was left out: all 27 hold a part of the body.",
    "",
    "All steps were measured before weight gradients of widths above 128 became grouped products",
    "(`kernels/NOTES.md`).",
]


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
    lines += [*ABOUT, ""] if any("monai" in name for name in data["steps"]) else []
    lines += [f"- {name}: {step['problem']}" for name, step in data["steps"].items() if "problem" in step]
    return "\n".join(lines)


def main() -> None:
    """Writes the file."""
    files = sorted(RESULTS.glob("gpu_models_*.json"))
    text = "\n\n".join(section(json.loads(path.read_text())) for path in files)
    (RESULTS / "gpu_models.md").write_text(f"# Whole models on a GPU\n{text or 'Not yet measured.'}\n")


if __name__ == "__main__":
    main()
