"""`mome train`. `examples/train.py` runs the same under `accelerate launch`."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from mome.cli.exit_codes import guarded
from mome.cli.parser import Parser


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command."""
    parser.add_argument("--config", type=Path, required=True, help="YAML file, see examples/configs")
    parser.add_argument("--restart", action="store_true", help="start again instead of resuming the run in its folder")
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
    folder = train(config, resume=not args.restart)
    if os.environ.get("RANK", "0") == "0":  # of several processes, only the main one prints
        print(printable(f"saved {folder}; every step's loss is in {folder.parent / 'log.jsonl'}"))
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Runs `examples/train.py` and returns its exit code; unlike `mome train`, options may stand between overrides.

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
