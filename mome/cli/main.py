"""The `mome` command: finds the subcommand, runs it, turns errors into messages and exit codes.

Exit codes: 0 done, 1 our fault or a disk that is full, 2 bad input. Nothing heavy is imported here.
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Callable

from mome import __version__
from mome.cli.parser import Parser
from mome.errors import InputError, OutputError

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
    """Runs a command; prints errors in at most three lines on stderr."""
    try:
        return run() or 0
    except InputError as error:
        if debug:
            raise
        print(_red(str(error)), file=sys.stderr)
        return 2
    except SystemExit as stop:  # argparse's --help
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
        print("  this is our fault, not yours; run again with --debug and report the traceback", file=sys.stderr)
        return 1


def _dispatch(arguments: list[str]) -> int | None:
    name = arguments[0]
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, list(COMMANDS), n=1)
        raise InputError(
            f"unknown command '{name}'" + (f", did you mean '{close[0]}'?" if close else ""),
            hint="commands: " + ", ".join(COMMANDS),
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
    return f"\033[31m{text}\033[0m" if sys.stderr.isatty() and "NO_COLOR" not in os.environ else text


if __name__ == "__main__":
    sys.exit(main())
