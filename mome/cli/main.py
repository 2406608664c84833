"""The `mome` command: finds the subcommand and runs it. `mome.cli.exit_codes` has the exit codes.

This module imports no torch, so that help and errors appear at once.
"""

from __future__ import annotations

import importlib
import sys

from mome import __version__
from mome.cli.exit_codes import guarded
from mome.cli.parser import Parser
from mome.errors import InputError, did_you_mean

COMMANDS = {
    "demo": "segment a synthetic or given CT with the bundled model, and show it",
    "segment": "segment scans by text prompts",
    "data": "check folders of training cases, prepare a training, list data sets",
    "train": "train a model from a YAML configuration",
    "evaluate": "compare masks with a reference",
    "serve": "segment uploaded scans over HTTP, with a page to look at the masks",
    "dicomweb": "segment a series of a DICOMweb archive, and store the result there",
    "inspect": "show which scale and which expert decide where in a scan",
    "convert": "turn published weights of other projects into a checkpoint",
    "checksum": "show what was changed in a checkpoint after it was saved, or accept it",
    "embed": "add labels to a model, or store the embeddings of labels in a file",
    "list": "list models, parts and labels",
    "info": "describe a model or a scan",
}


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    return guarded(lambda: _dispatch(arguments), debug="--debug" in arguments)


def _dispatch(arguments: list[str]) -> int | None:
    """Imports the module of a subcommand and runs it; only this module's imports are paid for."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help())
        return 0 if arguments else 2
    name = arguments[0]
    if name in ("-V", "--version"):
        print(f"mome {__version__}")
        return 0
    if name not in COMMANDS:
        raise InputError(
            f"unknown command '{name}'{did_you_mean(name, COMMANDS)}", hint="commands: " + ", ".join(COMMANDS)
        )
    module = importlib.import_module(f"mome.cli.{'listing' if name == 'list' else name}")
    parser = Parser(prog=f"mome {name}", description=COMMANDS[name])
    module.add_arguments(parser)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return module.run(parser.parse_intermixed_args(arguments[1:]))


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, text in COMMANDS.items()]
    return "\n".join(
        [
            f"mome {__version__}: text-prompted CT segmentation with mixtures of experts",
            "",
            "usage: mome COMMAND [options]          mome COMMAND --help",
            "",
            *lines,
            "",
            "Research software, not a medical device.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
