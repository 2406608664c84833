"""What the tests of damaged, stopped and concurrent runs share."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
from stand_in_models import Threshold

from mome.cli.train import main as train_main
from mome.inference import Segmenter
from mome.processing import MoMEProcessor

SHORT = ("train.steps=4", "train.checkpoint_every=1", "train.validate_every=0", "train.log_every=0")


def train_in(folder: Path, capsys, code: int, words: str, *overrides: str) -> str:
    """Runs `examples/train.py` in this process, checks its code and its message, and returns what it printed."""
    arguments = ["--config", str(folder / "run.yaml"), f"train.out={folder / 'r'}", *overrides]
    assert train_main(arguments) == code
    captured = capsys.readouterr()
    if code:
        lines = captured.err.strip().splitlines()
        assert 1 <= len(lines) <= 3 and "Traceback" not in captured.err and "bug in mome" not in captured.err, captured
    printed = captured.out + captured.err
    assert words in " ".join(printed.split()), printed
    return printed


def ended_process(path: Path) -> Path:
    """A temporary path of a process that has ended."""
    code = (
        "from mome.temporary_names import temporary_path; from pathlib import Path\n"
        f"print(temporary_path(Path({str(path)!r})))"
    )
    return Path(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip())


def ct(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    hu = np.random.default_rng(len(path.name)).normal(0, 60, (8, 8, 8)).astype(np.int16)
    nib.save(nib.Nifti1Image(hu, np.diag([2.0, 2, 2, 1])), path)
    return path


def segmenter() -> Segmenter:
    return Segmenter(Threshold(0.5), MoMEProcessor(spacing=[2, 2, 2], hu_window=[-100, 100]))
