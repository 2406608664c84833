"""`mome demo`: segments a synthetic or a given CT with the bundled model; it needs no network connection."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from mome.atomic import atomic_write, check_output_folder
from mome.checksums import file_sha256
from mome.cli.parser import given_path, output_folder
from mome.cpu_load import CpuLoad, set_threads
from mome.errors import InputError
from mome.printable import printable

MODEL = "mome-ct-tiny"
# The files that a demo wrote, with their SHA-256, so that the next one replaces these and no others.
_RECORD = "demo.json"
# Measured with the bundled model on two cores of a server: 5.8 s for the 18 tiles of the synthetic CT.
_SECONDS_PER_TILE = 0.35


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command."""
    parser.add_argument("ct", nargs="?", type=given_path, help="a CT; default: a synthetic head and neck")
    parser.add_argument("-o", "--out", type=output_folder, default=Path("mome-demo"), help="folder of the results")
    parser.add_argument(
        "--overwrite", action="store_true", help="also replace files that no demo wrote or that were changed"
    )
    parser.add_argument(
        "-p",
        "--prompt",
        action="append",
        default=[],
        help="a structure; may be repeated; default: all that the model was trained on",
    )
    parser.add_argument("--seed", type=int, help="seed of the synthetic CT; default 1")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(args: argparse.Namespace) -> int:
    """Runs the command and returns its exit code."""
    if args.ct is not None and not args.ct.exists():
        raise InputError("no such file", where=str(args.ct), hint="check the path, or give no file for a synthetic CT")
    if args.seed is not None and args.ct is not None:
        raise InputError("--seed concerns the synthetic CT, and a CT was given", hint="leave out one of them")
    if args.seed is not None and args.seed < 0:
        raise InputError(f"--seed is at least 0, got {args.seed}")
    check_output_folder(args.out)
    load = CpuLoad()
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.table import Table

    from mome.cli.quiet import quiet_libraries
    from mome.inference import Segmenter
    from mome.metrics import dice
    from mome.temporary_names import remove_stale_parts
    from mome.viz.preview import save_preview
    from mome.volumes.mask_names import mask_name, mask_paths, refuse_to_overwrite
    from mome.volumes.scan_files import stem

    quiet_libraries()
    threads_note = set_threads(0, load)
    began = time.perf_counter()
    console = Console(stderr=args.json)
    if threads_note:
        console.print(f"note: {threads_note}", style="dim", highlight=False)
    volume, truth = _scan(args)
    name = stem(args.ct) if args.ct else "phantom"
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("segmenting", total=None)
        segmenter = Segmenter(MODEL)
        prompts = args.prompt or segmenter.model.config.trained_labels
        understood = [prompt.name for prompt in segmenter.understand(prompts)]
        outputs = [*mask_paths(args.out, name, understood), args.out / f"{name}_preview.png"]
        outputs += [args.out / "phantom_ct.nii.gz"] if args.ct is None else []
        if not args.overwrite:
            _refuse_files_of_others(args.out, outputs, args.ct)
        refuse_to_overwrite([args.ct] if args.ct else [], outputs)
        remove_stale_parts(args.out)
        console.print(f"segmenting takes {_expected_time(segmenter, volume)}", style="dim", highlight=False)
        result = segmenter.segment(
            volume, prompts, progress=lambda done, total: bar.update(task, completed=done, total=total)
        )
    paths = result.save(args.out, name, overwrite=True)  # what may be replaced was checked
    if args.ct is None:
        paths.insert(0, _write_ct(args.out / "phantom_ct.nii.gz", volume))
    paths.append(save_preview(args.out / f"{name}_preview.png", volume, result.masks))
    with atomic_write(args.out / _RECORD, "the record of the demo") as part:
        sums = {path.name: file_sha256(path) for path in sorted(paths)}
        record = {"scan": _scan_record(args.ct), "files": sums}
        part.write_text(json.dumps(record, indent=1) + "\n")
    seconds = time.perf_counter() - began
    rows: list[dict[str, Any]] = []
    for entry in result.summary():
        score = dice(result.masks[entry["name"]], truth[entry["name"]]) if entry["name"] in truth else None
        rows.append({"structure": entry["name"], "volume_ml": entry["volume_ml"], "dice": score})
    report = {
        "structures": rows,
        "seconds": round(seconds, 1),
        "phases": result.seconds,
        "files": [str(path) for path in paths],
        "warnings": result.warnings,
    }
    if args.json:
        print(json.dumps(report, indent=1))
        return 0
    title = "synthetic head and neck" if args.ct is None else escape(printable(name))
    table = Table(title=title, title_style="dim")
    table.add_column("structure")
    table.add_column("volume (ml)", justify="right")
    if truth:
        table.add_column("Dice", justify="right")
    for row in rows:
        cells = [] if not truth else ["–" if row["dice"] is None else f"{row['dice']:.3f}"]
        table.add_row(escape(printable(row["structure"])), f"{row['volume_ml']:.1f}", *cells)
    console.print(table)
    for warning in dict.fromkeys(result.warnings):
        console.print(f"[yellow]warning: {escape(printable(warning))}[/yellow]", highlight=False)
    console.print(f"{seconds:.1f} s in all, {result.seconds.get('network', 0):.1f} s of it the network")
    files = {"masks": args.out / mask_name(name, "*"), "CT": paths[0], "preview": paths[-1]}
    for what, path in files.items():
        if what != "CT" or args.ct is None:
            console.print(f"{what:<8} {escape(printable(str(path)))}", highlight=False, soft_wrap=True)
    console.print("Research software, not a medical device.", style="dim")
    return 0


