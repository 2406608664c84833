"""The section of benchmarks/RESULTS.md on inference, made from the files in benchmarks/results."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
NOT_MEASURED = "Not yet measured.\n"
SIDES = {
    "exact": "`Segmenter`, exact, float32",
    "default": "`Segmenter`, default",
    "default_fp32": "`Segmenter`, default, float32",
    "compiled": "`Segmenter`, default, `--compile`",
    "monai": "MONAI `sliding_window_inference`",
    "konfai": "KonfAI 1.8.7",
    "konfai_streamed": "KonfAI 1.8.7, memory budget 1 GiB",
}
CASES = {
    "bundled": "logits of the bundled model",
    "real": "89 real structures, 11 of them twice",
    "worst": "the whole body, 100 times",
}
# Seconds a scan, and those of 49409b8 in the same runs.
EARLIER_FOLDER_RUNS = "1fa8dd2 took 2.69 s when 49409b8 took 4.09 s, and 34c9e6d 3.18 s when it took 4.70 s"
MODES = {"bf16": "bfloat16", "default": "default", "default_fp32": "default, float32"}

COMMANDS = """```
export MOME_TEST_DATA=…      # the folder that contains openkbp/ and torso/
pip install --target ../konfai --no-deps konfai==1.8.7 ruamel.yaml
pip install --target ../nnunet nnunetv2==2.8.1
git worktree add ../before 49409b8
python benchmarks/inference_peers.py --konfai ../konfai --work ../scans --out benchmarks/results/inference_peers.json
python benchmarks/inference_peers.py --sides exact default compiled monai --work ../scans \\
  --out benchmarks/results/inference_compiled.json
python benchmarks/inference_large.py --work ../scans --out benchmarks/results/inference_large.json
python benchmarks/inference_folder.py --before ../before --rounds 2 \\
  --out benchmarks/results/inference_folder.json
python benchmarks/resampling_nnunet.py --nnunet ../nnunet --work ../scans \\
  --out benchmarks/results/resampling_nnunet.json
python benchmarks/inference_precision.py --out benchmarks/results/inference_precision.json
python benchmarks/openkbp_table.py
```"""


def inference_section() -> str:
    """The section's text, without its heading."""
    parts = [
        ("Beside MONAI and KonfAI", "inference_peers.json", peers),
        ("With --compile, beside MONAI", "inference_compiled.json", compiled),
        ("512 × 512 × 600 voxels, 100 prompts", "inference_large.json", large),
        ("A folder of 33 scans", "inference_folder.json", folder),
        ("To the network grid and back, beside nnU-Net", "resampling_nnunet.json", resampling),
        ("Masks of bfloat16 and of the default settings", "inference_precision.json", precision),
    ]
    text = ""
    for heading, file, describe in parts:
        path = RESULTS / file
        text += f"### {heading}\n"
        text += describe(json.loads(path.read_text())) if path.exists() else NOT_MEASURED
        text += "\n"
    return text + COMMANDS


def peers(report: dict[str, Any]) -> str:
    """`inference_peers.py` as a table."""
    prompts = report["sides"].get("default", {}).get("dice_with_exact", {}).get("not_empty", 0)
    text = f"""`ts_example_ct` at 2 mm (183 × 152 × 168 voxels), 32 prompts; the same network, windows of 64³, overlap
of one half and Gaussian weights on every side; one process per run, {report["rounds"]} rounds in turn, medians
({where(report)}). Ratios are to MONAI in the same round, with the lowest and the highest. Memory is above that of the
process with the loaded model. Dice is with the exact masks, over the prompts whose masks are not empty ({prompts} for
the default settings). KonfAI's time includes reading and writing an uncompressed file; it resamples without smoothing
and pads the last tiles, so its masks differ. Our tiles lie in even steps and MONAI's windows do not, and this network
knows no structure of the torso: its small masks differ more than true ones would. Wanted: exact at most 0.9 of the
time, 0.3 outside of the network and 0.25 of the memory; default at most half of the time. The processor multiplies
bfloat16 (AMX). About half of the default's time is the fusion head, which computes every prompt at every voxel
in float32. MONAI computes the same network, so what makes the network itself faster helps both sides."""
    return paragraph(text) + table(side_rows(report))


def compiled(report: dict[str, Any]) -> str:
    """`inference_peers.py --sides exact default compiled monai` as a table."""
    text = f"""The same scan on the same machine ({where(report)}, {report["rounds"]} rounds). MONAI computes the same
network without compilation. `--compile` makes one loop of the fusion head on the CPU; compiling takes a minute or two,
once on a machine, and is not in the seconds. An encoder in bfloat16 is not compiled. This table was measured later than
the one above; the machine was slower then and changed its speed from run to run. Meanwhile the head had become faster
on both sides. Why the ratios of time are higher was not measured. On a machine
without bfloat16 (commit 193d48b, where all sides computed in float32), the ratios of time were 0.88, 0.90 and, with
`--compile`, 0.73."""
    return paragraph(text) + table(side_rows(report))


def side_rows(report: dict[str, Any]) -> list[list[str]]:
    """The sides of a report of `inference_peers.py` as rows."""
    rows = [["", "s", "outside the network, s", "memory, MiB", "time", "outside", "memory", "lowest Dice", "mean Dice"]]
    for side, name in SIDES.items():
        row = report["sides"].get(side)
        if row is None:
            continue
        ratios, dice = row.get("ratio_to_monai", {}), row.get("dice_with_exact", {})
        rows.append(
            [
                name + (f" ({row['precision']})" if side == "default" else ""),
                f"{row['seconds']:.2f}",
                f"{row['outside_seconds']:.2f}",
                f"{row['memory_mib']:.0f}",
                *(span(ratios.get(key)) for key in ("seconds", "outside_seconds", "memory_mib")),
                *(f"{dice[key]:.4f}" if key in dice else "–" for key in ("lowest", "mean")),
            ]
        )
    return rows


