"""Scores a torso model on scans that it was never trained on, and writes results/torso.json and torso.md.

    export MOME_TEST_DATA=…      # the folder that contains torso/ and anatomy/
    python benchmarks/torso.py --model mome-ct-torso-tiny
    python benchmarks/torso.py --model runs/mome_ct_torso_tiny/model --held-out    # to choose settings; writes nothing

Left out are all scans of three subjects. Settings were chosen on other data: new deformations of the training
anatomies, and the lungs of LIDC-IDRI-0002. `--figures FOLDER` draws the masks on three planes of each scan. `--air 60`
puts 60 mm of air on every side of the held-out scans, as a large field of view does, and prints their mean Dice.
`--cut` scores parts of the held-out scans: from the feet to 30 mm above the base of the lungs, and 40 mm at the spleen.
`--thick 7.5` averages planes of the held-out scans to slices of about 7.5 mm.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch

from mome.data.synthetic import load_anatomy, synthetic_ct
from mome.data.synthetic.anatomy import UNIONS
from mome.inference import Segmenter
from mome.labels import load_dataset
from mome.metrics import dice, normalized_surface_dice
from mome.volumes import Volume, read_label_map, read_volume, resample

HERE = Path(__file__).parent
SMALLEST_ML = 2.0  # a structure of which a scan shows less is not scored there
TOTALSEGMENTATOR = "labels made by TotalSegmentator"


@dataclass(frozen=True)
class Scan:
    """A scan with its reference.

    Attributes:
        name: Its name in the table.
        volume: The CT.
        masks: Structure → mask (i, j, k) on the CT's grid, of every annotated structure.
        source: Who made the reference.
    """

    name: str
    volume: Volume
    masks: dict[str, np.ndarray]
    source: str


def left_out(data: Path) -> Iterator[Scan]:
    """Yields the left-out scans of three subjects."""
    torso = data / "torso"
    for name, image, labels, dataset, source in (
        ("ts_example_ct", "ts_example_ct.nii.gz", "ts_example_seg_v2fast_117.nii.gz", "totalsegmentator_v2", 0),
        ("ts_example_ct_sm", "ts_example_ct_sm.nii.gz", "ts_example_seg_sm_v2_117.nii.gz", "totalsegmentator_v2", 0),
        ("ts_dicom_jpeg2000", "ts_dicom_jpeg2000", "ts_dicom_seg_v2_117.nii.gz", "totalsegmentator_v2", 0),
        ("msd_spleen", "msd_spleen/images/spleen_8.nii.gz", "msd_spleen/labels/spleen_8.nii.gz", None, 1),
    ):
        said = (TOTALSEGMENTATOR, "manual labels")[source]
        numbers = load_dataset(dataset).name_to_id if dataset else {"spleen": 1}
        yield read_scan(name, torso / image, torso / labels, numbers, said)


def held_out(data: Path) -> Iterator[Scan]:
    """Yields the scans on which settings are chosen."""
    chest = data / "torso" / "chest_rulebased"
    case = "LIDC-IDRI-0002.nii.gz"
    numbers = load_dataset("lungs_rulebased").name_to_id
    yield read_scan("LIDC-IDRI-0002", chest / "images" / case, chest / "labels" / case, numbers, "thresholding")
    lidc = data / "torso" / "lidc_totalseg"
    lidc_case = "LIDC-IDRI-0001.nii.gz"
    for name, label_map, dataset, image in (
        ("lidc", lidc / "labels" / lidc_case, "lidc_totalseg", lidc / "images" / lidc_case),
        ("s0327", data / "anatomy" / "s0327_total_v2_117_label.nii.gz", "totalsegmentator_v2", None),
        ("s0328", data / "anatomy" / "s0328_total_v2_117_label.nii.gz", "totalsegmentator_v2", None),
    ):
        anatomy = load_anatomy(label_map, dataset, image)
        for seed in (90001, 90002):
            made = synthetic_ct(anatomy, seed)
            yield Scan(f"synthetic {name} {seed}", Volume(made.array, made.affine), made.masks, "synthetic")


def with_air(scan: Scan, millimetres: float) -> Scan:
    """Returns a scan with air on every side."""
    voxels = [round(millimetres / step) for step in scan.volume.spacing]
    margins = [(count, count) for count in voxels]
    affine = scan.volume.affine.copy()
    affine[:3, 3] -= affine[:3, :3] @ np.array(voxels)
    volume = Volume(np.pad(scan.volume.array, margins, constant_values=-1000), affine)
    masks = {name: np.pad(mask, margins) for name, mask in scan.masks.items()}
    return Scan(scan.name, volume, masks, scan.source)


def with_thick_slices(scan: Scan, millimetres: float) -> Scan:
    """Returns a scan whose planes are averaged to slices; a voxel is a structure's where half of its planes are."""
    axis = next(i for i, letter in enumerate(nibabel.aff2axcodes(scan.volume.affine)) if letter in "SI")
    count = max(round(millimetres / scan.volume.spacing[axis]), 1)
    kept = scan.volume.shape[axis] // count * count

    def averaged(array: np.ndarray) -> np.ndarray:
        planes = np.moveaxis(np.asarray(array, dtype=np.float32), axis, 0)[:kept]
        return np.moveaxis(planes.reshape(kept // count, count, *planes.shape[1:]).mean(1), 0, axis)

    affine = scan.volume.affine.copy()
    affine[:3, 3] += affine[:3, axis] * (count - 1) / 2
    affine[:3, axis] *= count
    masks = {name: averaged(mask) >= 0.5 for name, mask in scan.masks.items()}
    return Scan(scan.name, Volume(averaged(scan.volume.array), affine), masks, scan.source)


def cut_parts(scan: Scan) -> Iterator[Scan]:
    """Yields parts of a scan that end inside of organs.

    Without the lungs' base, or without 50 mm below it, there is no part to the lungs; a scan that ends there is whole.
    """
    letters = nibabel.aff2axcodes(scan.volume.affine)
    axis = next(i for i, letter in enumerate(letters) if letter in "SI")
    size, step, upwards = scan.volume.shape[axis], scan.volume.spacing[axis], letters[axis] == "S"

    def heights(*names: str) -> np.ndarray:
        """Returns the planes, counted from the feet, that show one of the structures."""
        shown = np.zeros(size, dtype=bool)
        for name in names:
            if name in scan.masks:
                shown |= scan.masks[name].any(axis=tuple(i for i in range(3) if i != axis))
        return np.flatnonzero(shown if upwards else shown[::-1])

    def part(name: str, low: int, high: int) -> Scan:
        first, last = (low, high) if upwards else (size - high, size - low)
        box = tuple(slice(first, last) if i == axis else slice(None) for i in range(3))
        affine = scan.volume.affine.copy()
        affine[:3, 3] += affine[:3, axis] * first
        masks = {structure: mask[box] for structure, mask in scan.masks.items()}
        return Scan(f"{scan.name}, {name}", Volume(scan.volume.array[box], affine), masks, scan.source)

    lungs, spleen = heights("lung_left", "lung_right"), heights("spleen")
    if len(lungs) and lungs[0] * step > 50:
        yield part("to the lungs", 0, min(lungs[0] + round(30 / step), size))
    if len(spleen):
        middle, half = int(spleen[0] + spleen[-1]) // 2, round(20 / step)
        yield part("at the spleen", max(middle - half, 0), min(middle + half, size))


def read_scan(name: str, image: Path, labels: Path, numbers: dict[str, int], source: str) -> Scan:
    """Reads a scan and brings its reference onto its grid."""
    volume, reference = read_volume(image), read_label_map(labels)
    ids = torch.from_numpy(np.asarray(reference.array).astype(np.float32))
    if not volume.grid.same_as(reference.grid, tolerance=0.01):
        ids = resample(ids, reference.grid, volume.grid, mode="nearest", fill=0.0)
    array = ids.numpy().astype(np.int32)
    masks = {structure: array == number for structure, number in numbers.items()}
    for union, parts in UNIONS.items():
        if union not in masks and all(part in numbers for part in parts):
            masks[union] = np.isin(array, [numbers[part] for part in parts])
    return Scan(name, volume, masks, source)


def score(segmenter: Segmenter, scan: Scan, figures: Path | None) -> list[dict[str, Any]]:
    """Returns one row per structure that the model knows and the scan's reference covers."""
    wanted = [name for name in segmenter.model.config.trained_labels if name in scan.masks]
    drawn = list(segmenter.model.config.trained_labels) if figures else wanted
    result = segmenter.segment(scan.volume, drawn)
    if figures:
        draw(scan, result, figures)
    spacing = scan.volume.spacing
    rows = []
    for name in wanted:
        reference, mask = scan.masks[name], result.masks[name].astype(bool)
        millilitres = float(np.prod(spacing)) / 1000
        predicted, present = mask.sum() * millilitres, reference.sum() * millilitres
        row = {
            "scan": scan.name,
            "structure": name,
            "reference_ml": round(float(present), 1),
            "predicted_ml": round(float(predicted), 1),
            "reference": scan.source,
        }
        if present >= SMALLEST_ML:
            row["dice"] = round(dice(mask, reference), 3)
            row["nsd_2mm"] = round(normalized_surface_dice(mask, reference, spacing, 2.0), 3)
        rows.append(row)
    return rows


def draw(scan: Scan, result: Any, figures: Path) -> None:
    """Draws the masks on three planes of the scan."""
    from mome.viz.preview import save_preview

    figures.mkdir(parents=True, exist_ok=True)
    save_preview(figures / f"{scan.name.replace(' ', '_')}.png", scan.volume, result.masks)


def table(rows: list[dict[str, Any]]) -> str:
    """Returns the scored structures as a table; a structure has one row, a scan one column."""
    scans = list(dict.fromkeys(row["scan"] for row in rows))
    names = list(dict.fromkeys(row["structure"] for row in rows if "dice" in row))
    lines = ["| structure | " + " | ".join(scans) + " |", "|---" * (len(scans) + 1) + "|"]
    for name in names:
        cells = []
        for scan in scans:
            found = [r for r in rows if r["scan"] == scan and r["structure"] == name]
            if not found:
                cells.append("not annotated")
            elif "dice" in found[0]:
                cells.append(f"{found[0]['dice']:.2f} / {found[0]['nsd_2mm']:.2f}")
            else:
                cells.append(f"absent; {found[0]['predicted_ml']:.0f} ml found")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mome-ct-torso-tiny")
    parser.add_argument("--held-out", action="store_true", help="score what settings are chosen on; write nothing")
    parser.add_argument("--air", type=float, default=0.0, help="mm of air around held-out scans")
    parser.add_argument("--cut", action="store_true", help="score parts of held-out scans that end inside of organs")
    parser.add_argument("--thick", type=float, default=0.0, help="mm of the slices of held-out scans")
    parser.add_argument("--overlap", type=float, help="of tiles, 0 to 0.9; the model says where not given")
    parser.add_argument("--extend", type=float, help="mm by which scans are continued; the model says where not given")
    parser.add_argument("--figures", type=Path, help="folder for PNG files")
    parser.add_argument("--threads", type=int, default=0)
    args = parser.parse_args()
    if (args.air or args.cut or args.thick) and not args.held_out:
        parser.error("--air, --cut and --thick are for --held-out")
    if args.threads:
        torch.set_num_threads(args.threads)
    data = Path(os.environ["MOME_TEST_DATA"])
    segmenter = Segmenter(args.model, overlap=args.overlap)
    if args.extend is not None:
        segmenter.processor.extend_mm = args.extend
    rows = []
    scans = held_out(data) if args.held_out else left_out(data)
    if args.cut:
        scans = (part for scan in scans for part in cut_parts(scan))
    if args.thick:
        scans = (with_thick_slices(scan, args.thick) for scan in scans)
    for scan in scans:
        found = score(segmenter, with_air(scan, args.air) if args.air else scan, args.figures)
        rows += found
        print(table(found), flush=True)
        if args.held_out:
            print(f"mean Dice: {np.mean([row['dice'] for row in found if 'dice' in row]):.3f}", flush=True)
    if args.held_out:
        return
    results = HERE / "results"
    (results / "torso.json").write_text(json.dumps({"model": args.model, "rows": rows}, indent=1) + "\n")
    sources = dict.fromkeys((row["scan"], row["reference"]) for row in rows)
    text = [
        "# Torso: scans that mome-ct-torso-tiny was never trained on",
        "",
        "Generated by `python benchmarks/torso.py`. Each cell is Dice / surface Dice at 2 mm, on the scan's own grid.",
        f"A structure of which a scan shows less than {SMALLEST_ML:g} ml is not scored.",
        "The two scans ts_example_ct and ts_example_ct_sm show one subject. No interval is given for three subjects.",
        "",
        table(rows),
        "",
        *[
            f"- {scan}: {source}" + ("" if "manual" in source else "; Dice is agreement with it")
            for scan, source in sources
        ],
    ]
    (results / "torso.md").write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    main()
