"""`convert`: a published file of weights becomes a checkpoint folder of ours."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mome.atomic import atomic_write, check_output_folder
from mome.configuration import MoMEConfig
from mome.convert import FAMILIES
from mome.convert.mapping import Conversion
from mome.convert.report import Report
from mome.convert.source import read_tensors
from mome.errors import InputError, did_you_mean
from mome.labels import load_dataset
from mome.modeling import MoME
from mome.presets import preset
from mome.processing import MoMEProcessor
from mome.registry import ENCODERS, PARTS

# The preset whose parts stand around a converted encoder.
_AROUND = "mome_ct_base"
REPORT = "conversion.json"


def convert(
    family: str,
    source: str | Path,
    out: str | Path,
    *,
    parts: Mapping[str, Any] | None = None,
    processor: Mapping[str, Any] | None = None,
    norm: str | None = None,
    overwrite: bool = False,
    seed: int = 0,
) -> Report:
    """Writes a checkpoint folder from a published file.

    Args:
        family: A key of `mome.convert.FAMILIES`.
        source: A safetensors file, a file of `torch.save` that holds tensors alone, or a folder with model.safetensors.
        out: The folder to write.
        parts: Parts around the encoder, as in `{"experts": "swiglu(n=8)"}`; the others are those of `mome_ct_base`.
            None may be given for a family that holds a whole model.
        processor: Settings of the network grid that replace those of the family.
        norm: See `mome.convert.segresnet.segresnet`.
        overwrite: Whether a checkpoint in the folder may be replaced.
        seed: Of the tensors that the file does not hold.

    Raises:
        InputError: An unknown family or part, a file of another architecture or one that cannot be read, or an output
            folder that is not empty.
        OutputError: The checkpoint could not be written.
    """
    source, out = Path(source), Path(out)
    if family not in FAMILIES:
        raise InputError(
            f"unknown family '{family}'{did_you_mean(family, FAMILIES)}", hint="families: " + ", ".join(FAMILIES)
        )
    if norm is not None and family not in ("segresnet", "ct-fm"):
        raise InputError(f"--norm is for segresnet and ct-fm, not for {family}", hint="leave it out")
    _check_out(source, out, overwrite)
    tensors = read_tensors(source)
    path, _, name = FAMILIES[family][0].partition(":")
    try:
        found: Conversion = getattr(importlib.import_module(path), name)(tensors, norm)
        model = _model(found, dict(parts or {}), seed)
        report = _load(model, found, tensors, family, source)
    except InputError as error:
        raise InputError(error.what, where=error.where or str(source), hint=error.hint) from error
    model.processor = MoMEProcessor(**{**found.processor, **(processor or {})})
    model.card_sections = (_card_section(report),)
    model.save_pretrained(out)
    with atomic_write(out / REPORT, "the report") as temporary:
        temporary.write_text(json.dumps(report.to_json(), indent=1) + "\n")
    return report


def _card_section(report: Report) -> str:
    """What the card of the model says of where its weights come from."""
    return (
        f"## Origin\nConverted from a file of the family `{report.family}`: {len(report.matched)} tensors come from "
        f"it, and {len(report.random)} are new and untrained.\n`conversion.json` names them."
    )


def _check_out(source: Path, out: Path, overwrite: bool) -> None:
    check_output_folder(out)
    if not out.exists():
        return
    if source.exists() and os.path.realpath(out) in (os.path.realpath(source), os.path.realpath(source.parent)):
        raise InputError("the output folder holds the source", where=str(out), hint="choose another folder")
    if any(out.iterdir()) and not overwrite:
        raise InputError("the output folder is not empty", where=str(out), hint="another folder, or --overwrite")


def _model(found: Conversion, parts: dict[str, Any], seed: int) -> MoME:
    """A model with random weights around what was found.

    Raises:
        InputError: A part that is unknown or may not be chosen, or parts that do not fit together.
    """
    choices = [name for name in PARTS if name != "encoder"]
    for key in parts:
        if found.fixed:
            raise InputError("the file holds a whole model, whose parts are fixed", hint=f"leave out {key}=")
        if key not in choices:
            raise InputError(f"no part is called {key!r:.40}{did_you_mean(key, choices)}", hint=", ".join(choices))
    values: dict[str, Any] = {} if found.fixed else dict(preset(_AROUND)["model"])
    values |= {"labels": list(load_dataset("ancestor_32").name_to_id), **found.config, **parts}
    with torch.device("meta"):
        divisor = ENCODERS.build(values["encoder"]).size_divisor
    values["patch_size"] = [max(2, -(-96 // step)) * step for step in divisor]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MoME(MoMEConfig(**values, trained_labels=found.trained_labels)).eval()


@torch.no_grad()
def _load(model: MoME, found: Conversion, tensors: Mapping[str, Tensor], family: str, source: Path) -> Report:
    """Copies the tensors into the model.

    Raises:
        InputError: A tensor has another shape than the model's, values that are not finite, or integers in the place of
            floating-point numbers or the reverse.
    """
    state = model.state_dict()
    for name, tensor in found.tensors.items():
        if state[name].shape != tensor.shape:
            raise InputError(
                f"the file is of another architecture: {name} has shape {tuple(tensor.shape)}, "
                f"not {tuple(state[name].shape)}"
            )
        # Integers are quantised weights without their scales, and half precision does not hold every index.
        if tensor.is_floating_point() != state[name].is_floating_point() and not name.endswith("num_batches_tracked"):
            raise InputError(
                f"the file holds numbers of {tensor.dtype} in {name}, the model has {state[name].dtype}",
                hint="a file that was not quantised, and whose indices are integers",
            )
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise InputError(f"the file holds values that are not finite, first in {name}", hint="another checkpoint")
        state[name].copy_(tensor)
    return Report(
        family=family,
        source=str(source),
        matched=tuple(found.tensors),
        random=tuple(name for name in state if name not in found.tensors and not name.startswith("text_bank.")),
        unused=tuple(name for name in tensors if name not in found.used),
        notes=(*found.notes, *_notes(found)),
    )


def _notes(found: Conversion) -> list[str]:
    if found.fixed:
        return []
    return ["the model is untrained: its encoder is converted, what stands after it is random, its text bank is empty"]
