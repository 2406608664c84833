"""Runs a command in child processes that are killed at random times, then to its end.

    python tests/killed_runs.py KIND KILLS FOLDER

The libraries are imported once; every child is a fork of this process. KIND is `segment` or `train`. The folder holds
`scans/` and `model/`, or a recipe. The undisturbed run goes to `whole`, the killed one to `broken`.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # a fork of a process with threads could hang


def in_child(run: Callable[[], int], delay_s: float | None = None, until: Callable[[], bool] | None = None) -> int:
    """Runs a function in a fork and kills it after `delay_s` seconds; returns its exit code, -9 if it was killed.

    The time begins when the child begins, or once `until` is true.
    """
    child = os.fork()
    if child == 0:
        log = os.open(os.devnull, os.O_WRONLY)
        os.dup2(log, 1)
        os._exit(run())
    if delay_s is not None:
        deadline = None if until is not None else time.monotonic() + delay_s
        while deadline is None or time.monotonic() < deadline:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            if deadline is None and until is not None and until():
                deadline = time.monotonic() + delay_s
            time.sleep(0.001)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def command(kind: str, folder: Path, out: Path) -> Callable[[], int]:
    """The command that writes to `out`."""
    if kind == "segment":
        from mome.cli.main import main

        prompts = ["-p", "liver", "-p", "spleen"]
        arguments = ["segment", str(folder / "scans"), *prompts, "-m", str(folder / "model"), "-o", str(out)]
        return lambda: main([*arguments, "--resume", "--overlap", "0.5", "--threads", "1"])
    from mome.cli.train import main as train

    settings = ["train.steps=16", "train.checkpoint_every=2", "train.validate_every=0", f"train.out={out}"]
    return lambda: train(["--config", str(folder / "run.yaml"), *settings])


def main(kind: str, kills: int, folder: Path) -> None:
    import mome.inference
    import mome.training.loop  # noqa: F401

    rng = random.Random(kills)
    whole, broken = (command(kind, folder, folder / name) for name in ("whole", "broken"))
    began = time.monotonic()
    assert in_child(whole) == 0
    lasted = time.monotonic() - began
    killed = 0
    for _ in range(kills * 5):  # a run that ends before it is killed does not count; its results are removed
        code = in_child(broken, rng.uniform(0.02, lasted))
        assert code in (0, -signal.SIGKILL), code
        killed += code != 0
        if killed == kills:
            break
        if code == 0:
            import shutil

            shutil.rmtree(folder / "broken")
    assert killed == kills, f"{killed} of {kills}"
    assert in_child(broken) == 0


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
