"""The `mome` command: finds the subcommand, runs it, and turns errors into messages and exit codes.

Exit codes: 0 for success, 1 for a bug or a failed write such as a full disk, 2 for bad input, 130 for Ctrl-C. This
module imports no torch, so that help and errors appear at once.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable

from mome import __version__
from mome.cli.parser import Parser
from mome.errors import InputError, OutputError, did_you_mean

COMMANDS = {
    "demo": "segment a synthetic or given CT with the bundled model, and show it",
    "segment": "segment scans by text prompts",
    "train": "train a model from a YAML configuration",
    "evaluate": "compare masks with a reference",
    "list": "list models, parts and labels",
    "info": "describe a model or a scan",
}


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help())
        return 0 if arguments else 2
    if arguments[0] in ("-V", "--version"):
        print(f"mome {__version__}")
        return 0
    return guarded(lambda: _dispatch(arguments), debug="--debug" in arguments)


def guarded(run: Callable[[], int | None], *, debug: bool = False) -> int:
    """Runs a command and prints its errors on stderr, in at most three lines.

    Args:
        run: The command; returns an exit code, or None for 0.
        debug: Raises errors instead of printing them.

    Returns:
        The exit code.
    """
    try:
        return run() or 0
    except InputError as error:
        if debug:
            raise
        print(_red(str(error)), file=sys.stderr)
        return 2
    except SystemExit as stop:  # raised by argparse for --help
        return int(stop.code or 0)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except OutputError as error:
        if debug:
            raise
        print(_red(str(error)), file=sys.stderr)
        return 1
    except OSError as error:
        if debug:
            raise
        what = f"{error.strerror or error}" + (f"\n  in: {error.filename}" if error.filename else "")
        print(_red(what), file=sys.stderr)
        return 1
    except Exception as error:
        if debug:
            raise
        first = str(error).strip().splitlines()[0][:200] if str(error).strip() else ""
        print(_red(f"{type(error).__name__}: {first}"), file=sys.stderr)
        print("  this is a bug in mome: run again with --debug and report the traceback", file=sys.stderr)
        return 1


def _dispatch(arguments: list[str]) -> int | None:
    """Imports the module of a subcommand and runs it; only this module's imports are paid for."""
    name = arguments[0]
    if name not in COMMANDS:
        raise InputError(
            f"unknown command '{name}'{did_you_mean(name, COMMANDS)}", hint="commands: " + ", ".join(COMMANDS)
        )
    module = importlib.import_module(f"mome.cli.{'listing' if name == 'list' else name}")
    parser = Parser(prog=f"mome {name}", description=COMMANDS[name])
    module.add_arguments(parser)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return module.run(parser.parse_args(arguments[1:]))


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


def _red(text: str) -> str:
    """Red text, if stderr is a terminal and the environment variable NO_COLOR is not set."""
    return f"\033[31m{text}\033[0m" if sys.stderr.isatty() and "NO_COLOR" not in os.environ else text


if __name__ == "__main__":
    sys.exit(main())
