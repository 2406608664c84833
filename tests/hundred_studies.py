"""A folder of 100 studies, 10 of them broken in different ways; the process is killed twice by SIGKILL and resumed.

    python tests/hundred_studies.py FOLDER [RESULT.json] [--bundled]

FOLDER is made, and gets the scans, an undisturbed run (`whole`) and the killed one (`broken`). The model is a
threshold, so that the files and not the network take the time; with `--bundled` it is mome-ct-tiny, and the scans are
synthetic necks. The checks are assertions; RESULT.json gets what was counted.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import signal
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from killed_runs import in_child  # before torch: it sets the number of threads

if TYPE_CHECKING:
    import numpy as np

    from mome.inference import Segmenter

STUDIES, KILLS = 100, 2


def broken_studies() -> dict[str, tuple[Callable[[Path], None], str]]:
    """Ending of the name → what writes the study, and words of its reason."""
    import nibabel as nib
    import numpy as np
    from small_scans import mha_text, patient_bytes, patient_hu, save_patient

    def truncated(path: Path) -> None:
        data = save_patient(path).read_bytes()
        path.write_bytes(data[: len(data) // 2])

    def nan(path: Path) -> None:
        nib.save(nib.Nifti1Image(np.full((20, 20, 20), np.nan, np.float32), np.diag([4.0, 4, 4, 1])), path)

    def four_dimensional(path: Path) -> None:
        nib.save(nib.Nifti1Image(np.stack([patient_hu()] * 2, -1), np.diag([8.0, 9, 10, 1])), path)

    def leading_out(path: Path) -> None:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("../../ct.nii.gz", gzip.compress(patient_bytes()))

    def bomb(path: Path) -> None:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("ct.nii", bytes(80 << 20))

    def shape_lies(path: Path) -> None:
        path.write_bytes(mha_text(DimSize="24 22 2000").encode() + patient_hu().tobytes(order="F"))

    return {
        "truncated.nii.gz": (truncated, "truncated or damaged"),
        "nan.nii.gz": (nan, "finite"),
        "text.nii.gz": (lambda path: path.write_text("to be scanned next week\n" * 30) and None, "not a NIfTI file"),
        "4d.nii.gz": (four_dimensional, "--frame"),
        "magic.nii.gz": (lambda path: save_patient(path, magic=b"xyz") and None, "not a NIfTI file"),
        "empty.nii": (lambda path: path.write_bytes(b"") and None, "the file is empty"),
        "shape.mha": (shape_lies, "cannot hold"),
        "folder.nii.gz": (lambda path: path.mkdir(), "folder"),
        "bomb.zip": (bomb, "zip bomb"),
        "leading_out.zip": (leading_out, "leads out of the archive"),
    }


def neck_hu() -> np.ndarray:
    """Returns int16 HU of a synthetic neck, on a grid of the shape and spacing of `small_scans`."""
    import numpy as np
    from small_scans import SHAPE, SPACING

    from mome.data.phantom import phantom
    from mome.volumes import Grid, resample

    person = phantom(1)
    whole = Grid(person.array.shape, person.affine)
    affine = np.diag([*SPACING, 1.0])
    middle = person.affine @ [*(np.asarray(whole.shape) - 1) / 2, 1]
    affine[:3, 3] = middle[:3] - affine[:3, :3] @ ((np.asarray(SHAPE) - 1) / 2)
    return resample(person.array, whole, Grid(SHAPE, affine), fill=-1000).round().numpy().astype(np.int16)


def make_segmenter(bundled: bool) -> tuple[Segmenter, list[str]]:
    """The model, and two prompts."""
    from stand_in_models import Contrast

    from mome.inference import Segmenter
    from mome.processing import MoMEProcessor

    if bundled:
        return Segmenter("mome-ct-tiny"), ["mandible", "spinal cord"]
    stand_in = Contrast(thresholds=(0.5, 0.6))
    return Segmenter(stand_in, MoMEProcessor(spacing=[8, 9, 10], hu_window=[-200, 800])), ["liver", "spleen"]


def make(folder: Path, patient: np.ndarray) -> dict[str, str]:
    """Writes the scans, each with noise of its own; returns broken study → words of its reason."""
    import numpy as np
    from small_scans import patient_bytes, save_mha, save_nrrd, save_patient

    from mome.volumes.scan_files import stem

    scans = folder / "scans"
    scans.mkdir()
    rng = np.random.default_rng(0)
    broken = list(broken_studies().items())
    for number in range(STUDIES - len(broken)):
        hu = (patient + rng.normal(0, 20, patient.shape)).astype(np.int16)
        name = f"s{number:02d}"
        if number % 10 == 7:
            with zipfile.ZipFile(scans / f"{name}.zip", "w") as archive:
                archive.writestr("export/ct.nii.gz", gzip.compress(patient_bytes(hu)))
        elif number % 10 == 8:
            save_mha(scans / f"{name}.mha", hu)
        elif number % 10 == 9:
            save_nrrd(scans / f"{name}.nrrd", hu)
        else:
            save_patient(scans / f"{name}.nii.gz", hu)
    reasons = {}
    for number, (name, (write, words)) in enumerate(broken):
        path = scans / f"s{number}5x_{name}"
        write(path)
        reasons[stem(path)] = words
    return reasons


def studies_of(out: Path) -> dict[str, dict[str, Any]]:
    """Name → entry of a report; empty where there is none yet."""
    path = out / "report.json"
    return {entry["name"]: entry for entry in json.loads(path.read_text())["studies"]} if path.exists() else {}


def finished(folder: Path) -> dict[str, str]:
    """Study → the time when its result was there, of the killed run."""
    return {name: entry["ended"] for name, entry in studies_of(folder / "broken").items() if entry["status"] == "done"}


def main(folder: Path, result: Path | None = None, bundled: bool = False) -> None:
    import nibabel as nib
    import numpy as np
    import torch
    from small_scans import patient_hu

    from mome.inference import segment_folder

    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    reasons = make(folder, neck_hu() if bundled else patient_hu())

    def run(out: str) -> Callable[[], int]:
        def in_process() -> int:
            segmenter, prompts = make_segmenter(bundled)
            entries = segment_folder(segmenter, [folder / "scans"], folder / out, prompts, resume=True)
            return 2 if any(entry["status"] == "failed" for entry in entries) else 0

        return in_process

    assert in_child(run("whole")) == 2
    whole, rng = studies_of(folder / "whole"), random.Random(14)
    known: dict[str, str] = {}
    killed_after = []
    for _ in range(KILLS):
        enough = len(known) + rng.randint(5, 40)
        code = in_child(run("broken"), rng.uniform(0, 0.3), until=lambda n=enough: len(finished(folder)) >= n)
        assert code == -signal.SIGKILL, code
        done = finished(folder)
        assert known.items() <= done.items()  # what was finished stays, and is not segmented again
        known = done
        killed_after.append(len(done))
    assert in_child(run("broken")) == 2
    studies = studies_of(folder / "broken")
    assert known.items() <= finished(folder).items()
    done = sorted(name for name, entry in studies.items() if entry["status"] == "done")
    failed = {name: entry for name, entry in studies.items() if entry["status"] == "failed"}
    assert len(done) == STUDIES - len(reasons) and sorted(failed) == sorted(reasons), sorted(failed)
    for name, words in reasons.items():
        failure = failed[name]["failure"]
        assert failure["reason"] and words in failed[name]["error"], failed[name]["error"]
        assert failure["remedy"] and failure["phase"] == "read"
    files = sorted(path.name for path in (folder / "broken").iterdir())
    assert files == sorted(path.name for path in (folder / "whole").iterdir())
    masks = [name for name in files if name.endswith(".nii.gz")]
    assert len(masks) == 2 * len(done)
    for name in masks:
        assert (folder / "whole" / name).read_bytes() == (folder / "broken" / name).read_bytes(), name
        assert np.any(nib.load(folder / "broken" / name).dataobj), name
    problems = json.loads((folder / "broken" / "problems.json").read_text())["problems"]
    assert {problem["name"] for problem in problems if problem["status"] == "failed"} == set(reasons)
    assert whole.keys() == studies.keys()
    if result is not None:
        counted = {
            "command": "python tests/hundred_studies.py FOLDER benchmarks/results/hundred_studies.json"
            + (" --bundled" if bundled else ""),
            "model": "mome-ct-tiny" if bundled else "a threshold",
            "studies": len(studies),
            "done": len(done),
            "each_once": True,
            "masks_equal_to_an_undisturbed_run": len(masks),
            "killed_by_sigkill_after_studies": killed_after,
            "failed": {
                name.partition("_")[2]: {
                    "phase": entry["failure"]["phase"],
                    "reason": entry["failure"]["reason"].replace(str(folder), "FOLDER"),
                    "remedy": entry["failure"]["remedy"],
                }
                for name, entry in sorted(failed.items())
            },
        }
        result.write_text(json.dumps(counted, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("result", type=Path, nargs="?")
    parser.add_argument("--bundled", action="store_true", help="mome-ct-tiny on synthetic necks")
    given = parser.parse_args()
    main(given.folder, given.result, given.bundled)
