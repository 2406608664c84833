"""`mome train`. `examples/train.py` runs the same under `accelerate launch`."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from pathlib import Path

from mome.cli.exit_codes import guarded
from mome.cli.parser import Parser, given_path
from mome.errors import InputError
from mome.kept_memory import keep_freed_memory


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command."""
    parser.add_argument("--config", type=given_path, required=True, help="YAML file, see examples/configs")
    parser.add_argument("--restart", action="store_true", help="start again instead of resuming the run in its folder")
    parser.add_argument(
        "--profile", type=int, nargs="?", const=5, default=0, metavar="STEPS",
        help="record some steps (5) with torch's profiler, into the folder profile of the run",
    )  # fmt: skip
    parser.add_argument(
        "--find-batch", action="store_true", help="print the largest batch that fits the memory, and train nothing"
    )
    parser.add_argument("overrides", nargs="*", help='key=value, as in experts="swiglu(n=8)" or train.steps=100')
    parser.epilog = "settings (train.…): python -m pydoc mome.training.config.TrainConfig"


def run(args: argparse.Namespace) -> int:
    """Runs the command and returns its exit code.

    Raises:
        InputError: The configuration or the data cannot be used.
    """
    from mome.printable import printable
    from mome.training.config_file import load_run_config

    config = load_run_config(args.config, args.overrides)
    from mome.cli.quiet import quiet_libraries
    from mome.training.loop import train

    quiet_libraries()
    if args.profile < 0:
        raise InputError(f"--profile is a number of steps, got {args.profile}", hint="--profile 5")
    if args.find_batch:
        from mome.training.find_batch import find_batch_size

        print(find_batch_size(config))
        return 0
    import torch

    if config.train.cpu or not torch.cuda.is_available():
        keep_freed_memory()
    try:
        folder = train(config, resume=not args.restart, profile=args.profile)
    except KeyboardInterrupt:
        if _is_main_process():
            print(printable(_where_it_stopped(Path(config.train.out))), file=sys.stderr)
        raise
    if _is_main_process():
        print(printable(f"saved {folder}; every step's loss is in {folder.parent / 'log.jsonl'}"))
    return 0


def _is_main_process() -> bool:
    """Whether this process prints; of several that `accelerate launch` starts, only the first does."""
    return os.environ.get("RANK", "0") == "0"


def _where_it_stopped(out: Path) -> str:
    """Says what an interrupted run has saved, and how it goes on."""
    from mome.training.checkpoint import latest_checkpoint

    newest = None
    with contextlib.suppress(InputError):  # a folder that is no training state; the run has said so already
        newest = latest_checkpoint(out / "checkpoints")
    if newest is None:
        return "nothing was saved yet: the same command starts again; train.checkpoint_every=100 saves more often"
    return f"saved up to step {newest[1]} in {out / 'checkpoints'}: the same command goes on from there"


def main(arguments: list[str] | None = None) -> int:
    """Runs `examples/train.py` and returns its exit code.

    Args:
        arguments: The command line without the program's name; None takes that of this process.
    """
    given = sys.argv[1:] if arguments is None else arguments

    def parse_and_run() -> int:
        parser = Parser(prog="train.py", description="Trains a model from a YAML configuration.")
        add_arguments(parser)
        parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
        return run(parser.parse_intermixed_args(given))

    return guarded(parse_and_run, debug="--debug" in given)
