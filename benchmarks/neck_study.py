"""Trains seven networks by one recipe on the same patches, two seeds each, and compares them on OpenKBP.

    python benchmarks/neck_study.py arm swiglu --seed 0          # one training; the same command resumes it
    python benchmarks/neck_study.py all --minutes 60             # all of them at once, as processes that share a device
    python benchmarks/neck_study.py scores                       # whole validation volumes, then the comparison

`all` ends at its deadline: every training then saves its state and its model. After the first steps it chooses one
number of steps that every training can reach, at most that of the recipe. `--cached` names the folder `cache` of
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

from neck_names import ARMS, SEEDS

PATCH = [64, 64, 64]
_ROUNDED_TO = 50  # steps


def train_arm(args: argparse.Namespace) -> None:
    """Trains one arm."""
    import torch
    from neck_arms import recipe, segresnet
    from stored_texts import use_stored_texts
    from study_training import Limits, fit, open_dataset, use_torch_ops

    from mome.training.setup import build_model

    torch.set_num_threads(1 if torch.cuda.is_available() else 2)
    if args.texts:
        use_stored_texts(args.texts)
    if args.torch_ops:
        use_torch_ops()
    run = recipe(args.arm, args.seed, args.out, args.cached, args.overrides)
    dataset, processor = open_dataset(run, run.model.get("patch_size", PATCH))
    model = segresnet(run.labels, args.seed) if args.arm == "segresnet" else build_model(run)[0]
    limits = Limits(args.steps_file, args.deadline)
    patches = args.patches / str(args.seed) if args.patches else None
    fit(run, model, dataset, processor, patches=patches, limits=limits, wait_for=args.wait_for)


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
    store.write(share, max(1, args.workers // len(SEEDS)), len(dataset))


def train_all(args: argparse.Namespace) -> None:
    """Starts all trainings and the makers of their patches, chooses the number of steps, and stops at the deadline."""
    args.out.mkdir(parents=True, exist_ok=True)
    deadline = time.time() + 60 * args.minutes
    steps_file, patches = args.out / "steps.txt", args.out / "patches"
    shared = ["--out", str(args.out), "--patches", str(patches)]
    for name in ("cached", "texts", "wait_for"):
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

    def start_arm(arm: str, seed: int, *more: str) -> subprocess.Popen[bytes]:
        limits = ("--steps-file", str(steps_file), "--deadline", str(deadline))
        return start(f"{arm}_{seed}", "arm", arm, "--seed", str(seed), *limits, *more)

    running = {(arm, seed): start_arm(arm, seed) for seed in SEEDS for arm in args.arms}
    again: set[tuple[str, int]] = set()
    names = [f"{arm}_{seed}" for arm, seed in running]
    while running and time.time() < deadline + args.grace:
        time.sleep(1)
        for key, process in list(running.items()):
            code = process.poll()
            if code is None:
                continue
            del running[key]
            print(f"{key[0]}_{key[1]}: exit code {code}, {deadline - time.time():.0f} s left", flush=True)
            if code != 0 and key not in again and time.time() < deadline - 30:
                again.add(key)  # a second try without kernels
                running[key] = start_arm(*key, "--torch-ops")
        if not steps_file.exists():
            choose_steps(args, names, steps_file, deadline)
    for process in (*running.values(), *workers):
        process.terminate()
    for process in running.values():
        try:
            process.wait(args.grace)
        except subprocess.TimeoutExpired:
            process.kill()


def choose_steps(args: argparse.Namespace, names: list[str], steps_file: Path, deadline: float) -> None:
    """Writes the number of steps that all trainings reach before the deadline, once enough of them is known."""
    last: dict[str, tuple[int, float]] = {}  # name → step and seconds per step
    for name in names:
        path = args.out / name / "losses.jsonl"
        lines = (
            [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []
        )
        if len(lines) >= 6:
            rates = [line["seconds_per_step"] for line in lines[-3:]]
            last[name] = (lines[-1]["step"], sum(rates) / len(rates))
    late = time.time() > deadline - args.decide * 60
    if not last or (len(last) < len(names) and not late) or (min(s for s, _ in last.values()) < 50 and not late):
        return
    left = deadline - time.time() - 3
    reachable = {name: int(step + left / seconds) for name, (step, seconds) in last.items()}
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
        command.add_argument("--wait-for", type=Path, help="a file whose existence allows the use of the device")
        command.add_argument("--set", dest="overrides", nargs="*", default=[], metavar="KEY=VALUE")
        if name == "arm":
            command.add_argument("arm", choices=ARMS)
            command.add_argument("--seed", type=int, default=0)
            command.add_argument("--steps-file", type=Path)
            command.add_argument("--deadline", type=float, default=float("inf"), help="Unix time")
            command.add_argument("--torch-ops", action="store_true", help="no GPU kernels of mome")
        if name == "patches":
            command.add_argument("--worker", type=int, default=0)
            command.add_argument("--workers", type=int, default=1)
        if name == "all":
            command.add_argument("--minutes", type=float, default=60)
            command.add_argument("--decide", type=float, default=1e9, help="minutes before the end: choose the steps")
            command.add_argument("--workers", type=int, default=4, help="processes that make patches")
            command.add_argument("--grace", type=float, default=20, help="seconds to save in")
            command.add_argument("--arms", nargs="*", default=list(ARMS))
    args = parser.parse_args()
    if args.command == "scores":
        from study_scores import write_scores

        write_scores(args.out)
        return
    args.function(args)


if __name__ == "__main__":
    main()
