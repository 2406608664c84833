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
    """Adds the options."""
    for name, meaning in _FILES.items():
        parser.add_argument(f"--{name}", action="store_true", help=f"also {meaning}")
    parser.add_argument("--mirror", help="average over mirrored tiles: lr, ap, si, several with commas, or all")
    parser.add_argument(
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
