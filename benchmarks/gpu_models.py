"""Measures whole models on one GPU: `python benchmarks/gpu_models.py --out DIR --minutes M`.

- `train`: a training step in bfloat16 at 96³ voxels, batch 2, 32 prompts, of `mome_ct_base` and its sparse variant,
  whose experts are computed by our kernels, `F.grouped_mm` or a loop. Losses and gradients are compared first. The
  experts of `mome_ct_base` are single linear layers, so there is one way only. A forward pass in eval is beside it.
- `segment`: a synthetic CT of 512 × 512 × 300 voxels with 32 prompts by `Segmenter` and by MONAI's sliding window.

Without MONAI, `mome_ct_vit3d_small` takes the place of the other presets, and MONAI's sides are marked absent. Results
are written one by one to DIR/gpu_models_<device>.json; another call with the same folder adds what is missing. Where a
step makes the device unusable, the script begins again without it. `python benchmarks/gpu_models_table.py` writes
results/gpu_models.md. `--rehearse` runs all steps on the CPU at tiny sizes, to test the script.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

_HERE = Path(__file__).resolve().parent
_KERNELS = _HERE.parent / "kernels"
sys.path[:0] = [str(_HERE), str(_HERE.parent), str(_KERNELS / "benchmarks"), str(_KERNELS / "torch-ext")]

from gpu_segmentation import MONAI, SIDES, Scan, synthetic_ct  # noqa: E402
from gpu_training import (  # noqa: E402
    WAYS,
    Setup,
    disagreement,
    experts_computed_by,
    inference_times,
    training_times,
)
from results import Results, minutes, opened  # noqa: E402

Step = tuple[str, Callable[[dict[str, Any]], None]]


class Measurements:
    """The steps; a step fills the dictionary that it is given.

    Args:
        device: `cuda` or `cpu`.
        rehearse: Take tiny sizes.
    """

    def __init__(self, device: str, rehearse: bool) -> None:
        self.device, self.rehearse = device, rehearse
        self.has_monai = importlib.util.find_spec("monai") is not None
        self._setup: tuple[str, Setup] | None = None
        self._scan: Scan | None = None
        self._expected: dict[str, dict[str, float]] = {}

    def steps(self) -> list[Step]:
        """All steps, the most important ones first, and what may make a device unusable last."""
        sparse = ["mome_ct_base_sparse"] if self.has_monai and not self.rehearse else ["mome_ct_vit3d_small"]
        dense = ["mome_ct_base"] if self.has_monai and not self.rehearse else []
        train = lambda way, names: [(f"train {n} {way}", self._training(n, way)) for n in names]  # noqa: E731
        segment = [(f"segment {side}", self._segmentation(side)) for side in SIDES]
        again = [(f"segment {side} again", self._segmentation(side)) for side in SIDES]
        return [
            *train("kernels", sparse), *train("loop", sparse), *segment, *train("linear", dense),
            *train("grouped_mm", sparse), *again,
            *[(f"train {n} kernels cudnn.benchmark", self._training(n, "kernels", tuned=True)) for n in sparse],
        ]  # fmt: skip

    def _training(self, preset: str, way: str, *, tuned: bool = False) -> Callable[[dict[str, Any]], None]:
        def run(result: dict[str, Any]) -> None:
            setup = self._setup_of(preset)
            result |= {"patch": list(setup.batch["volume"].shape[2:]), "batch": len(setup.batch["volume"])}
            result["prompts"] = len(setup.batch["text_PT"])
            computed = "kernels" if way == "linear" else way
            # The weights change with every step, so both losses are those of this moment.
            with experts_computed_by("loop" if way != "linear" else "kernels"):
                expected = setup.loss_and_gradient()
                result |= setup.tokens()
            with experts_computed_by(computed), torch.backends.cudnn.flags(benchmark=tuned, allow_tf32=True):
                found = setup.loss_and_gradient()
                result |= {"agreement": {"found": found, "loop": expected}}
                wrong = disagreement(found, expected)
                if wrong:
                    result |= {"wrong": True, "problem": wrong}
                    return
                warm_up, steps, seconds = (1, 1, 1.0) if self.rehearse else (3, 12, 3.0)
                result["training"] = training_times(setup, warm_up, steps, seconds)
                if result["tokens"]:
                    result["tokens_per_second"] = 1e3 * result["tokens"] / result["training"]["step_ms"]
                result["inference"] = inference_times(setup, *((1, 1) if self.rehearse else (2, 8)))

        return run

    def _setup_of(self, preset: str) -> Setup:
        """The model of a preset, which is kept until another one is asked."""
        if self._setup is None or self._setup[0] != preset:
            self._setup = None
            side, batch, prompts = (32, 1, 4) if self.rehearse else (96, 2, 32)
            self._setup = preset, Setup.of(preset, self.device, side, batch, prompts)
        return self._setup[1]

    def _segmentation(self, side: str) -> Callable[[dict[str, Any]], None]:
        def run(result: dict[str, Any]) -> None:
            self._setup = None  # its memory is free for the scan
            if side in MONAI and not self.has_monai:
                raise ModuleNotFoundError("MONAI is absent")
            if self._scan is None:
                shape = (64, 56, 48) if self.rehearse else (512, 512, 300)
                spacing = (4.0, 4.0, 5.0) if self.rehearse else (0.8, 0.8, 1.5)
                self._scan = Scan(synthetic_ct(shape, spacing), self.device)
            result |= {"voxels": list(self._scan.volume.shape), "spacing": list(self._scan.volume.spacing)}
            result |= self._scan.run(side)

        return run


def driver() -> str | None:
    """The version of the GPU's driver."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return None


