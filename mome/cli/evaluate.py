"""`mome evaluate PRED REF`: a table per structure."""

from __future__ import annotations

import argparse
import csv
import json
import math
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("prediction", type=Path, help="folder or file of masks")
    parser.add_argument("reference", type=Path, help="folder or file of reference masks")
    parser.add_argument("--labels", help="data set whose numbers maps without a table use, as in openkbp")
    parser.add_argument("--cases", type=Path, help="cases.json with what is annotated in each case")
    parser.add_argument("--tolerance", type=float, default=2.0, help="of the surface Dice, in mm")
    parser.add_argument("--out", type=Path, help="write the scores of every case to this .csv or .json")
    parser.add_argument("--json", action="store_true", help="print the table for programs")


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    from rich.console import Console
    from rich.progress import track
    from rich.table import Table

    from mome.metrics import evaluate_folder, summarise

    error = Console(stderr=True)
    scores = evaluate_folder(
        args.prediction,
        args.reference,
        dataset=args.labels,
        cases=args.cases,
        tolerance=args.tolerance,
        progress=lambda cases: track(cases, "evaluating", console=error, transient=True, disable=args.json),
    )
    rows = summarise(scores)
    if args.out:
        _write(args.out, [vars(score) for score in scores])
    if args.json:
        print(json.dumps({"tolerance_mm": args.tolerance, "structures": _plain(rows)}, indent=1))
        return 0
    table = Table(title=f"surface Dice at {args.tolerance:g} mm; mean (95 % interval), median", title_style="dim")
    for heading in ("structure", "n", "Dice", "surface Dice", "HD95 mm"):
        table.add_column(heading, justify="left" if heading == "structure" else "right", no_wrap=True)
    for row in rows:
        style = "bold" if row["structure"] == "mean" else None
        cells = [_cell(row["dice"], 3), _cell(row["nsd"], 3), _cell(row["hd95"], 1)]
        table.add_row(row["structure"], str(row["n"]), *cells, style=style)
    Console().print(table)
    return 0


def _cell(value: dict[str, float], digits: int) -> str:
    if math.isnan(value["mean"]):
        return "–"
    text = f"{value['mean']:.{digits}f}"
    if "low" in value:
        text += f" ({value['low']:.{digits}f}–{value['high']:.{digits}f}), {value['median']:.{digits}f}"
    return text


def _plain(value: Any) -> Any:
    """NaN as null, which is what JSON has."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    from mome.errors import InputError

    if path.suffix not in (".csv", ".json"):
        raise InputError(f"scores are written as .csv or .json, not {path.suffix!r}", where=str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    if path.suffix == ".json":
        part.write_text(json.dumps(_plain(rows), indent=1) + "\n")
    else:
        with part.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]) if rows else [])
            writer.writeheader()
            writer.writerows(rows)
    part.replace(path)
