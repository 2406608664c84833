"""`mome checksum`: compares a checkpoint with its checksums, or writes them anew for a change that is meant."""

from __future__ import annotations

import argparse
from pathlib import Path

from mome.cli.parser import given_path
from mome.printable import printable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command."""
    parser.add_argument("folder", type=given_path, help="a folder with a checkpoint")
    parser.add_argument("--write", action="store_true", help="accept the files as they are")


def run(args: argparse.Namespace) -> int:
    """Runs the command and returns its exit code.

    Raises:
        InputError: The folder holds no checkpoint, a file cannot be read, or, without `--write`, one was changed.
        OutputError: The checksums cannot be written.
    """
    folder = Path(args.folder)
    from mome.hub import locate

    locate(f"local-dir:{folder}")  # refuses a folder without a model
    from mome.cli.quiet import quiet_libraries

    quiet_libraries()
    from mome.changed_files import changes_of_folder, lacks_labels, write_checksums
    from mome.checksums import changed_file
    from mome.loading import errors_for_people

    with errors_for_people(folder):
        changes = changes_of_folder(folder)
        if args.write:
            write_checksums(folder)
    if args.write:
        for change in changes or ():
            print(printable(f"accepted: {change}"))
        print(printable(f"wrote the checksums of {folder}"))
        return 0
    if changes:
        raise changed_file(changes, folder)
    print(printable(f"{folder} has no checksums" if changes is None else f"{folder} is as it was saved"))
    if lacks_labels(folder):
        print("note: labels.json is missing; models do not read it, other programs may, and --write makes it anew")
    return 0
