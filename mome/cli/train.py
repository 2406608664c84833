"""`mome train`, and what `examples/train.py` runs under `accelerate launch`."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from mome.cli.main import guarded
from mome.cli.parser import Parser


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("--config", type=Path, required=True, help="YAML file, see examples/configs")
    parser.add_argument("--restart", action="store_true", help="begin anew instead of resuming the run's folder")
    parser.add_argument("overrides", nargs="*", help='key=value, as in experts="swiglu(n=8)" or train.steps=100')
    parser.epilog = "settings (train.…): python -m pydoc mome.training.config.TrainConfig"


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    from mome.training.config import load_run_config

    config = load_run_config(args.config, args.overrides)
    from mome.cli.quiet import quiet_libraries
    from mome.training.loop import train

    quiet_libraries()
    folder = train(config, resume=not args.restart)
    if os.environ.get("RANK", "0") == "0":  # one of accelerate's processes speaks for all
        print(f"saved {folder}; every step's loss is in {folder.parent / 'log.jsonl'}")
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Entry of `examples/train.py`."""

    def go() -> int:
        parser = Parser(prog="train.py", description="Trains a model from a YAML configuration.")
        add_arguments(parser)
        parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
        return run(parser.parse_intermixed_args(arguments))

    import sys

    return guarded(go, debug="--debug" in (sys.argv if arguments is None else arguments))
