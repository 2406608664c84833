"""All that is still open on a GPU, by one command: `python kernels/benchmarks/session.py --out DIR --minutes M`.

The most important parts come first. Parts of one stage run at the same time, since none of them is timed; timings run
alone. A part that fails, or that has no time left, does not hold back the others. Each part writes its results as soon
as they are known, and its messages to `DIR/<part>.log`; a later call with the same folder continues. `--rehearse` runs
the parts on the CPU with tiny shapes, to test the script.
"""

from __future__ import annotations

import argparse
import glob
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

_HERE = Path(__file__).resolve().parent
_ROOT = _HERE.parent.parent
sys.path.insert(0, str(_HERE))

from results import minutes, usable  # noqa: E402

_GRACE = 20.0  # seconds after its minutes in which a part may end by itself
# where the tools of CUDA lie when they are not in PATH
_TOOLS = ("/usr/local/cuda*/bin", "/usr/local/cuda*/compute-sanitizer", "/opt/nvidia/*/bin")


@dataclass(frozen=True)
class Part:
    """A script or pytest with its arguments.

    Attributes:
        name: The name of its log.
        script: The path of a script from the root of the repository; empty for pytest.
        arguments: Its arguments but for `--out` and `--minutes`.
        minutes: The most minutes that it takes.
    """

    name: str
    script: str
    arguments: tuple[str, ...]
    minutes: float

    def command(self, out: Path, most: float, rehearse: bool) -> list[str]:
        """Its command line, for a folder of results and a number of minutes."""
        if not self.script:
            pytest = [sys.executable, "-m", "pytest", "-q", "-m", "", "-p", "no:cacheprovider"]
            return [*pytest, *(("--collect-only", "-n", "0") if rehearse else ()), *self.arguments]
        command = [sys.executable, str(_ROOT / self.script), "--out", str(out), "--minutes", f"{most:.2f}"]
        return [*command, *self.arguments, *(("--rehearse",) if rehearse else ())]


def layers(*names: str) -> tuple[str, ...]:
    """The steps of `run.py` that time these shapes."""
    return ("ceilings", *(f"layer {name} " for name in names))


def stages() -> list[list[Part]]:
    """The parts that run at the same time, the most important first."""
    run, tests = "kernels/benchmarks/run.py", ("tests/test_gpu.py", "tests/test_gpu_zoo.py")
    models = "benchmarks/gpu_models.py"
    # without MONAI, which the preset of the encoder needs, a vision transformer takes its place
    trainings = ("mome_ct_base_sparse kernels", "mome_ct_vit3d_small grouped_mm")
    sanitize = "kernels/benchmarks/sanitize.py"
    return [
        [
            # the newest checks come first: of TMA, and of widths above 128, whose gradients have changed
            Part("checks", "kernels/benchmarks/checks.py", ("--workers", "4"), 3.0),
            Part("tests", "", ("-n", "4", "--timeout", "100", *tests), 3.0),
            Part("sanitizer", sanitize, ("--workers", "6", "--tools", "memcheck"), 4.0),
        ],
        [Part("models", models, ("--steps", *(f"train {step}" for step in trainings)), 1.0)],
        [Part("wide_shapes", run, ("--steps", *layers("L1", "L2", "L3", "V10", "V12", "V3")), 1.5)],
        [
            Part("more_checks", "kernels/benchmarks/checks.py", ("--workers", "8"), 2.0),
            Part("races", sanitize, ("--workers", "5", "--tools", "racecheck"), 2.0),
        ],
        [Part("other_shapes", run, ("--steps", *layers("V13", "L5", "V8", "V9", "V15", "V4")), 1.0)],
        [Part("segmentations", models, ("--steps", "segment"), 1.0)],
    ]


def environment() -> dict[str, str]:
    """The variables of the parts; packages that the caller's `PYTHONPATH` names stay importable."""
    folders = [_ROOT, _ROOT / "kernels" / "torch-ext", _ROOT / "tests"]
    paths = [*map(str, folders), *filter(None, [os.environ.get("PYTHONPATH")])]
    tools = [path for pattern in _TOOLS for path in sorted(glob.glob(pattern))]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "PATH": os.pathsep.join([os.environ.get("PATH", ""), *tools]),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
        "PYTHONWARNINGS": "ignore",
    }


def finish(part: Part, process: subprocess.Popen[bytes], deadline: float) -> str:
    """Waits for a part until a deadline, after which it is ended; returns what became of it."""
    try:
        return f"ended with {process.wait(timeout=max(0.1, deadline - time.monotonic()))}"
    except subprocess.TimeoutExpired:
        process.terminate()
    try:
        process.wait(timeout=5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    return "was stopped, since its time was over"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results; may hold an earlier call's")
    parser.add_argument("--minutes", type=minutes, default=9.5, help="no part goes on after this time")
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes on the CPU, to try the script itself")
    options = parser.parse_args(arguments)
    if why := usable(options.out):
        print(f"session.py: {why}", file=sys.stderr)
        return 2
    begin = time.monotonic()
    end = begin + 60 * options.minutes
    for stage in stages():
        left = (end - time.monotonic()) / 60
        if left < 0.2:
            print(f"no time is left for {', '.join(part.name for part in stage)}", flush=True)
            continue
        running = []
        for part in stage:
            most = min(part.minutes, left)
            with (options.out / f"{part.name}.log").open("ab") as log:
                command = part.command(options.out, most, options.rehearse)
                process = subprocess.Popen(
                    command, cwd=_ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment()
                )
            running.append((part, process, time.monotonic() + 60 * most + _GRACE))
        for part, process, deadline in running:
            how = finish(part, process, min(deadline, end + _GRACE))
            print(f"[{time.monotonic() - begin:4.0f} s] {part.name} {how}", flush=True)
            for line in (options.out / f"{part.name}.log").read_text(errors="replace").splitlines()[-4:]:
                print(f"    {line[:200]}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
