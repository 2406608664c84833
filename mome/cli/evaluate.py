"""`mome evaluate PREDICTION REFERENCE`: prints a table of scores per structure."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mome.atomic import atomic_write, check_output_folder
from mome.cli.parser import given_path
from mome.errors import InputError
from mome.printable import printable

if TYPE_CHECKING:
    from rich.table import Table

    from mome.metrics import Score


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command."""
    parser.add_argument("prediction", type=given_path, help="folder or file of masks")
    parser.add_argument("reference", type=given_path, help="folder or file of reference masks")
    parser.add_argument(
        "--labels", help="whose numbers label maps without a table use: openkbp, or a YAML file of yours"
    )
    parser.add_argument("--cases", type=given_path, help="cases.json with what is annotated in each case")
    parser.add_argument("-p", "--prompt", action="append", help="score this structure only; may be repeated")
    parser.add_argument(
        "--partial", action="store_true", help="leave out what has no prediction, and listed cases without a reference"
    )
    parser.add_argument("--tolerance", type=float, default=2.0, help="tolerance of the surface Dice in mm")
    parser.add_argument("--out", type=given_path, help="write the scores of every case to this .csv or .json")
    parser.add_argument("--overwrite", action="store_true", help="replace the file of --out")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(args: argparse.Namespace) -> int:
    """Runs the command and returns its exit code.

    Raises:
        InputError: Bad arguments, or masks that cannot be compared.
        OutputError: The file of scores cannot be written; the table is printed all the same.
    """
    from rich.console import Console
    from rich.progress import track

    from mome.cli.quiet import quiet_readers

    if not 0 <= args.tolerance < math.inf:
        raise InputError(f"--tolerance is a finite number of mm of at least 0, got {args.tolerance}")
    from mome.metrics import evaluate_folder, summarise

    if args.overwrite and args.out is None:
        raise InputError("--overwrite concerns the file of --out, which was not given", hint="--out scores.csv")
    if args.out is not None:
        _check_out(args.out, overwrite=args.overwrite)
    quiet_readers()
    error = Console(stderr=True)
    missing: list[tuple[str, str | None]] = []
    scores = evaluate_folder(
        args.prediction,
        args.reference,
        dataset=args.labels,
        cases=args.cases,
        structures=args.prompt,
        on_missing=(lambda *what: missing.append(what)) if args.partial else None,
        tolerance=args.tolerance,
        progress=lambda cases: track(
            cases, "evaluating", console=error, transient=True, disable=args.json or not error.is_terminal
        ),
    )
    if missing:
        whole = [case for case, structure in missing if structure is None]
        error.print(
            f"left out: {len(whole)} cases and {len(missing) - len(whole)} masks of other cases have no prediction",
            highlight=False,
        )
    rows = summarise(scores)
    try:
        if args.out:
            _write(args.out, scores)
    finally:  # prints the table even if writing the file fails
        if args.json:
            print(json.dumps({"tolerance_mm": args.tolerance, "structures": _nan_as_null(rows)}, indent=1))
        else:
            _show(rows, args.tolerance)
    return 0


def _check_out(path: Path, *, overwrite: bool) -> None:
    """Checks before anything is scored that the file of scores can be written.

    Raises:
        InputError: Its ending is another, it is there already, or its folder may not be written.
    """
    if path.suffix not in (".csv", ".json"):
        raise InputError(f"scores are written as .csv or .json, not {path.suffix!r}", where=str(path))
    if path.is_dir():
        raise InputError("the file of scores is a folder", where=str(path), hint="--out scores.csv")
    if path.exists() and not overwrite:
        raise InputError("the file is there already", where=str(path), hint="--overwrite, or another file")
    check_output_folder(path.parent)


def _show(rows: list[dict[str, Any]], tolerance: float) -> None:
    """Prints the table with one line per structure; if the window is too narrow, intervals go on a second line."""
    from rich.console import Console

    wide = Console(width=1000)
    # For a pipe, rich assumes 80 columns.
    console = Console() if sys.stdout.isatty() or "COLUMNS" in os.environ else wide
    table = _table(rows, tolerance, " ")
    if wide.measure(table).maximum > console.width:
        table = _table(rows, tolerance, "\n")
    console.print(table)


def _table(rows: list[dict[str, Any]], tolerance: float, separator: str) -> Table:
    """The table; `separator` stands between the median and the interval of a cell."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    table = Table(
        title=f"surface Dice at {tolerance:g} mm; mean, median (95 % interval of the mean)",
        title_style="dim",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    table.add_column("structure", overflow="fold")  # the only column that may wrap, so that numbers stay readable
    for heading in ("n", "Dice", "surface Dice", "HD95 mm"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        style = "bold" if row["structure"] == "mean" else None
        cells = [_cell(row[metric], digits, separator) for metric, digits in (("dice", 3), ("nsd", 3), ("hd95", 1))]
        table.add_row(escape(printable(row["structure"])), _cases(row), *cells, style=style)
    return table


def _cases(row: dict[str, Any]) -> str:
    """Number of cases of a structure; "6 of 10" where four have no score, because both masks are empty."""
    is_mean = row["structure"] == "mean"  # its metrics count structures
    return str(row["n"]) if is_mean or row["dice"]["n"] == row["n"] else f"{row['dice']['n']} of {row['n']}"


def _cell(value: dict[str, float], digits: int, separator: str) -> str:
    """Mean, median and interval of one metric, or a dash if there is no value."""
    if math.isnan(value["mean"]):
        return "–"
    text = f"{value['mean']:.{digits}f}"
    if "low" in value:
        text += f", {value['median']:.{digits}f}{separator}({value['low']:.{digits}f}–{value['high']:.{digits}f})"
    return text


def _nan_as_null(value: Any) -> Any:
    """Replaces NaN, which JSON does not have, by None in nested dicts and lists."""
    if isinstance(value, dict):
        return {key: _nan_as_null(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_nan_as_null(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _write(path: Path, scores: list[Score]) -> None:
    """Writes one row per score, as CSV or JSON by the ending of the path.

    Raises:
        OutputError: The file cannot be written.
    """
    from mome.metrics import Score

    with atomic_write(path, "the scores") as part:
        if path.suffix == ".json":
            part.write_text(json.dumps(_nan_as_null([vars(score) for score in scores]), indent=1) + "\n")
        else:
            with part.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, [field.name for field in dataclasses.fields(Score)])
                writer.writeheader()
                writer.writerows(vars(score) for score in scores)
