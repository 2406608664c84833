"""Settings that make no mask, masks that fill a scan, names of cases in two forms, and limits of the system."""

from __future__ import annotations

import subprocess
import sys
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_models import small
from small_scans import patient_affine, patient_hu, save_patient
from stand_in_models import Threshold

from mome import MoMEProcessor
from mome.errors import InputError
from mome.inference import Segmenter, segment_folder
from mome.labels import load_table
from mome.metrics import evaluate_folder
from mome.training.config import TrainConfig
from mome.volumes import Grid, Volume, write_mask

PATIENT = Volume(patient_hu(), patient_affine())


def segmenter(level: float = 0.5, **options: Any) -> Segmenter:
    return Segmenter(Threshold(level), MoMEProcessor(spacing=[8, 9, 10], hu_window=[-1000, 1000]), **options)


@pytest.mark.parametrize(
    ("setting", "value"), [("hu_window", [0, 1]), ("hu_window", [-1000, -900]), ("padding_hu", 40.0)]
)
def test_settings_of_a_file_are_refused_and_those_of_the_user_noted(tmp_path: Path, setting: str, value: Any) -> None:
    MoMEProcessor(**{setting: value}).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match=setting):
        MoMEProcessor.from_pretrained(tmp_path)
    chosen = MoMEProcessor.from_pretrained(tmp_path, **{setting: value})
    notes = Segmenter(Threshold(0.5), chosen).segment(PATIENT, ["liver"]).notes
    assert any(setting in note for note in notes), notes


def test_coarse_voxels_are_noted(tmp_path: Path) -> None:
    MoMEProcessor(spacing=[12, 12, 12]).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    notes = Segmenter(Threshold(0.5), MoMEProcessor.from_pretrained(tmp_path)).segment(PATIENT, ["liver"]).notes
    assert any("is coarse" in note for note in notes), notes


@pytest.mark.parametrize("chunk", [-3, 0, 1.5, True, "8"])
def test_prompt_chunk_is_a_whole_number(chunk: Any) -> None:
    with pytest.raises(InputError, match="prompt_chunk is a whole number"):
        segmenter(prompt_chunk=chunk)


def test_devices_that_do_not_compute_are_refused() -> None:
    with pytest.raises(InputError, match="one device 'cpu'"):
        segmenter(device="cpu:7")
    ready = segmenter()
    with torch.device("meta"), pytest.raises(InputError, match="default device is 'meta'"):
        ready.segment(PATIENT, ["liver"])


def test_one_voxel_in_the_coarsest_map_is_explained() -> None:
    model = small().eval()
    text_PT = torch.zeros(1, model.config.text_dim)
    side = model.encoder.size_divisor
    for call in (lambda v: model(v, text_PT), model.encode):
        with pytest.raises(InputError, match="one voxel in the coarsest map"):
            call(torch.zeros(1, 1, *side))
    assert model.encode(torch.zeros(1, 1, side[0] * 2, *side[1:])) is not None


@pytest.mark.parametrize("name", ["steps", "samples"])
def test_a_training_of_no_steps_is_refused(name: str) -> None:
    with pytest.raises(InputError, match=f"train.{name} is at least 1, got 0"):
        TrainConfig(**{name: 0})


def test_a_folder_named_like_a_mask_is_not_replaced(tmp_path: Path) -> None:
    scan = save_patient(tmp_path / "ct.nii.gz")
    (tmp_path / "out" / "ct_liver.nii.gz").mkdir(parents=True)
    with pytest.raises(InputError, match="a folder has the name of a mask"):
        segment_folder(segmenter(), [scan], tmp_path / "out", ["liver"], overwrite=True)


def test_masks_that_fill_the_scan_are_noted() -> None:
    assert any("'liver' fills 100% of the image" in n for n in segmenter(-1.0).segment(PATIENT, ["liver"]).notes)
    assert any("of the body" in note for note in segmenter(0.4).segment(PATIENT, ["liver"]).notes)
    assert not any("fills" in note for note in segmenter(0.7).segment(PATIENT, ["liver"]).notes)


def test_predictions_without_a_reference_and_names_in_two_forms(tmp_path: Path, caplog: Any) -> None:
    mask = np.zeros((8, 8, 8), np.uint8)
    mask[2:5, 2:5, 2:5] = 1
    grid, name = Grid(mask.shape, np.eye(4)), "fälle"
    forms = {"p": unicodedata.normalize("NFD", name), "r": unicodedata.normalize("NFC", name)}
    for side, structures in (("p", ("liver", "spleen")), ("r", ("liver",))):
        (tmp_path / side).mkdir()
        for structure in structures:
            write_mask(tmp_path / side / f"{forms[side]}_{structure}.nii.gz", mask, grid)
    scores = evaluate_folder(tmp_path / "p", tmp_path / "r")
    assert [(score.structure, score.dice) for score in scores] == [("liver", 1.0)]
    assert "without a reference are not scored (cases): spleen (1)" in caplog.text


def test_words_that_change_what_is_asked_for() -> None:
    table = load_table()
    for prompt, words in (("OS parotid", "may name a side"), ("mandible-teeth", "may mean 'without'")):
        found = table.resolve(prompt)
        assert found.how == "refused" and words in str(found.warning), found
    assert table.resolve("normal liver").how == "free" and "free text" in str(table.resolve("normal liver").warning)
    assert table.resolve("kidney-left").name == "kidney_left"


_LIMITED = """
import resource, sys
from mome.cli.main import main
limit, value, *arguments = sys.argv[1:]
resource.setrlimit(getattr(resource, limit), (int(value), int(value)))
sys.exit(main(arguments))
"""


@pytest.mark.wide
@pytest.mark.parametrize(("limit", "value", "code"), [("RLIMIT_FSIZE", 120, 1), ("RLIMIT_NOFILE", 12, 0)])
def test_limits_of_the_system_leave_no_half_mask(tmp_path: Path, limit: str, value: int, code: int) -> None:
    scan = save_patient(tmp_path / "ct.nii.gz")
    arguments = ["segment", str(scan), "-p", "mandible", "-o", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-c", _LIMITED, limit, str(value), *arguments], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == code, done.stderr
    written = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert written == ([] if code else ["ct_mandible.nii.gz", "report.json"])
    if code:
        assert "could not be written: File too large" in done.stderr and "Traceback" not in done.stderr
