"""The options of `mome segment` for what is done with a result: mirroring, post-processing, pictures, uncertainty."""

from __future__ import annotations

import argparse
from typing import Any

_FILES = {
    "html": "a page per scan that shows the CT and the masks in any browser, without a network",
    "preview": "a PNG per scan with three planes through the structures",
    "probabilities": "the probability of every prompt, as NIfTI files in probabilities/",
    "entropy": "the binary entropy of these probabilities in bits, in entropy/",
    "disagreement": "the entropy of the routers over the experts, in disagreement/",
}


def add_result_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options, except `--mirror`, as a group of the help."""
    group = parser.add_argument_group("what is written")
    group.add_argument("--multilabel", action="store_true", help="one map of the class table's ids")
    group.add_argument("--writer", default="nifti", help="file format of the masks; `mome list writers` shows them")
    group.add_argument(
        "--statistics",
        action="store_true",
        help="also volume, HU, box, borders and pieces of every mask, as JSON and CSV",
    )
    for name, meaning in _FILES.items():
        group.add_argument(f"--{name}", action="store_true", help=f"also {meaning}")
    group.add_argument(
        "--postprocess",
        action="append",
        metavar="RULE",
        help="change the masks: a rule such as largest_component (`mome list postprocessors`), structure=RULE, rules "
        "(those of the checkpoint, or else of this package) or none; may be repeated; default: the checkpoint's",
    )


def segmenter_options(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the arguments of `Segmenter`."""
    return {"mirror": args.mirror, "postprocess": args.postprocess}


def file_kinds(args: argparse.Namespace) -> tuple[str, ...]:
    """Returns the kinds of files that are asked for, names of `mome.inference.study_files.KINDS`."""
    return tuple(name for name in _FILES if getattr(args, name))
