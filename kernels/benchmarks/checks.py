"""Checks every op on one GPU: `python kernels/benchmarks/checks.py --out DIR --minutes M`.

The checks are spread over processes, since most of the time is the compilation of kernels. A process that dies fails
its check, and another one takes over. Each verdict is written as soon as it is known, and another call with the same
folder continues. `--rehearse` runs the checks on the CPU with tiny shapes, to test the script; with
`TRITON_INTERPRET=1` that runs the kernels.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

_HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(_HERE), str(_HERE.parent / "torch-ext")]

from results import Results, minutes, opened  # noqa: E402

LONGEST = 90.0  # seconds after which a check is given up
_ENVIRONMENT = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # PyTorch asks for it where results have to be deterministic
    "OMP_NUM_THREADS": "1",
    "TORCHINDUCTOR_COMPILE_THREADS": "1",  # otherwise each process starts processes of its own
}


def work(device: str, tokens: int) -> int:
    """A process that reads names from its input and writes one line of JSON per verdict."""
    verdicts = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print does not mix with the verdicts
    import torch
    from check_cases import checks

    torch.set_num_threads(1)
    found = checks(device, tokens)
    for line in sys.stdin:
        begin = time.monotonic()
        try:
            verdict = found[line.strip()].verdict()
            if device == "cuda":
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
        except Exception as problem:
            said = " ".join(str(problem).split())[:600] or repr(problem)[:600]
            verdict = {"ok": False, "problem": f"{type(problem).__name__}: {said}"}
            try:
                if device == "cuda":
                    torch.cuda.synchronize()
                    torch.cuda.empty_cache()
            except Exception:  # the device is unusable for the rest of this process
                verdict["lost"] = True
        verdict["seconds"] = round(time.monotonic() - begin, 2)
        print(json.dumps(verdict), file=verdicts, flush=True)
        if verdict.get("lost"):
            return 1
    return 0


class Worker:
    """A process of `work`, which is started again after it died.

    Args:
        arguments: Its command line.
        errors: The file that its messages are added to.
    """

    def __init__(self, arguments: list[str], errors: Path) -> None:
        self.arguments, self.errors = arguments, errors
        self.process: subprocess.Popen[str] | None = None

    def verdict(self, name: str, seconds: float) -> dict[str, Any]:
        """The verdict of a check; the process is ended where there is none after this many seconds."""
        if self.process is None or self.process.poll() is not None:
            with self.errors.open("a") as errors:
                self.process = subprocess.Popen(
                    self.arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
                    env={**_ENVIRONMENT, **os.environ},
                )  # fmt: skip
        process = self.process
        timer = threading.Timer(seconds, process.kill)
        timer.start()
        try:
            process.stdin.write(name + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except OSError:
            line = ""
        expired = not timer.is_alive()
        timer.cancel()
        if line:
            verdict = json.loads(line)
            if verdict.pop("lost", False):
                self.end()
            return verdict
        process.kill()
        why = f"no verdict after {seconds:.0f} s" if expired else f"the process ended with {process.wait()}"
        return {"ok": False, "problem": why}

    def end(self) -> None:
        """Ends the process."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()


def run(lanes: list[list[str]], workers: list[Worker], results: Results, deadline: float) -> list[str]:
    """Runs lanes of checks, the first first; returns the names for which no time was left."""
    waiting: queue.SimpleQueue[list[str]] = queue.SimpleQueue()
    for lane in lanes:
        waiting.put(lane)
    lock, left = threading.Lock(), []

    def serve(worker: Worker) -> None:
        while True:
            try:
                lane = waiting.get_nowait()
            except queue.Empty:
                worker.end()
                return
            for name in lane:
                seconds = min(LONGEST, deadline - time.monotonic())
                if seconds <= 1:
                    with lock:
                        left.append(name)
                    continue
                verdict = worker.verdict(name, seconds)
                with lock:
                    results.add(name, verdict)
                    said = "ok" if verdict.get("ok") else f"WRONG: {json.dumps(verdict)}"
                    print(f"{name:64} {verdict.get('seconds', 0):6.1f} s  {verdict.get('skipped', said)}", flush=True)

    threads = [threading.Thread(target=serve, args=(worker,)) for worker in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return left


def lanes_of(names: dict[str, Any], results: Results) -> list[list[str]]:
    """The checks without a verdict: those of a lane together, which come first, and the others alone."""
    shared: dict[str, list[str]] = {}
    alone = []
    for name, check in names.items():
        if name not in results:
            if check.lane:
                shared.setdefault(check.lane, []).append(name)
            else:
                alone.append([name])
    return [*shared.values(), *alone]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--out", type=Path, required=True, help="folder of the JSON; may hold an earlier call's")
    parser.add_argument("--minutes", type=minutes, default=3.0, help="no check goes on after this time")
    parser.add_argument("--workers", type=int, default=max(1, min(14, (os.cpu_count() or 4) - 2)))
    parser.add_argument("--only", default="", help="part of the names of the checks that are wanted")
    parser.add_argument("--tokens", type=int, help="number of tokens of most checks")
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes on the CPU, to try the script itself")
    parser.add_argument("--list", action="store_true", help="print the names of the checks")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    begin = time.monotonic()
    device, tokens = ("cpu", options.tokens or 40) if options.rehearse else ("cuda", options.tokens or 3000)
    if options.work:
        return work(device, tokens)
    from check_cases import checks

    names = {name: check for name, check in checks(device, tokens).items() if options.only in name}
    if options.list:
        print("\n".join(names))
        return 0
    results = opened("checks.py", options, "checks_")
    if results is None:
        return 2
    command = [sys.executable, str(Path(__file__).resolve()), "--work", "--out", str(options.out)]
    command += ["--tokens", str(tokens), *(["--rehearse"] if options.rehearse else [])]
    lanes = lanes_of(names, results)
    count = max(1, min(options.workers, len(lanes)))
    workers = [Worker(command, options.out / f"checks_{i}.log") for i in range(count)]
    left = run(lanes, workers, results, begin + 60 * options.minutes)
    verdicts = {name: results.data["steps"].get(name, {}) for name in names if name not in left}
    slowest = sorted(verdicts, key=lambda name: -verdicts[name].get("seconds", 0))[:10]
    print("slowest: " + "; ".join(f"{name} {verdicts[name].get('seconds', 0)} s" for name in slowest))
    wrong = [name for name, verdict in verdicts.items() if not verdict.get("ok")]
    print(f"{results.path}: {len(verdicts)} checks in {time.monotonic() - begin:.0f} s, {len(wrong)} wrong, "
          f"{len(left)} left for another call")  # fmt: skip
    for name in wrong:
        print(f"WRONG {name}: {json.dumps(verdicts[name])}")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
