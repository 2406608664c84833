"""`mome dicomweb`: segments a series of a DICOMweb archive, and stores the result there."""

from __future__ import annotations

import argparse
from typing import Any

from mome.atomic import check_output_folder
from mome.cli.parser import output_folder
from mome.cpu_load import CpuLoad, set_threads
from mome.errors import InputError
from mome.printable import printable
from mome.temporary_names import temporary_folder
from mome.threads import check_threads


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command."""
    parser.add_argument("url", help="root of the DICOMweb service, as in https://pacs.example/dicom-web")
    parser.add_argument("--study", required=True, help="StudyInstanceUID")
    parser.add_argument("--series", help="SeriesInstanceUID; without it, the series of the study are listed")
    parser.add_argument("-p", "--prompt", action="append", default=[], help="a structure, or all; may be repeated")
    parser.add_argument(
        "-m", "--model", help="folder, bundled name or Hub id; default: the bundled model that knows the prompts"
    )
    parser.add_argument("-o", "--out", type=output_folder, help="folder for the result")
    parser.add_argument("--store", action="store_true", help="store the result in the archive, in the same study")
    parser.add_argument("--writer", default="dicom_seg", help="dicom_seg or rtstruct")
    parser.add_argument("--insecure", action="store_true", help="allow http to another machine")
    parser.add_argument("--allow-gaps", action="store_true", help="read a series in which many slices are missing")
    parser.add_argument("--allow-damaged", action="store_true", help="leave out slices that are damaged")
    parser.add_argument("--device", help="cpu, cuda or cuda:1; default cpu")
    parser.add_argument("--precision", default="auto", help="auto, fp32, bf16 or fp16")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads")


def run(args: argparse.Namespace) -> int:
    """Runs the command and returns its exit code."""
    from mome.dicomweb.series import check_uid, list_series, retrieve_series, store_files
    from mome.dicomweb.session import connect

    study = check_uid(args.study, "--study")
    if args.series is None and (args.prompt or args.store or args.out is not None):
        raise InputError("no series was given", hint="--series UID; without -p, -o and --store the series are listed")
    client = connect(args.url, insecure=args.insecure)
    if args.series is None:
        for entry in list_series(client, study):
            images = f"{entry['images']} images" if entry["images"] is not None else ""
            told = [entry["uid"], entry["modality"], images, entry["description"]]
            print(printable("  ".join(str(item) for item in told if item)))
        return 0
    series = check_uid(args.series, "--series")
    if not args.prompt:
        raise InputError("no prompt was given", hint="name at least one structure, as in -p liver")
    if args.out is None and not args.store:
        raise InputError("the result would go nowhere", hint="--store, or -o FOLDER")
    check_threads(args.threads, "--threads")
    if args.out is not None:
        check_output_folder(args.out)
    load = CpuLoad()
    from rich.console import Console

    from mome.cli.quiet import quiet_libraries
    from mome.inference import Segmenter
    from mome.inference.choose_model import Choice, choose_model
    from mome.volumes.dicom import DicomOptions
    from mome.volumes.mask_names import file_part
    from mome.volumes.writers.base import build_writer

    quiet_libraries()
    threads_note = set_threads(args.threads, load)
    console = Console(stderr=True)
    writer = _writer(args.writer)
    chosen = Choice(args.model, None) if args.model else choose_model(args.prompt)
    segmenter = Segmenter(chosen.model, device=args.device, precision=args.precision)
    segmenter.notes += tuple(note for note in (chosen.note, threads_note) if note)
    prepared = segmenter.prepare(args.prompt)  # before the series is retrieved, which takes longer
    with temporary_folder() as temporary:
        folder = temporary / "series"
        folder.mkdir(mode=0o700)
        with console.status("retrieving the series"):
            count = retrieve_series(client, study, series, folder)
        console.print(f"retrieved {count} images", highlight=False)
        with console.status("segmenting"):
            dicom = DicomOptions(allow_gaps=args.allow_gaps, allow_damaged=args.allow_damaged)
            chosen_writer = build_writer(writer)
            chosen_writer.check_source(folder)  # before the network runs, which takes longer
            loaded = segmenter.load(folder, dicom=dicom)
            chosen_writer.check_volume(loaded.volume)
            result = segmenter.segment(folder, prepared, dicom=dicom, loaded=loaded)
            del loaded
        out = temporary / "result" if args.out is None else args.out
        files = result.save(out, file_part(series), writer=writer)
        _print(result, console)
        if args.out is not None:
            for file in files:
                console.print(f"wrote {file}", highlight=False, markup=False, soft_wrap=True)
        if args.store:
            for uid in store_files(client, study, files):
                console.print(f"stored {uid}", highlight=False, markup=False)
    return 0


def _writer(name: str) -> str:
    """Returns the writer, which makes DICOM.

    Raises:
        InputError: It makes other files, which no archive takes, or there is no such writer.
    """
    from mome.volumes.writers.base import build_writer

    chosen = build_writer(name)
    if not chosen.ending.endswith(".dcm"):
        raise InputError(f"the writer {name!r:.40} writes no DICOM", where="--writer", hint="dicom_seg, rtstruct")
    return name


def _print(result: Any, console: Any) -> None:
    """Prints the volumes and the warnings."""
    for structure in result.summary():
        name = printable(structure["name"])
        console.print(f"  {name:<24} {structure['volume_ml']:>10.1f} ml", highlight=False, markup=False)
    for warning in dict.fromkeys(result.warnings):
        console.print(f"  note: {printable(warning)}", highlight=False, markup=False, style="yellow")
