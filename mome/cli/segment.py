"""`mome segment`: writes masks of scans for text prompts."""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import sys
from pathlib import Path
from typing import Any

from mome.atomic import check_output_folder
from mome.cli.long_scans import LongScans
from mome.cli.parser import given_path, output_folder
from mome.cli.result_options import add_result_options, file_kinds, segmenter_options
from mome.cli.segment_plan import print_plans
from mome.cpu_load import CpuLoad, set_threads
from mome.errors import InputError
from mome.printable import printable
from mome.threads import check_threads, use_huge_pages

_SPLIT_JOBS = "write one jobs file for each model, and give -m {} with the first and -m {} with the second"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command."""
    parser.add_argument(
        "inputs", nargs="*", type=given_path, help="scans (.nii.gz, .mha, DICOM folder, ZIP of one) or folders"
    )
    parser.add_argument("-p", "--prompt", action="append", default=[], help="a structure, or all; may be repeated")
    parser.add_argument("-o", "--out", type=output_folder, help="folder for the masks")
    parser.add_argument(
        "-m", "--model", help="folder, bundled name or Hub id; default: the bundled model that knows the prompts"
    )
    parser.add_argument("--jobs", type=given_path, help="a JSON file of scans, each with its own prompts")
    parser.add_argument("--recursive", action="store_true", help="also search the folders inside of a folder")
    parser.add_argument("--resume", action="store_true", help="skip scans that an earlier run finished")
    parser.add_argument("--overwrite", action="store_true", help="replace masks of another scan, model or setting")
    parser.add_argument("--plan", action="store_true", help="say what each scan will take, and write nothing")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    add_result_options(parser)
    reading = parser.add_argument_group("what is read")
    reading.add_argument("--frame", type=int, help="the volume to take from a 4-D file, from 0")
    reading.add_argument(
        "--series", help="the DICOM series of a folder with several: its number in `mome info`, its UID, or largest"
    )
    reading.add_argument(
        "--allow-gaps", action="store_true", help="read a DICOM series in which many slices are missing"
    )
    reading.add_argument("--allow-damaged", action="store_true", help="leave out DICOM slices that are damaged")
    running = parser.add_argument_group("how the network runs")
    running.add_argument(
        "--overlap", type=float, help="share of a tile that its neighbour covers too, 0 to 0.9; default: the model's"
    )
    running.add_argument("--mirror", help="average over mirrored tiles: lr, ap, si, several with commas, or all")
    running.add_argument("--exact", action="store_true", help="tiles over the whole scan, air too; sums in float32")
    running.add_argument("--precision", default="auto", help="auto, fp32, bf16 or fp16")
    running.add_argument("--compile", action="store_true", help="compile parts of the network; it needs a C++ compiler")
    running.add_argument("--device", help="cpu, cuda or cuda:1; default cpu")
    running.add_argument("--threads", type=int, default=0, help="CPU threads")
    running.add_argument("--memory", help="memory that the run may take, as in 4GB; default what is free")


def run(args: argparse.Namespace) -> int:
    """Runs the command and returns its exit code: 2 if a study failed, 1 if one failed by a bug."""
    if args.jobs is not None and (args.inputs or args.recursive):
        raise InputError("--jobs names the scans itself", hint="leave out the other scans and --recursive")
    if args.jobs is None and not args.inputs:
        raise InputError("no scan was given", hint="mome segment ct.nii.gz -p liver -o out, or --jobs jobs.json")
    if not args.prompt and args.jobs is None:
        raise InputError("no prompt was given", hint="name at least one structure, as in -p liver")
    for given in args.inputs:
        if not given.exists():
            raise InputError("no such file", where=str(given), hint="check the path")
    if args.resume and args.overwrite:
        raise InputError("--resume keeps what is finished, --overwrite replaces it", hint="give one of them")
    check_threads(args.threads, "--threads")
    if args.out is not None:
        check_output_folder(args.out)
    elif not args.plan:
        raise InputError("no folder for the masks was given", hint="name one, as in -o out")
    is_new = args.out is not None and not args.out.exists()
    use_huge_pages()
    load = CpuLoad()
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from mome.cli.quiet import quiet_libraries
    from mome.inference import Segmenter, segment_folder, segment_jobs
    from mome.inference.choose_model import Choice, choose_model
    from mome.inference.jobs import job_prompts
    from mome.inference.problems import PROBLEMS_FILE, problems_of
    from mome.volumes.dicom import DicomOptions

    quiet_libraries()
    threads_note = set_threads(args.threads, load)
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=args.json or not console.is_terminal) as bar:
        task, printed = bar.add_task("segmenting", total=None), set[str]()

        def on_done(entry: dict[str, Any]) -> None:
            if not args.json and not (entry["status"] == "failed" and len(args.inputs) == 1 and args.jobs is None):
                _print_study(entry, args.out, bar.console, printed)

        long_scans = LongScans(lambda line: console.print(line, highlight=False, soft_wrap=True))

        def on_progress(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)
            if not args.json and not console.is_terminal:
                long_scans.progress(done, total)

        prompts, hint = args.prompt, {}
        if args.jobs:
            prompts, hint = job_prompts(args.jobs, args.prompt), {"hint": _SPLIT_JOBS}
        chosen = Choice(args.model, None) if args.model else choose_model(prompts, **hint)
        segmenter = Segmenter(
            chosen.model,
            overlap=args.overlap,
            device=args.device,
            precision=args.precision,
            exact=args.exact,
            compile=args.compile,
            memory=args.memory,
            **segmenter_options(args),
        )
        segmenter.notes += tuple(note for note in (chosen.note, threads_note) if note)
        dicom = DicomOptions(series=args.series, allow_gaps=args.allow_gaps, allow_damaged=args.allow_damaged)
        if args.plan:
            return print_plans(segmenter, args, dicom)
        run_all, what = (segment_jobs, args.jobs) if args.jobs else (segment_folder, args.inputs)
        options = {} if args.jobs else {"recursive": args.recursive}
        entries = run_all(
            segmenter,
            what,
            args.out,
            args.prompt,
            **options,
            multilabel=args.multilabel,
            writer=args.writer,
            resume=args.resume,
            overwrite=args.overwrite,
            frame=args.frame,
            dicom=dicom,
            progress=on_progress,
            on_done=on_done,
            debug=args.debug,
            statistics=args.statistics,
            files=file_kinds(args),
        )
    if args.json:
        print(json.dumps({"studies": entries}, indent=1))
    failed = [entry for entry in entries if entry["status"] == "failed"]
    has_bug = any(entry.get("failure", {}).get("bug") for entry in failed)
    if len(entries) == 1 and failed:
        if is_new:  # an archive was unpacked in it
            with contextlib.suppress(OSError):
                args.out.rmdir()
        if has_bug:
            print(printable(failed[0]["error"]), file=sys.stderr)
            print("  this is a bug in mome: run again with --debug and report the traceback", file=sys.stderr)
            return 1
        raise InputError(failed[0]["error"])
    if problems := problems_of(entries):
        file = printable(str(args.out / PROBLEMS_FILE))
        print(f"{_in_words(len(failed), len(problems) - len(failed), len(entries))}; {file} says why", file=sys.stderr)
    return 1 if has_bug else 2 if failed else 0


def _in_words(failed: int, doubtful: int, scans: int) -> str:
    """Returns what is wrong with a run, as in "1 of 3 scans failed, 1 of 3 scans should be looked at"."""
    if scans == 1:  # one that fails alone has no list of problems
        return "the scan and its masks should be looked at"
    counts = ((failed, "failed"), (doubtful, "should be looked at"))
    return ", ".join(f"{count} of {scans} scans {what}" for count, what in counts if count)


def _print_study(entry: dict[str, Any], out: Path, console: Any, printed: set[str]) -> None:
    """Prints the report's entry of one study.

    Args:
        entry: See `mome.inference.segment_folder`.
        out: The folder of the masks.
        console: A rich console.
        printed: Warnings about prompts that an earlier study printed; they are not repeated.
    """
    from rich.markup import escape as escape_markup  # rich would take "mome[dicom]" for a style and drop "[dicom]"

    from mome.inference.statistics import statistics_name
    from mome.volumes.mask_names import file_part

    def escape(text: str, keep: str = "") -> str:
        return escape_markup(printable(text, keep=keep))

    # Lines are broken for a terminal only: programs that read them search for whole sentences.
    say = functools.partial(console.print, highlight=False, soft_wrap=not console.is_terminal)
    name = escape(entry["name"])
    if entry["status"] == "failed":
        say(f"[bold]{name}[/bold]  [red]failed:[/red] {escape(entry['error'], keep=chr(10))}")
        return
    again = " (from an earlier run)" if entry.get("skipped") else ""
    say(f"[bold]{name}[/bold]  {entry['seconds']:.1f} s{again}")
    notes = [f"note: {note}" for note in entry["notes"]]
    warnings = []
    for structure in entry["structures"]:
        volume, in_map = structure["volume_ml"], structure.get("volume_ml_in_map")
        covered = "" if in_map in (None, volume) else f", {in_map:.1f} ml of it in the map"
        say(f"  {escape(structure['name']):<24} {volume:>10.1f} ml{covered}")
        if structure["warning"]:
            warnings.append(f"warning: {structure['warning']}")
    if entry["overlapping_voxels"]:
        notes.append(
            f"note: {entry['overlapping_voxels']} voxels lay in more than one mask; the smaller one holds them"
        )
    for line in dict.fromkeys(notes + [warning for warning in warnings if warning not in printed]):
        say(f"  [yellow]{escape(line)}[/yellow]")
    printed.update(warnings)
    verb = "kept" if entry.get("skipped") else "wrote"
    measured = [statistics_name(file_part(entry["name"]))] if entry.get("statistics") else []
    for mask in [*entry["masks"], *measured, *entry.get("files", [])]:
        console.print(f"  {verb} {escape(str(out / mask))}", highlight=False, soft_wrap=True)