def _scan(args: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """Returns the CT, and the true masks where it is synthetic."""
    from mome.volumes import Volume, read_volume

    if args.ct is not None:
        return read_volume(args.ct), {}
    from mome.data.phantom import phantom

    made = phantom(1 if args.seed is None else args.seed)
    return Volume(made.array, made.affine), made.masks


def _write_ct(path: Path, volume: Any) -> Path:
    """Writes the synthetic CT as int16 NIfTI and returns `path`."""
    import nibabel as nib
    import numpy as np

    with atomic_write(path, "the CT") as temporary:
        nib.save(nib.Nifti1Image(np.round(volume.array).astype(np.int16), volume.affine), temporary)
    return path


def _refuse_files_of_others(folder: Path, outputs: list[Path], ct: Path | None) -> None:
    """Checks that the files which are there already are those of an earlier demo with the same scan.

    Raises:
        InputError: A file would be replaced that no demo wrote, that is of another scan, or that was changed since.
    """
    from mome.text_file import read_json

    sums: dict[str, Any] = {}
    if (folder / _RECORD).is_file():
        record = read_json(folder / _RECORD, "the record of the demo", hint="--overwrite, or another folder")
        files = record.get("files")
        if isinstance(files, dict) and record.get("scan") == _scan_record(ct):
            sums = {str(name): known for name, known in files.items()}
    for path in (path for path in outputs if path.exists()):
        if path.name not in sums:
            reason = "the file is there already, and no demo of this scan wrote it"
        elif not path.is_file() or file_sha256(path) != sums[path.name]:
            reason = "the file is not as the last demo wrote it: it was changed, or a later demo was interrupted"
        else:
            continue
        raise InputError(reason, where=str(path), hint="--overwrite, or another folder with -o")


def _scan_record(ct: Path | None) -> dict[str, Any]:
    """Returns what tells the scan of a demo from another; synthetic ones replace each other."""
    if ct is None:
        return {"synthetic": True}
    from mome.inference.fingerprint import scan_identity

    return json.loads(json.dumps(scan_identity(ct)))


def _expected_time(segmenter: Any, volume: Any) -> str:
    """Returns the time that the network will take, from the number of its tiles."""
    from mome.inference.scan_grid import scan_grid
    from mome.inference.tiles import tile_starts, tile_steps

    grid = scan_grid(volume, segmenter.processor)
    patch = segmenter.predictor.patch_size
    tiles = 1
    for size, side, step in zip(grid.shape, patch, tile_steps(grid.shape, patch, segmenter.overlap), strict=True):
        tiles *= len(tile_starts(size, side, step))
    seconds = max(1.0, tiles * _SECONDS_PER_TILE)
    shown = f"{seconds:.0f} seconds" if seconds < 90 else f"{seconds / 60:.0f} minutes"
    return f"about {shown} on two CPU cores (tiles: {tiles})"
