"""Trains seven networks by one recipe on the same patches, two seeds each, and compares them on OpenKBP.

    python benchmarks/neck_study.py arm swiglu --seed 0          # one training; the same command resumes it
    python benchmarks/neck_study.py all --minutes 60             # all of them at once, as processes that share a device
    python benchmarks/neck_study.py scores                       # whole validation volumes, then the comparison

After the first steps, `all` chooses one number of steps that every training reaches before the deadline, at most that
of the recipe. A training that is not done at the deadline saves what it has. `--cached` names the folder `cache` of
another machine, and `--texts` a file of `stored_texts.py`: neither scans nor a text tower are needed then.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from neck_names import ARMS, CANDIDATES, SEEDS

PATCH = [64, 64, 64]
_ROUNDED_TO = 50  # steps
_SKIPPED = 10  # first steps, in which libraries are loaded and convolutions are tuned
_SAFETY = 0.85  # share of the time left that trainings are planned to take


def train_arm(args: argparse.Namespace) -> None:
    """Trains one arm."""
    import torch
    from neck_arms import recipe, segresnet
    from stored_texts import use_stored_texts
    from study_training import Limits, fit, open_dataset

    from mome.training.setup import build_model

    if torch.cuda.is_available():
        torch.set_num_threads(1)
    if args.texts:
        use_stored_texts(args.texts)
    run = recipe(args.arm, args.seed, args.out, args.cached, args.overrides)
    dataset, processor = open_dataset(run, run.model.get("patch_size", PATCH))
    model = segresnet(run.labels, args.seed) if args.arm == "segresnet" else build_model(run)[0]
    limits = Limits(args.steps_file, args.deadline)
    patches = args.patches / str(args.seed) if args.patches else None
    fit(run, model, dataset, processor, patches=patches, limits=limits, kernels_file=args.kernels_file)


def make_patches(args: argparse.Namespace) -> None:
    """Makes one worker's share of the patches of one seed."""
    import torch
    from neck_arms import recipe
    from stored_patches import StoredPatches
    from study_training import open_dataset

    torch.set_num_threads(1)
    seed, share = SEEDS[args.worker % len(SEEDS)], args.worker // len(SEEDS)
    run = recipe("swiglu", seed, args.out, args.cached, args.overrides)
    dataset, _ = open_dataset(run, run.model.get("patch_size", PATCH))
    store = StoredPatches(args.patches / str(seed), dataset)
    store.write(share, max(1, args.workers // len(SEEDS)))


def train_all(args: argparse.Namespace) -> None:
    """Starts all trainings and the makers of their patches, chooses the number of steps, and stops at the deadline."""
    args.out.mkdir(parents=True, exist_ok=True)
    deadline = time.time() + 60 * args.minutes
    steps_file, patches = args.out / "steps.txt", args.out / "patches"
    shared = ["--out", str(args.out), "--patches", str(patches)]
    for name in ("cached", "texts", "kernels_file"):
        if getattr(args, name):
            shared += ["--" + name.replace("_", "-"), str(getattr(args, name))]
    here = [sys.executable, str(Path(__file__).resolve())]

    def start(name: str, *command: str) -> subprocess.Popen[bytes]:
        with (args.out / f"{name}.log").open("ab") as log:
            return subprocess.Popen([*here, *command, *shared, "--set", *args.overrides], stdout=log, stderr=log)

    workers = [
        start(f"patches_{i}", "patches", "--worker", str(i), "--workers", str(args.workers))
        for i in range(args.workers)
    ]
    limits = ("--steps-file", str(steps_file), "--deadline", str(deadline))
    running = {
        f"{arm}_{seed}": start(f"{arm}_{seed}", "arm", arm, "--seed", str(seed), *limits)
        for seed in SEEDS
        for arm in args.arms
    }
    began = time.time()
    while running and time.time() < deadline + args.grace:
        time.sleep(0.5)
        for name, process in list(running.items()):
            if process.poll() is not None:
                del running[name]
                print(f"{name}: exit code {process.poll()}, {deadline - time.time():.0f} s left", flush=True)
        if not steps_file.exists() and time.time() > began + args.decide:
            choose_steps(args.out, list(running), steps_file, deadline)
    for process in (*running.values(), *workers):
        process.terminate()


def choose_steps(out: Path, names: list[str], steps_file: Path, deadline: float) -> None:
    """Writes the number of steps that all trainings reach before the deadline, once the speed of one is known."""
    reachable: dict[str, int] = {}
    for name in names:
        path = out / name / "losses.jsonl"
        text = path.read_text().splitlines() if path.exists() else []
        lines = [line for line in (json.loads(row) for row in text if row.endswith("}")) if line["step"] >= _SKIPPED]
        if len(lines) > 1:
            speed = (lines[-1]["step"] - lines[0]["step"]) / (lines[-1]["time"] - lines[0]["time"])
            reachable[name] = int(lines[-1]["step"] + _SAFETY * (deadline - time.time()) * speed)
    if not reachable:
        return
    steps = max(_ROUNDED_TO, min(reachable.values()) // _ROUNDED_TO * _ROUNDED_TO)
    temporary = steps_file.with_suffix(".part")
    temporary.write_text(str(steps))
    os.replace(temporary, steps_file)
    print(f"steps of every training: at most {steps}; reachable {reachable}", flush=True)


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, function in (("arm", train_arm), ("patches", make_patches), ("all", train_all), ("scores", None)):
        command = commands.add_parser(name)
        command.set_defaults(function=function)
        command.add_argument("--out", type=Path, default=Path("runs/neck_study"))
        if name == "scores":
            continue
        command.add_argument("--cached", type=Path, help="folder of the caches of another machine")
        command.add_argument("--texts", type=Path, help="file of stored_texts.py")
        command.add_argument("--patches", type=Path, help="folder of patches that other processes make")
        command.add_argument("--kernels-file", type=Path, help="torch code runs until this file exists")
        command.add_argument("--set", dest="overrides", nargs="*", default=[], metavar="KEY=VALUE")
        if name == "arm":
            command.add_argument("arm", choices=[*ARMS, *CANDIDATES])
            command.add_argument("--seed", type=int, default=0)
            command.add_argument("--steps-file", type=Path)
            command.add_argument("--deadline", type=float, default=float("inf"), help="Unix time")
        if name == "patches":
            command.add_argument("--worker", type=int, default=0)
            command.add_argument("--workers", type=int, default=1)
        if name == "all":
            command.add_argument("--minutes", type=float, default=60)
            command.add_argument("--decide", type=float, default=60, help="seconds after which the steps are chosen")
            command.add_argument("--workers", type=int, default=4, help="processes that make patches, two or more")
            command.add_argument("--grace", type=float, default=8, help="seconds to save in")
            command.add_argument("--arms", nargs="*", default=list(ARMS))
    args = parser.parse_args()
    if args.command == "scores":
        from study_scores import write_scores

        write_scores(args.out)
        return
    args.function(args)


if __name__ == "__main__":
    main()
