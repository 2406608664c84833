"""`mome info`: the parts of a model, the card of a part, the properties of a scan, or what a folder of scans holds."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from mome.cli.info_folder import held_lines, scans_below
from mome.errors import InputError
from mome.printable import printable
from mome.volumes.archives import is_archive, unpacked
from mome.volumes.scan_files import is_dicom_folder, is_nifti, scan_ending


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command."""
    parser.add_argument(
        "what", help="a model (folder, bundled name, preset, Hub id), a scan or a folder of scans, or a kind"
    )
    parser.add_argument("part", nargs="?", help="the name of a part of that kind, as in: router topk")
    parser.add_argument("--json", action="store_true", help="print for programs")


def run(args: argparse.Namespace) -> int:
    """Runs the command and returns its exit code."""
    if not args.what.strip():
        raise InputError("the name is empty", hint="a model, a scan or a DICOM folder; . is this folder")
    if args.part is not None:
        return _card(args.what, args.part, as_json=args.json)
    path = Path(args.what)
    if is_archive(path):
        with unpacked(path) as inner:
            try:
                return _described(str(inner.path), as_json=args.json)
            except InputError as error:
                raise inner.renamed(error) from error
    return _described(args.what, as_json=args.json)


def _described(name: str, *, as_json: bool) -> int:
    """Prints what a path or a model's name stands for, and returns the exit code."""
    path = Path(name)
    if not (path / "config.json").is_file() and is_dicom_folder(path):
        return _series(path, as_json=as_json)
    if path.is_dir() and not (path / "config.json").is_file() and (held := scans_below(path)):
        print(json.dumps({"scans": held}, indent=1) if as_json else "\n".join(held_lines(held)))
        return 0
    is_of_model = scan_ending(path) is None and (path.parent / "config.json").is_file()
    is_scan = (path.is_file() and not is_of_model) or scan_ending(path) is not None
    facts = _scan(name) if is_scan else _model(name)
    if as_json:
        print(json.dumps(facts, indent=1))
        return 0
    width = max(map(len, facts))
    for key, value in facts.items():
        text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        print(printable(f"{key:<{width}}  {text or 'none'}"))
    return 0


def _card(kind: str, name: str, *, as_json: bool) -> int:
    """Prints the card of a part and returns the exit code."""
    from mome.cards import card

    found = card(kind, name)
    print(json.dumps(found.as_dict(), indent=1) if as_json else printable(str(found), keep="\n"))
    return 0


def _series(folder: Path, *, as_json: bool) -> int:
    """Prints the series of a DICOM folder and returns the exit code."""
    from mome.volumes.dicom.describe import list_series

    facts = list_series(folder)
    if as_json:
        print(json.dumps(facts, indent=1))
        return 0
    for entry in facts.pop("series"):
        size = " × ".join(map(str, entry.get("size", [])))
        spacing = " × ".join(f"{value:g}" for value in entry.get("spacing (mm)", []))
        parts = [
            entry["kind"],
            f"{entry['images']} {'image' if entry['images'] == 1 else 'images'}" + (f" of {size}" if size else ""),
            f"{spacing} mm" if spacing else "",
            entry.get("description", ""),
        ]
        print(f"series {entry['number']}  " + ", ".join(filter(None, parts)))
        for note in entry.get("notes", []):
            print(f"  note: {note}")
    for key, values in facts.items():
        for value in values:
            print(f"{key}  {value}")
    return 0


def _scan(name: str) -> dict[str, Any]:
    """Returns the properties of a scan, by the names that are printed."""
    from mome.volumes import read_label_table, read_volume

    volume = read_volume(name, any_values=True)
    facts: dict[str, Any] = {
        "shape": list(volume.shape),
        "spacing (mm)": [round(s, 4) for s in volume.spacing],
        "axes run to": volume.grid.orientation,
        "HU": [float(volume.array.min()), float(volume.array.max())],
    }
    if is_nifti(name):
        table = read_label_table(name)
        if table:
            facts["labels"] = [f"{entry['id']} {entry['name']}" for entry in table]
    if volume.notes:
        facts["notes"] = list(volume.notes)
    return facts


def _model(name: str) -> dict[str, Any]:
    """Returns the parts and settings of a preset or a saved model, by the names that are printed."""
    from mome.presets import PRESETS, bundled_models, find_name, preset, preset_sizes
    from mome.pretrained import tags

    found = find_name(name, PRESETS)
    if found is not None and find_name(name, bundled_models()) is None and not Path(name).is_dir():
        name, entry = found, preset_sizes()[found]
        return {
            "preset": name,
            "summary": entry["summary"],
            "parameters": entry["parameters"],
            "active parameters": entry["active_parameters"],
            "operations": entry["flops"],
            "operations per prompt": entry["prompt_flops"],
            **entry["parts"],
            "patch (voxels)": entry["patch_size"],
            "processor": json.dumps(preset(name)["processor"]),
            "licence": entry["licence"],
            "weights": [f"{name}.{tag}" for tag in tags(name)],
        }
    _check_no_part(name)
    from mome.cli.quiet import quiet_libraries

    quiet_libraries()
    from mome.modeling import MoME
    from mome.processing import MoMEProcessor

    model, processor = MoME.from_pretrained(name), MoMEProcessor.from_pretrained(name)
    config = model.config
    return {
        "model": name,
        "parameters": sum(p.numel() for p in model.parameters()),
        **config.part_strings(),
        "residual": "yes" if config.residual else "no",
        "dim": config.dim,
        "head channels": config.head_channels,
        "patch (voxels)": list(config.patch_size),
        "processor": json.dumps(processor.settings()),
        "overlap of tiles": processor.overlap,
        "ends continued by (mm)": processor.extend_mm,
        "trained on": config.trained_labels,
        "labels in bank": len(config.labels),
        "known": sorted(model.text_bank.known()),
        **({"notes": list(model.load_notes)} if model.load_notes else {}),
    }


def _check_no_part(name: str) -> None:
    """Refuses the name of a kind of parts, or of a part, that stands where a model is expected.

    Raises:
        InputError: It is one of these, and neither a folder nor a bundled model.
    """
    from mome.presets import bundled_models, find_name
    from mome.registry import REGISTRIES

    if Path(name).exists() or find_name(name, bundled_models()) is not None:
        return
    for kind, registry in REGISTRIES.items():
        if name in (kind, registry.kind):
            raise InputError(
                f"the name of the {registry.kind} is missing", hint=f"mome info {name} {registry.names()[0]}"
            )
    kinds = [registry.kind.replace(" ", "_") for registry in REGISTRIES.values() if name in registry.names()]
    if kinds:
        raise InputError(
            f"'{name}' is no model, it is the name of a part", hint=" or ".join(f"mome info {k} {name}" for k in kinds)
        )
