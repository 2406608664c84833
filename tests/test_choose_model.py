"""Where no model is named, the prompts choose the bundled checkpoint."""

from __future__ import annotations

import json

import pytest

from mome.cli.main import main
from mome.errors import InputError
from mome.inference import choose_model as chooser
from mome.inference.choose_model import best_model, choose_model, known_labels

NECK, TORSO = "mome-ct-tiny", "torso"


@pytest.fixture
def two_models(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {
        NECK: frozenset({"mandible", "spinal_cord", "larynx"}),
        TORSO: frozenset({"liver", "kidney_left", "kidney_right", "spinal_cord"}),
    }
    monkeypatch.setattr(chooser, "known_labels", lambda: known)


@pytest.mark.parametrize(
    ("prompts", "model"),
    [
        ("liver", TORSO),
        (["hepar"], TORSO),
        (["kidneys"], TORSO),
        (["spinal cord"], NECK),
        (["spinal cord", "liver"], TORSO),
        (["mandible", "spinal cord"], NECK),
        (["something else"], NECK),
        (["ribs"], NECK),
        ([], NECK),
        (None, NECK),
    ],
)
def test_prompts_choose_the_model_that_knows_them(two_models, prompts, model) -> None:
    chosen = choose_model(prompts)
    assert chosen.model == model
    assert (chosen.note is None) == (model == NECK)


def test_note_names_model_and_structures(two_models) -> None:
    assert choose_model(["hepar", "kidneys"]).note == (
        "the model is torso, which was trained on liver, kidney_left, kidney_right"
    )


def test_prompts_of_two_models_are_refused(two_models) -> None:
    with pytest.raises(InputError, match="no bundled model knows both 'mandible' and 'liver'") as caught:
        choose_model(["mandible", "liver"])
    assert "-m mome-ct-tiny and with -m torso" in str(caught.value)


def test_all_needs_the_name_of_a_model(two_models) -> None:
    with pytest.raises(
        InputError, match="'All structures' asks for every structure that a model was trained on"
    ) as caught:
        choose_model(["All structures"])
    assert "-m mome-ct-tiny and with -m torso" in str(caught.value)
    one = {"torso": ["liver", "spleen"]}
    assert best_model(["all", "liver"], one, "model", "{} {}") == ("torso", ["liver", "spleen"])


def test_own_labels_choose_their_model() -> None:
    known = {"neck": ["mandible"], "mine": ["plaque_left", "thymus"]}
    for text in ("thymus", "Thymus", "left plaque"):
        assert best_model([text], known, "model", "{} {}")[0] == "mine"


def test_prompts_of_two_models_in_a_jobs_file_are_refused(tmp_path, capsys) -> None:
    jobs = [{"scan": "a.nii.gz", "prompts": ["mandible"]}, {"scan": "b.nii.gz", "prompts": ["liver"]}]
    (tmp_path / "jobs.json").write_text(json.dumps({"jobs": jobs}))
    assert main(["segment", "--jobs", str(tmp_path / "jobs.json"), "-o", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert (
        "no bundled model knows both 'mandible' and 'liver'" in error and "write one jobs file for each model" in error
    )
    assert not (tmp_path / "out").exists()


def test_known_labels_are_those_of_the_checkpoints() -> None:
    known = known_labels()
    assert next(iter(known)) == NECK
    assert {"mandible", "spinal_cord"} <= known[NECK] and "liver" not in known[NECK]
