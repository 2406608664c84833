"""`mome evaluate`: the table in 80 columns and through a pipe, and the file of scores."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import mome.metrics
from mome.cli.evaluate import _show
from mome.cli.main import main
from mome.metrics import Score, summarise
from mome.volumes import Grid, write_mask

NAMES = ["common_carotid_artery_right", "liver", "parotid_gland_left"]


def rows() -> list[dict]:
    rng = np.random.default_rng(0)
    scores = [Score(f"c{i}", name, *rng.uniform(0.1, 0.9, 2), rng.uniform(5, 900)) for name in NAMES for i in range(9)]
    return summarise(scores)


def numbers_of(row: dict) -> list[str]:
    kinds = ("mean", "median", "low", "high") if "low" in row["dice"] else ("mean",)
    return [f"{row[m][k]:.{digits}f}" for m, digits in (("dice", 3), ("nsd", 3), ("hd95", 1)) for k in kinds]


@pytest.fixture
def folders(tmp_path: Path) -> list[str]:
    grid = Grid((10, 10, 10), np.diag([2.0, 2, 2, 1]))
    mask = np.zeros(grid.shape, np.uint8)
    mask[2:6, 2:6, 2:6] = 1
    for side in ("p", "r"):
        for name in NAMES:
            write_mask(tmp_path / side / f"x_{name}.nii.gz", mask, grid)
    return [str(tmp_path / "p"), str(tmp_path / "r")]


def test_the_table_is_whole_at_80_columns(capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    _show(rows(), 2.0)
    out = capsys.readouterr().out
    assert "…" not in out and all(len(line) <= 80 for line in out.splitlines())
    heading = next(line for line in out.splitlines() if line.startswith("structure"))
    assert heading.split() == ["structure", "n", "Dice", "surface", "Dice", "HD95", "mm"]
    for row in rows():
        (line,) = [line for line in out.splitlines() if line.startswith(row["structure"])]
        assert line.split()[1] == str(row["n"])
        assert set(numbers_of(row)) <= set(re.findall(r"[\d.]+", out))


def test_the_table_says_how_many_cases_have_a_score(capsys) -> None:
    scores = [Score(f"c{i}", "liver", *((float("nan"),) * 3 if i else (0.5, 0.5, 3.0))) for i in range(4)]
    _show(summarise(scores), 2.0)
    assert re.search(r"liver\s+1 of 4\s+0\.500", capsys.readouterr().out)


def test_through_a_pipe_each_structure_is_one_whole_line(capsys, monkeypatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    _show(rows(), 2.0)
    lines = capsys.readouterr().out.splitlines()
    for row in rows():
        (line,) = [line for line in lines if line.startswith(row["structure"])]
        assert re.findall(r"[\d.]+", line) == [str(row["n"]), *numbers_of(row)]


def test_a_name_too_long_for_the_window_is_folded_and_numbers_stay_whole(capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    name = "a_lesion_described_by_free_text_that_goes_on"
    many = summarise([Score(f"c{i}", name, 0.5, 0.25, 1234.5) for i in range(3)])
    _show(many, 2.0)
    out = capsys.readouterr().out
    assert "…" not in out and all(len(line) <= 80 for line in out.splitlines())
    assert "(1234.5–1234.5)" in out and "".join(re.findall(r"^[a-z_]+", out, re.M)[1:3]) == name


def test_what_was_left_out_is_said(capsys, folders: list[str]) -> None:
    next(Path(folders[0]).glob(f"x_{NAMES[0]}.nii.gz")).unlink()
    assert main(["evaluate", *folders]) == 2
    assert "--partial" in capsys.readouterr().err
    assert main(["evaluate", *folders, "--partial"]) == 0
    printed = capsys.readouterr()
    assert printed.err == "left out: 0 cases and 1 masks of other cases have no prediction\n"
    assert NAMES[0] not in printed.out and NAMES[1] in printed.out
    assert main(["evaluate", *folders, "-p", NAMES[1]]) == 0
    printed = capsys.readouterr()
    assert printed.err == "" and NAMES[1] in printed.out


def test_json_keeps_its_keys(capsys, folders: list[str]) -> None:
    assert main(["evaluate", *folders, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert list(report) == ["tolerance_mm", "structures"]
    assert list(report["structures"][0]) == ["structure", "n", "dice", "nsd", "hd95"]
    assert list(report["structures"][0]["dice"]) == ["n", "mean", "median", "low", "high"]


def test_a_wrong_ending_is_said_before_anything_is_scored(capsys, folders: list[str], monkeypatch) -> None:
    def never(*args: object, **options: object) -> None:
        raise AssertionError("scored before the ending was looked at")

    monkeypatch.setattr(mome.metrics, "evaluate_folder", never)
    assert main(["evaluate", *folders, "--out", "scores.txt"]) == 2
    assert "written as .csv or .json, not '.txt'" in capsys.readouterr().err


def test_scores_are_written(folders: list[str], tmp_path: Path) -> None:
    for name in ("s.csv", "new/s.json"):
        assert main(["evaluate", *folders, "--out", str(tmp_path / name)]) == 0
    with (tmp_path / "s.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["structure"] for row in table] == NAMES and table[0]["hd95"] == "0.0"
    assert list(table[0]) == ["case", "structure", "dice", "nsd", "hd95"]
    assert json.loads((tmp_path / "new" / "s.json").read_text())[1]["structure"] == "liver"


@pytest.mark.parametrize("ending", ["csv", "json"])
def test_a_full_disk_leaves_nothing_and_costs_no_table(folders: list[str], tmp_path: Path, ending: str) -> None:
    out = tmp_path / "out" / f"t.{ending}"
    code = f"""
import resource, signal, sys
import scipy.ndimage, skimage.measure, nibabel, rich.progress
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (40, 40))
from mome.cli.main import main
sys.exit(main(["evaluate", *{folders!r}, "--out", {str(out)!r}]))
"""
    done = subprocess.run([sys.executable, "-B", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    lines = done.stderr.strip().splitlines()
    assert lines[0].startswith("the scores could not be written") and str(out) in lines[1] and len(lines) <= 3
    assert list(out.parent.iterdir()) == [] and "parotid_gland_left" in done.stdout


@pytest.mark.parametrize("tolerance", ["-1", "nan", "inf"])
def test_a_tolerance_that_is_no_distance(tmp_path: Path, capsys, tolerance: str) -> None:
    (tmp_path / "a").mkdir()
    assert main(["evaluate", str(tmp_path / "a"), str(tmp_path / "a"), f"--tolerance={tolerance}"]) == 2
    assert "--tolerance is a finite number of mm of at least 0" in capsys.readouterr().err


def test_a_listed_case_without_a_reference_is_said(capsys, folders: list[str], tmp_path: Path, caplog) -> None:
    """A reference folder that was copied in part gave a mean that looked complete."""
    cases = tmp_path / "cases.json"
    cases.write_text(json.dumps({name: {"annotated": NAMES} for name in ("x", "y", "z")}))
    assert main(["evaluate", *folders, "--cases", str(cases)]) == 2
    said = capsys.readouterr().err
    assert "2 listed cases have no reference: y, z" in said and "--partial" in said and len(said.splitlines()) <= 3
    assert main(["evaluate", *folders, "--cases", str(cases), "--partial"]) == 0
