"""`mome embed`: adds labels to a model, or writes a file of text rows."""

from __future__ import annotations

import argparse
from pathlib import Path

from mome.atomic import check_output_folder
from mome.cli.parser import given_path, output_folder
from mome.errors import InputError
from mome.printable import printable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command."""
    parser.add_argument("model", nargs="?", help="a model to add labels to (folder, bundled name, Hub id)")
    parser.add_argument("--add", nargs="+", default=[], metavar="LABEL", help="labels or free text to embed")
    parser.add_argument("-o", "--out", type=output_folder, help="folder for the model with the new labels")
    parser.add_argument("--bank", type=given_path, metavar="FILE", help="write text rows to this .safetensors file")
    parser.add_argument("--labels", help="with --bank: those of a data set (a name or a YAML file), or table")
    parser.add_argument(
        "--text-encoder", help="what embeds them, as in \"hf(model='…')\"; of a model, its own unless given"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the file or the model that is there")


def run(args: argparse.Namespace) -> int:
    """Runs the command and returns its exit code.

    Raises:
        InputError: Options that do not belong together, an output that is there, or labels that cannot be embedded.
        OutputError: The result cannot be written.
    """
    if (args.model is None) == (args.bank is None):
        raise InputError(
            "give either a model to add labels to, or --bank with the file to write",
            hint="mome embed MODEL --add thymus -o NEW; mome embed --bank FILE --labels NAME --text-encoder 'hf(...)'",
        )
    return _bank(args) if args.model is None else _add(args)


def _add(args: argparse.Namespace) -> int:
    if args.labels is not None:
        raise InputError("--labels concerns the file of --bank", hint="--add with the labels")
    if not args.add or args.out is None:
        missing = "--add with the labels" if not args.add else "--out with the folder of the new model"
        raise InputError(f"adding labels to a model needs {missing}", hint="mome embed MODEL --add 'thymus' -o NEW")
    _check_model_folder(args.out, overwrite=args.overwrite)
    from mome.embedding import add_labels, read_labels

    labels = read_labels(args.add)  # a label that cannot be read is refused before the model is loaded
    from mome.cli.quiet import quiet_libraries

    quiet_libraries()
    from mome.modeling import MoME

    model = MoME.from_pretrained(args.model, dtype="auto")
    names = add_labels(model, args.add, args.text_encoder)
    model.save_pretrained(args.out)
    for note in dict.fromkeys([*model.load_notes, *(label.note for label in labels if label.note)]):
        print(printable(f"note: {note}"))
    print(printable(f"added {', '.join(names)}"))
    print("the weights were not trained on them, and every segmentation will say so")
    print(printable(f"wrote {args.out}; next: mome segment ct.nii.gz -p {names[0]!r} -m {args.out}"))
    return 0


def _bank(args: argparse.Namespace) -> int:
    if args.out is not None:
        raise InputError("--out concerns a model; the rows go to the file of --bank", hint="leave out --out")
    if args.text_encoder is None:
        raise InputError("--bank needs --text-encoder", hint="--text-encoder \"hf(model='…')\"")
    if args.labels is None and not args.add:
        raise InputError("--bank needs --labels or --add", hint="--labels totalsegmentator_v2")
    _check_bank_file(args.bank, overwrite=args.overwrite)
    from mome.cli.quiet import quiet_libraries
    from mome.embedding import embed_labels, labels_of, read_labels
    from mome.encoders.text.bank_file import write_bank_file
    from mome.spec import write

    texts = [*(labels_of(args.labels) if args.labels is not None else []), *args.add]
    for note in dict.fromkeys(label.note for label in read_labels(texts) if label.note):
        print(printable(f"note: {note}"))
    quiet_libraries()
    bank = embed_labels(texts, args.text_encoder)
    write_bank_file(args.bank, bank)
    spec = write({"name": "bank", "file": str(args.bank), "width": int(bank.rows_LT.shape[1])})
    print(f"wrote {len(bank.labels)} rows of width {bank.rows_LT.shape[1]} to {args.bank}")
    print(f'use them as text_encoder="{spec}"')
    return 0


def _check_model_folder(folder: Path, *, overwrite: bool) -> None:
    """Checks that a folder is new or empty, or a model that may be replaced."""
    check_output_folder(folder)
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not (folder / "config.json").is_file():
        raise InputError("the output folder holds other files", where=str(folder), hint="choose a new folder")
    if not overwrite:
        raise InputError("there is a model already", where=str(folder), hint="another folder, or --overwrite")


def _check_bank_file(path: Path, *, overwrite: bool) -> None:
    """Checks that a file of text rows is new or may be replaced, and can be written."""
    if path.suffix != ".safetensors":
        raise InputError("a text bank is a .safetensors file", where=str(path), hint=f"--bank {path}.safetensors")
    if path.is_dir():
        raise InputError("the text bank is a folder", where=str(path), hint="choose another name")
    if path.exists() and not overwrite:
        raise InputError("there is a file already", where=str(path), hint="another name, or --overwrite")
    check_output_folder(path.parent)
