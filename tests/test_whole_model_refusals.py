"""Whole models that do not fit are refused in words, and a config names no file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from torch import nn
from whole_model_helpers import SPACING, model_with, whole

from mome import MoME, MoMEConfig, segment
from mome.errors import InputError
from mome.processing import MoMEProcessor

# -- refusals when built ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"classes": ["background", "heart", "lung"]}, "has none of the model's labels: its classes are heart"),
        ({"classes": ["background", "liver"]}, r"returns \(1, 3, 16, 16, 16\) for a patch"),
        ({"classes": ["background"]}, "hold nothing but the background"),
        ({"classes": "liver"}, "classes is a list of names"),
        ({"classes": ["background"] + ["liver"] * 255}, "at most 255 classes, got 256"),
        ({"classes": ["liver", "liver", "liver"]}, "no class beside 'liver'"),
        ({"spacing": [1, 2]}, "spacing of a whole-model expert is three positive numbers of mm"),
        ({"activation": "softmx"}, "activation of a whole-model expert is softmax or sigmoid, got 'softmx', did you"),
        ({"network": lambda x: [x]}, "returns list, not a tensor of maps"),
        ({"network": lambda x: x[..., ::2].expand(-1, 3, -1, -1, -1)}, r"returns \(1, 3, 16, 16, 8\) for a patch"),
        ({"network": nn.Conv3d(2, 3, 1)}, r"cannot segment a patch \(1, 1, 16, 16, 16\): RuntimeError"),
        ({"network": lambda x: x, "frozen": False}, "a function has no weights that can be trained"),
        ({"network": "net.pt2"}, r"a module or a function, got str(.|\n)*exported_model\(path"),
    ],
)
def test_wrong_experts_are_refused_in_words(settings: dict, words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        model_with(whole(**settings))
    assert len(str(caught.value).splitlines()) <= 3


def test_labels_without_a_class_of_the_expert_are_refused(tmp_path: Path) -> None:
    """Such a model could be saved, and no longer be loaded."""
    expert = whole()
    model = model_with(expert)
    model.save_pretrained(tmp_path)
    words = "has none of the model's labels: its classes are liver, spleen"
    with pytest.raises(InputError, match=words):
        model.relabel(["aorta", "colon"])
    assert model.config.labels == model.text_bank.labels == ["liver", "spleen", "aorta"]
    with pytest.raises(InputError, match=words):
        MoME.from_pretrained(tmp_path, extra_experts=[expert], labels=["aorta"])
    model.relabel(["aorta", "liver"])
    model.save_pretrained(tmp_path)
    assert MoME.from_pretrained(tmp_path, extra_experts=[expert]).config.labels == ["aorta", "liver"]


def test_another_grid_is_refused(tmp_path: Path) -> None:
    expert = whole(hu_window=[-100, 200])
    model = model_with(expert)
    for processor, words in (
        (
            MoMEProcessor(spacing=[1.5, 1.5, 1.5]),
            "trained on voxels of 2 × 2 × 3 mm, the model's processor",
        ),
        (MoMEProcessor(spacing=SPACING, orientation="LPS"), "trained on axes RAS"),
        (MoMEProcessor(spacing=SPACING), "trained on the HU window"),
    ):
        with pytest.raises(InputError, match=words):
            model.processor = processor
        with pytest.raises(InputError, match=words):
            segment(np.zeros(1), ["liver"], model, processor)
    model.processor = MoMEProcessor(spacing=SPACING, hu_window=[-100, 200])
    model.save_pretrained(tmp_path)
    MoMEProcessor(spacing=[1, 1, 1]).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="the model's processor makes voxels of 1 × 1 × 1 mm"):
        MoME.from_pretrained(tmp_path, extra_experts=[expert])


@pytest.mark.parametrize("fusion", ["last", "gate(hidden=4)"])
def test_a_fusion_that_cannot_leave_out_an_expert_is_refused(fusion: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import throwaway_parts

    throwaway_parts.register(monkeypatch)
    with pytest.raises(InputError, match="reads the finest scale alone|cannot leave out an expert"):
        model_with(whole(), fusion=fusion)


@pytest.mark.parametrize(
    "entry",
    [
        {"name": "object", "path": "/etc/passwd"},
        "net.pt2",
        {"name": "object", "class": "WholeModel", "sha256": "../../x", "kind": "module", "classes": ["liver"],
         "spacing": [1, 1, 1], "frozen": True},
        {"name": "object", "class": "WholeModel", "sha256": "0" * 16, "kind": "pickle", "classes": ["liver"],
         "spacing": [1, 1, 1], "frozen": True},
    ],
)  # fmt: skip
def test_a_config_can_name_no_file(entry: object) -> None:
    with pytest.raises(InputError, match="is no reference of a whole-model expert|an extra expert is a WholeModel"):
        MoMEConfig(labels=["liver"], extra_experts=[entry])
