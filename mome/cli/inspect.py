"""`mome inspect`: shows which scale and which expert of a model decide where in a scan."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from mome.atomic import atomic_write, check_output_folder
from mome.cli.parser import given_path, output_folder
from mome.cpu_load import CpuLoad, set_threads
from mome.errors import InputError
from mome.printable import printable
from mome.threads import check_threads


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command."""
    parser.add_argument("model", help="folder, bundled name or Hub id of a checkpoint")
    parser.add_argument("--ct", type=given_path, required=True, help="the scan (.nii.gz, .mha, DICOM folder)")
    parser.add_argument("-p", "--prompt", action="append", default=[], help="a structure, or all; may be repeated")
    parser.add_argument("-o", "--out", type=output_folder, required=True, help="folder for pictures and numbers")
    parser.add_argument("--overwrite", action="store_true", help="replace pictures and numbers that are there")
    parser.add_argument("--frame", type=int, help="the volume to take from a 4-D file, from 0")
    parser.add_argument(
        "--series", help="the DICOM series of a folder with several: its number in `mome info`, or its UID"
    )
    parser.add_argument(
        "--overlap", type=float, help="share of a tile that its neighbour covers too, 0 to 0.9; default: the model's"
    )
    parser.add_argument("--device", help="cpu, cuda or cuda:1; default cpu")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")


def run(args: argparse.Namespace) -> int:
    """Runs the command and returns its exit code."""
    if not args.prompt:
        raise InputError("no prompt was given", hint="name at least one structure, as in -p liver")
    if not args.ct.exists():
        raise InputError("no such file", where=str(args.ct), hint="check the path")
    check_threads(args.threads, "--threads")
    check_output_folder(args.out)
    load = CpuLoad()
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from mome.cli.quiet import quiet_libraries
    from mome.inference import Segmenter
    from mome.inspection.inspect import inspect
    from mome.volumes.dicom import DicomOptions
    from mome.volumes.mask_names import file_part, structure_parts
    from mome.volumes.scan_files import stem

    quiet_libraries()
    threads_note = set_threads(args.threads, load)
    segmenter = Segmenter(args.model, overlap=args.overlap, device=args.device)
    segmenter.notes += (threads_note,) if threads_note else ()
    prompts = [prompt.name for prompt in segmenter.understand(args.prompt)]
    files = _files(args.out, file_part(stem(args.ct)), structure_parts(prompts))
    _refuse_what_is_there(files, args)
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=args.json or not console.is_terminal) as bar:
        task = bar.add_task("inspecting", total=None)
        inspection = inspect(
            segmenter,
            args.ct,
            args.prompt,
            frame=args.frame,
            dicom=DicomOptions(series=args.series),
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    report = {"model": args.model, **inspection.report, "pictures": []}
    report["pictures"] = [path.name for path in _draw(inspection, files)]
    with atomic_write(files["report"], "the numbers") as part:
        part.write_text(json.dumps(report, indent=1) + "\n")
    if args.json:
        print(json.dumps(report, indent=1))
        return 0
    for line in _summary(report):
        print(printable(line))
    for name in [*report["pictures"], files["report"].name]:
        print(printable(f"wrote {args.out / name}"))
    return 0


def _files(out: Path, scan: str, parts: list[str]) -> dict[str, Any]:
    """The paths of everything that may be written."""
    return {
        "report": out / f"{scan}_inspection.json",
        "loads": out / f"{scan}_loads.png",
        "scales": [out / f"{scan}_{part}_scales.png" for part in parts],
        "experts": [out / f"{scan}_{part}_experts.png" for part in parts],
    }


def _refuse_what_is_there(files: dict[str, Any], args: argparse.Namespace) -> None:
    """Checks that nothing is replaced unless that was asked for.

    Raises:
        InputError: A file is there already.
    """
    for path in (files["report"], files["loads"], *files["scales"], *files["experts"]):
        if path.exists() and not args.overwrite:
            raise InputError("the file is there already", where=str(path), hint="--overwrite, or another folder")


def _draw(inspection: Any, files: dict[str, Any]) -> list[Path]:
    """Writes the pictures and returns their paths; a model without routers has no pictures of experts."""
    from mome.inspection.figures import save_experts, save_scales
    from mome.inspection.load_figure import save_loads

    written = []
    for view, scales, experts in zip(inspection.views, files["scales"], files["experts"], strict=True):
        written.append(save_scales(scales, inspection, view))
        if view.experts:
            written.append(save_experts(experts, inspection, view))
    loads = save_loads(files["loads"], inspection)
    return written + ([loads] if loads is not None else [])


def _summary(report: dict[str, Any]) -> list[str]:
    """The numbers that a reader wants first, in lines."""
    lines, fusion = [], report["fusion"]
    for structure in report["structures"]:
        name = structure["name"]
        regions = fusion["prompts"].get(name, {})
        inside = regions.get(name, {})
        shown = f"{name}: {structure['volume_ml']:.1f} ml"
        if inside.get("weight"):
            best = max(range(len(inside["weight"])), key=inside["weight"].__getitem__)
            shown += f", {fusion['scales'][best]} has the largest mean weight, {inside['weight'][best]:.2f}"
        lines.append(shown)
    # The labels of a group have one warning in common.
    lines += dict.fromkeys(f"warning: {each['warning']}" for each in report["structures"] if each["warning"])
    for name, router in report["routers"].items():
        for prompt, regions in router["load"].items():
            load = regions["body"]["load"]
            if load is not None:
                shares = " ".join(f"{100 * share:.0f}" for share in load)
                of = "" if prompt == "all prompts" else f" for {prompt}"
                lines.append(f"{name}{of}: load of the experts in the body in % is {shares}")
    lines += [
        f"note: {note}" for note in dict.fromkeys([*([fusion["note"]] if fusion["note"] else []), *report["notes"]])
    ]
    return lines
