"""`examples/predict_cohort.py`: several processes give the masks of one, each study once, whatever is killed."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from small_models import liver_and_spleen
from small_scans import patient_hu, save_patient

from mome.inference import Segmenter, segment_folder
from mome.processing import MoMEProcessor

SCRIPT = Path(__file__).resolve().parent.parent / "examples" / "predict_cohort.py"
NAMES = [f"s{number:02d}" for number in range(16)]


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`scans/`, of which one is broken, `model/`, and `whole/`, the run of one process."""
    folder = tmp_path_factory.mktemp("cohort")
    liver_and_spleen().save_pretrained(folder / "model")
    MoMEProcessor(spacing=[8, 9, 10]).save_pretrained(folder / "model")
    rng = np.random.default_rng(0)
    for name in NAMES:
        save_patient(
            folder / "scans" / f"{name}.nii.gz", (patient_hu() + rng.normal(0, 60, patient_hu().shape)).astype("<i2")
        )
    (folder / "scans" / "s05.nii.gz").write_bytes(b"broken")
    segmenter = Segmenter(folder / "model")
    segment_folder(segmenter, [folder / "scans"], folder / "whole", ["liver", "spleen"])
    return folder


def command(cohort: Path, out: str) -> list[str]:
    arguments = [str(cohort / "scans"), "-p", "liver", "-p", "spleen", "-m", str(cohort / "model")]
    return [str(SCRIPT), *arguments, "-o", str(cohort / out), "--threads", "1"]


def check(cohort: Path, out: str) -> None:
    whole, made = cohort / "whole", cohort / out
    masks = {path.name for path in whole.glob("*.nii.gz")}
    assert masks == {path.name for path in made.glob("*.nii.gz")} and len(masks) == 2 * (len(NAMES) - 1)
    for name in masks:
        assert (whole / name).read_bytes() == (made / name).read_bytes(), name
    entries = json.loads((made / "report.json").read_text())["studies"]
    assert sorted(entry["name"] for entry in entries) == NAMES
    assert [entry["name"] for entry in entries if entry["status"] == "failed"] == ["s05"]
    (problem,) = [p for p in json.loads((made / "problems.json").read_text())["problems"] if p["status"] == "failed"]
    assert problem["name"] == "s05" and problem["phase"] == "read" and problem["remedy"]
    with (made / "volumes.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["study"], row["structure"]) for row in rows] == [
        (name, structure) for name in NAMES if name != "s05" for structure in ("liver", "spleen")
    ]
    assert not list(made.glob(".*"))  # neither claims nor temporary files


@pytest.mark.wide
@pytest.mark.timeout(600)
def test_two_processes_of_a_launcher(cohort: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"]
    done = subprocess.run([*launcher, *command(cohort, "two")], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "1 of 16 studies failed" in done.stderr, done.stderr[-2000:]
    assert "process 1 of 2" in done.stdout and "process 2 of 2" in done.stdout
    segmented = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("[") and "done" in line]
    assert sorted(segmented) == [f"{name}:" for name in NAMES if name != "s05"]  # each by one of them
    check(cohort, "two")


@pytest.mark.wide
@pytest.mark.timeout(600)
def test_a_killed_process_loses_nothing(cohort: Path) -> None:
    """The other process takes over its studies; where both are killed, the next run does."""

    def start(rank: int, out: str) -> subprocess.Popen[str]:
        environment = {**os.environ, "RANK": str(rank), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            [sys.executable, *command(cohort, out)], env=environment, stdout=subprocess.PIPE, text=True
        )

    processes = [start(rank, "one_killed") for rank in range(2)]
    for line in processes[1].stdout:  # type: ignore[union-attr]
        if line.startswith("[1]"):
            break
    processes[1].kill()
    assert processes[0].wait() == 2 and processes[1].wait() == -9  # s05 is broken
    check(cohort, "one_killed")

    processes = [start(rank, "both_killed") for rank in range(2)]
    for process in processes:
        for line in process.stdout:  # type: ignore[union-attr]
            if line.startswith("["):
                break
        process.kill()
    assert [process.wait() for process in processes] == [-9, -9]
    (resumed,) = [start(0, "both_killed")]
    assert resumed.wait() == 2
    check(cohort, "both_killed")