def large(report: dict[str, Any]) -> str:
    """`inference_large.py` as a table."""
    rows = [
        ["masks", "peak, GiB", "s", "network, s", "share", "writing, s", "not empty", "voxels, million", "files, MiB"]
    ]
    for case, name in CASES.items():
        row = report["cases"].get(case)
        if row is None:
            continue
        rows.append(
            [
                name,
                f"{row['peak_mib'] / 1024:.2f}",
                f"{row['seconds']:.0f}",
                f"{row['network_seconds']:.0f}",
                f"{row['network_share']:.0%}",
                f"{row['write_seconds']:.1f}",
                f"{row['not_empty']:.0f}",
                f"{row['positive_voxels'] / 1e6:.0f}",
                f"{row['mask_mib']:.0f}",
            ]
        )
    used = next(iter(report["runs"].values()))[0]
    text = f"""LIDC-IDRI-0001, continued by its mirror image; {report["mode"]} settings ({used["precision"]} in the
network), runs of each case: {report["rounds"]}, medians ({where(report)}), with {used["gzip"]} for gzip. The bundled
model knows seven structures of the neck; in the other two cases its logits are replaced by signed distances after it
has run. Seconds are from the file of the scan to the files of the masks. Peak memory is that of the whole process. The
code before inference was redesigned (commit 8efeb63) needed 13.4 GB and 725 s for the first case."""
    return paragraph(text) + table(rows)


def folder(report: dict[str, Any]) -> str:
    """`inference_folder.py` as a sentence."""
    now, before = report["sides"]["now"], report["sides"].get("before")
    text = f"""`mome segment` on the OpenKBP validation scans with seven prompts, masks written, runs:
{report["rounds"]}, medians ({where(report)}): {now["seconds_per_scan"]:.2f} s a scan with the start of the program
({now["scans"]:.0f} scans). Wanted are 3 s."""
    if before:
        ratio = now["seconds_per_scan"] / before["seconds_per_scan"]
        text += f""" Commit {report["commits"]["before"][:7]} ({before["scans"]:.0f} scans) took
{before["seconds_per_scan"]:.2f} s in the same runs, so now {ratio:.2f} of the time. The speed of this machine changes
from day to day: {EARLIER_FOLDER_RUNS}."""
    return paragraph(text).rstrip() + "\n"


def resampling(report: dict[str, Any]) -> str:
    """`resampling_nnunet.py` as sentences."""
    ours, theirs, dice = report["sides"]["mome"], report["sides"]["nnunet"], report["dice"]
    text = f"""512 × 512 × {report["planes"]} voxels to about 92 × 92 × 120, and the logits of {report["prompts"]} real
structures back, thresholded at 0 ({len(report["runs"]["mome"])} runs of ours and {len(report["runs"]["nnunet"])} of
nnU-Net, medians, {where(report)}). nnU-Net's default resampling (order 3 there, order 1 back) takes
{theirs["seconds"]:.0f} s and {theirs["memory_mib"] / 1024:.1f} GiB, `Segmenter` {ours["seconds"]:.1f} s and
{ours["memory_mib"] / 1024:.2f} GiB: {report["ratio"]:.3f} times the time. The lowest Dice of the masks of both is
{dice["lowest"]:.4f}."""
    return paragraph(text).rstrip() + "\n"


def precision(report: dict[str, Any]) -> str:
    """`inference_precision.py` as a table."""
    modes = [mode for mode in MODES if any(mode in row for row in report["summary"].values())]
    rows = [["structure", "masks"]]
    rows[0] += [f"{MODES[mode]}: {what}" for mode in modes for what in ("lowest", "mean")]
    rows[0] += [f"manual: {name}" for name in ("float32", *(MODES[mode] for mode in modes))]
    for structure, row in report["summary"].items():
        cells = [structure.replace("_", " "), str(row[modes[0]]["not_empty"])]
        for mode in modes:
            cells += [f"{row[mode]['lowest']:.4f}", f"{row[mode]['mean']:.4f}"]
        cells += [f"{row[mode]['manual']:.4f}" for mode in ("exact", *modes)]
        rows.append([f"**{cell}**" for cell in cells] if structure == "all" else cells)
    used = report["precision"].get("default")
    note = f" The default settings computed in {used}." if used else ""
    text = f"""`mome-ct-tiny` on the {len(report["cases"])} OpenKBP
validation scans. Lowest and mean are the Dice with the masks of float32 and all tiles, over the scans where one of the
two is not empty; `manual` is the mean Dice with the contours, over the annotated scans. The
row *all* is the mean over all masks, not over the structures.{note}"""
    return paragraph(text) + table(rows)


def where(report: dict[str, Any]) -> str:
    """The machine and the commit."""
    commit = report.get("commit") or report["commits"]["now"]
    machine = report["machine"]
    return f"{machine['processor']}, {machine['cores']} cores, commit {commit[:7]}"


def paragraph(text: str) -> str:
    """A text in lines of at most 120 characters, and an empty line."""
    return textwrap.fill(" ".join(text.split()), 120, break_long_words=False, break_on_hyphens=False) + "\n\n"


def span(ratio: dict[str, float] | None) -> str:
    """A ratio with its lowest and highest value."""
    return "–" if ratio is None else f"{ratio['median']:.2f} ({ratio['lowest']:.2f}–{ratio['highest']:.2f})"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows as a Markdown table; the first is the head."""
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join("| " + " | ".join(row) + " |" for row in lines) + "\n"


if __name__ == "__main__":
    print(inference_section())
