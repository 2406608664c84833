"""`mome segment --plan`: says what segmenting each scan will take, and writes nothing."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from mome.printable import printable

if TYPE_CHECKING:
    from mome.inference import Segmenter
    from mome.inference.study import Study
    from mome.volumes.dicom import DicomOptions


def print_plans(segmenter: Segmenter, args: argparse.Namespace, dicom: DicomOptions) -> int:
    """Reads every scan, measures one tile of the network, prints the plans and returns the exit code.

    Args:
        segmenter: The model with its settings.
        args: The options of `mome segment`.
        dicom: Which DICOM series are read, where a job does not say it.
    """
    from mome.errors import InputError
    from mome.inference.loaded_scan import read_scan
    from mome.inference.output_checks import check_dicom_options, check_names, check_outputs
    from mome.inference.plan import TileCost, measured_tile, plan_scan
    from mome.inference.prepared import PreparedPrompts
    from mome.memory import process_bytes
    from mome.volumes.archives import is_archive
    from mome.volumes.writers.base import one_file_per_structure

    studies = _studies(args, dicom)
    for study in {(study.writer, study.multilabel): study for study in studies}.values():
        one_file_per_structure(study.mask_writer(), multilabel=study.multilabel)
    check_names(studies)
    check_dicom_options(studies)
    prepared: dict[tuple[str, ...], PreparedPrompts] = {}
    costs: dict[int, TileCost] = {}
    for study in studies:
        if study.prompts not in prepared:
            prepared[study.prompts] = prompts = segmenter.prepare(list(study.prompts))
            if len(prompts.names) not in costs:
                costs[len(prompts.names)] = measured_tile(segmenter, prompts)
    if args.out is not None:
        structures = [[prompt.name for prompt in prepared[study.prompts].prompts] for study in studies]
        check_outputs(studies, structures, args.out)
    found: list[dict[str, Any]] = []
    printed: set[str] = set()
    base, failed = process_bytes(), 0
    reads_ahead = len(studies) > 1 and segmenter.memory is None  # as `segment_folder` does
    for study in studies:
        prompts = prepared[study.prompts]
        try:
            writer = study.mask_writer()
            if not is_archive(study.scan):  # a run asks about what it has unpacked
                writer.check_source(study.scan)
            volume = read_scan(study.scan, study.frame, study.dicom)
            writer.check_volume(volume)
            plan = plan_scan(
                segmenter,
                volume,
                prompts,
                costs[len(prompts.names)],
                base,
                read_ahead=reads_ahead,
                disagreement=args.disagreement,
            )
        except InputError as error:
            failed += 1
            found.append({"name": study.name, "error": str(error)})
            if not args.json:
                print(f"{printable(study.name)}\n  cannot be segmented: {printable(str(error), keep=chr(10))}")
            continue
        notes = list(dict.fromkeys((*segmenter.notes, *volume.notes)))
        understood = [
            {"prompt": p.text, "name": p.name, "understood": p.resolved.how, "trained": p.trained, "warning": p.warning}
            for p in prompts.prompts
        ]
        found.append({"name": study.name, **plan.as_dict(), "prompts": understood, "notes": notes})
        if not args.json:
            warnings = [f"warning: {p.warning}" for p in prompts.prompts if p.warning]
            said = [f"note: {note}" for note in notes] + [line for line in warnings if line not in printed]
            printed.update(warnings)
            print("\n  ".join([printable(study.name), *plan.lines(), *map(printable, dict.fromkeys(said))]))
    if args.json:
        print(json.dumps({"plans": found}, indent=1))
    return 2 if failed else 0


def _studies(args: argparse.Namespace, dicom: DicomOptions) -> list[Study]:
    """Returns the studies that the command would segment: those of a jobs file, or scans that share the prompts."""
    from mome.inference.jobs import job_defaults, read_jobs
    from mome.inference.scans import find_named_scans
    from mome.inference.study import Study

    how: dict[str, Any] = {"multilabel": args.multilabel, "writer": args.writer, "frame": args.frame, "dicom": dicom}
    if args.jobs is not None:
        return read_jobs(args.jobs, job_defaults(args.prompt, **how))
    scans = find_named_scans(args.inputs, recursive=args.recursive, leave_out=args.out)
    return [Study(scan.name, scan.path, tuple(args.prompt), **how) for scan in scans]
