"""The bundled torso checkpoint: its size, and that it finds organs in scans that it was never trained on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import mome
from mome.inference.choose_model import choose_model, known_labels
from mome.labels import load_dataset
from mome.volumes import read_label_map

NAME = "mome-ct-torso-tiny"
FOLDER = Path(mome.__file__).parent / "checkpoints" / NAME


def test_checkpoint_is_small_and_chosen_for_the_liver() -> None:
    assert (FOLDER / "model.safetensors").stat().st_size < 10e6
    assert {"liver", "spleen", "kidney_left", "kidney_right", "aorta", "lung_left", "lung_right"} <= known_labels()[
        NAME
    ]
    assert choose_model(["liver"]).model == choose_model("kidneys").model == NAME
    assert choose_model(["mandible"]).model == "mome-ct-tiny"
    assert mome.create_model("mome_ct_tiny.torso", pretrained=True).config.trained_labels[2] == "liver"


@pytest.mark.wide
def test_liver_of_a_left_out_scan_is_found_without_naming_a_model(ct_data: Path) -> None:
    """The reference was made by TotalSegmentator."""
    torso = ct_data / "torso"
    result = mome.segment(torso / "ts_example_ct.nii.gz", ["liver", "spleen"], overlap=0.25)
    assert any(NAME in note for note in result.notes) and not any(p.warning for p in result.prompts)
    reference = np.asarray(read_label_map(torso / "ts_example_seg_v2fast_117.nii.gz").array)
    numbers = load_dataset("totalsegmentator_v2").name_to_id
    for name, least in (("liver", 0.8), ("spleen", 0.65)):
        mask, truth = result.masks[name].astype(bool), reference == numbers[name]
        assert 2 * np.count_nonzero(mask & truth) / (mask.sum() + truth.sum()) > least, name