def is_usable(device: str) -> bool:
    """Whether the device still computes; an illegal access ends that for the rest of the process."""
    try:
        if device == "cuda":
            torch.cuda.synchronize()
            gc.collect()
            torch.cuda.empty_cache()
    except RuntimeError:
        return False
    return True


def first_line(error: BaseException) -> str:
    """The first line of an error's message, with its type."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"[:300]


def measure(results: Results, measurements: Measurements, stop_at: float, starts: list[str]) -> bool:
    """Runs the steps with such a name that have no result yet; returns False where the device became unusable."""
    for name, step in measurements.steps():
        if name in results or not name.startswith(tuple(starts)):
            continue
        if time.time() > stop_at:
            print(f"no time is left for {name}")
            return True
        result: dict[str, Any] = {}
        began = time.perf_counter()
        try:
            step(result)
        except Exception as error:  # the other steps go on
            result["problem"] = first_line(error)
        usable = is_usable(measurements.device)
        result |= {"took_s": time.perf_counter() - began, **({} if usable else {"fatal": True})}
        if not usable and "problem" not in result:
            result["problem"] = "the device became unusable"
        results.add(name, result)
        print(f"{name}: {result.get('problem', 'done')} ({result['took_s']:.1f} s)", flush=True)
        if not usable:
            return False
    return True


def main() -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--minutes", type=minutes, default=1.5, help="no step begins after these")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes on the CPU")
    parser.add_argument("--steps", nargs="+", default=[""], metavar="START", help="only steps whose name starts so")
    parser.add_argument("--stop-at", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    stop_at = options.stop_at or time.time() + 60 * options.minutes
    results = opened("gpu_models.py", options, prefix="gpu_models_")
    if results is None:
        return 2
    device = "cpu" if options.rehearse else "cuda"
    measurements = Measurements(device, options.rehearse)
    monai = None
    if measurements.has_monai:
        from importlib.metadata import PackageNotFoundError, version

        try:
            monai = version("monai")
        except PackageNotFoundError:
            monai = "unknown"
    results.data |= {"driver": driver(), "monai": monai or "absent", "ways": list(WAYS)}
    if not measure(results, measurements, stop_at, options.steps):
        script = [sys.executable, str(Path(__file__).resolve()), "--out", str(options.out), "--stop-at", str(stop_at)]
        script += ["--steps", *options.steps]
        os.execv(sys.executable, [*script, *(["--rehearse"] if options.rehearse else [])])
    return 0


if __name__ == "__main__":
    sys.exit(main())
