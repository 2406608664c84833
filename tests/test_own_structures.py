"""Structures that the class table does not have: read from folders, trained, segmented, and mirrored by their names."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from small_models import small
from stand_in_models import LetterTower
from test_data_layouts import SHAPE, liver_map, nnunet, save, scan

from mome import MoME, create_model
from mome.cli.main import main
from mome.data.augmentation import AugmentationConfig, BatchAugmentation
from mome.data.layouts import open_cases
from mome.data.prompt_choice import confusable
from mome.embedding import labels_of
from mome.errors import InputError
from mome.inference.choose_model import best_model
from mome.inference.meant_name import meant_name
from mome.labels.dataset_file import open_dataset
from mome.labels.own import find_own, read_own_structures, suggested_name
from mome.labels.sides import has_no_other_side, other_side
from mome.loaded_weights import unknown_label_notes
from mome.postprocess.rules import asked_rules
from mome.postprocess.run import PostProcessing
from mome.prompts import understand
from mome.registry import TEXT_ENCODERS
from mome.training.config import RunConfig
from mome.training.config_file import load_run_config
from mome.training.setup import build_model
from mome.training.text_rows import TextRows
from mome.volumes import read_label_table

PLAQUES = {"background": 0, "liver": 1, "Left Plaque": 2, "plaque_right": 3}


def plaques() -> np.ndarray:
    """A liver with a plaque on either side of it. On this grid, larger i is further to the right."""
    labels = np.zeros(SHAPE, np.uint8)
    labels[14:24, 10:20, 5:15] = 1
    labels[8:12, 12:18, 6:14] = 2
    labels[26:30, 12:18, 6:14] = 3
    return labels


def test_other_words_are_read_and_normalised() -> None:
    given = {"thymus": ["Thymic gland", "thymic-remnant"], "plaque_left": None, "stent": "metal stent"}
    assert read_own_structures(given) == {
        "thymus": ("thymic gland", "thymic remnant"),
        "plaque_left": (),
        "stent": ("metal stent",),
    }


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"my thymus": []}, "letters, digits and underscores"),
        ({"../thymus": []}, "letters, digits and underscores"),
        ({7: []}, "letters, digits and underscores"),
        ({"x" * 61: []}, "letters, digits and underscores"),
        ({"thymus": 3}, "a list of texts, got 3"),
        ({"thymus": [3]}, "a list of texts"),
        ({"liver": []}, "'liver' in structures is a name of liver in the class table"),
        ({"thymus": ["hepar"]}, "'hepar' in structures is a name of liver"),
        ({"kidneys": []}, "a name of kidney_left, kidney_right"),
        ({"livr": []}, "'livr' in structures is close to liver"),
        ({"thymus": ["gland"], "stent": ["gland"]}, "names both 'thymus' and 'stent'"),
        ({"thymus": [""]}, "has no letter"),
        ({"thymus": ["12"]}, "has no letter"),
        ({"plaque_L": []}, "seems to name the left side, which is written as the word left"),
        ({"plaque_dx": []}, "seems to name the right side"),
        ({"plaque_left": [], "left_plaque": []}, "names both 'plaque_left' and 'left_plaque'"),
        (
            {"plaque_left": ["right plaque"]},
            "'right plaque', another name of 'plaque_left' in structures, names another",
        ),
        ({"thymus": ["left gland"]}, "names another side"),
        ({"Plaque_left": [], "plaque_right": []}, "'Plaque_left' and 'plaque_right' .* are not written alike"),
        ({"left_plaque": [], "plaque_right": []}, "are not written alike"),
        ({"all": []}, "'all' in structures names no structure"),
        ({"Background": []}, "names no structure"),
        ({"left": []}, "names no structure"),
        ({"thymus": ["тимус"]}, "'тимус', a name of 'thymus' in structures"),
    ],
)
def test_faulty_structures_are_refused(given: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_own_structures(given)
    with pytest.raises(InputError, match=message):
        RunConfig(structures=given)


def test_a_name_is_found_in_any_order_of_its_words() -> None:
    assert find_own("Left Plaque", ["plaque_left", "plaque_right"]) == "plaque_left"
    assert find_own("plaque", ["plaque_left"]) is None and find_own("thymus", []) is None
    for text in ("L plaque", "Plaque_L", "plaque sin.", "PLAQUE (left)"):
        assert find_own(text, ["plaque_right", "plaque_left"]) == "plaque_left"
    assert find_own("Thymic Gland", {"thymus": ("thymic gland",)}) == "thymus"
    assert find_own("l " * 50_000 + "thymus", ["thymus"]) is None  # no name is so long, and reading it would take hours


def test_a_name_is_suggested_that_would_be_taken() -> None:
    assert suggested_name("Plaque L") == "plaque_left" and suggested_name("thymus (remnant)") == "thymus_remnant"
    assert read_own_structures({suggested_name("rt. Lesion"): None}) == {"lesion_right": ()}


def test_folders_may_name_them(tmp_path: Path) -> None:
    """nnU-Net's dataset.json, the table of BIDS, and mask files; else the message says how to name them."""
    own = ["plaque_left", "plaque_right"]
    folder = nnunet(tmp_path / "nnunet", {"a": plaques()}, PLAQUES)
    with pytest.raises(InputError, match=r"'Left Plaque' is no structure .*\n.*\n.*--own plaque_left"):
        open_cases(folder, "nnunet")
    for name in ("kidneys", "тимус", "x" * 70):  # no advice that would be refused
        with pytest.raises(InputError, match=r"--dataset with a YAML file of yours"):
            open_cases(nnunet(tmp_path / name[:8], {"a": plaques()}, {name: 2}), "nnunet")
    (case,) = open_cases(folder, "nnunet", own=own)
    assert case.annotated == ("liver", *own)
    masks, _ = case.read_masks(case.read_image().grid)
    assert [int(masks[name].sum()) for name in own] == [192, 192] and masks["plaque_left"][8, 12, 6]

    save(tmp_path / "bids" / "sub-1" / "ct" / "sub-1_ct.nii.gz", scan())
    save(tmp_path / "bids" / "derivatives" / "x" / "sub-1" / "sub-1_dseg.nii.gz", plaques())
    (tmp_path / "bids" / "derivatives" / "x" / "dseg.tsv").write_text("index\tname\n1\tliver\n2\tplaque left\n")
    (case,) = open_cases(tmp_path / "bids", "bids", own=own)
    assert case.annotated == ("liver", "plaque_left")

    save(tmp_path / "masks" / "s1" / "ct.nii.gz", scan())
    for name in ("liver", "Left plaque", "notes"):
        save(tmp_path / "masks" / "s1" / "masks" / f"{name}.nii.gz", (plaques() == 1).astype(np.uint8))
    (case,) = open_cases(tmp_path / "masks", "masks", own=own)
    assert set(case.annotated) == {"liver", "plaque_left"}
    (case,) = open_cases(tmp_path / "masks", "masks")
    assert case.annotated == ("liver",)
    save(tmp_path / "masks" / "s1" / "masks" / "plaque_left.nii.gz", (plaques() == 2).astype(np.uint8))
    with pytest.raises(InputError, match="two masks are of 'plaque_left'"):
        open_cases(tmp_path / "masks", "masks", own=own)

    (tmp_path / "mine.yaml").write_text("structures: {liver: 1, left_plaque: 2}")
    with pytest.raises(InputError, match="'left_plaque' and 'plaque_left' are one structure of your own"):
        open_cases(folder, "nnunet", str(tmp_path / "mine.yaml"), own)


def test_a_data_set_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A YAML file says what the numbers mean; what it names beside the class table is a structure of one's own."""
    folder = nnunet(tmp_path / "data", {name: plaques() for name in "abc"})
    rows = [f"imagesTr/{case}_0000.nii.gz,labelsTr/{case}.nii.gz,{case}" for case in "abc"]
    (folder / "list.csv").write_text("\n".join(["image,labels,case", *rows]) + "\n")
    mine = tmp_path / "mine.yaml"
    mine.write_text("layout: manifest\nstructures: {liver: 1, plaque_left: 2, plaque: [2, 3]}\n")
    given = ["data", "prepare", str(folder / "list.csv"), "--dataset", str(mine), "-o", str(tmp_path / "out")]
    assert main([*given, "--memory", "1500MB"]) == 0
    run = load_run_config(tmp_path / "out" / "run.yaml", [])
    assert run.labels == ("liver", "plaque_left", "plaque") and set(run.structures) == {"plaque_left", "plaque"}
    assert run.sources[0].dataset == str(mine)
    assert next((tmp_path / "out" / "cache").iterdir()).name.startswith("mine-list-csv")
    for case in "abc":
        save(tmp_path / "masks" / f"{case}_plaque.nii.gz", (plaques() > 1).astype(np.uint8))
    capsys.readouterr()
    evaluate = ["evaluate", str(tmp_path / "masks"), str(folder / "labelsTr"), "--labels", str(mine), "-p", "Plaque"]
    assert main(evaluate) == 0 and "1.000" in capsys.readouterr().out
    assert main([*given, "--memory", "1500MB", "-p", "left plaque"]) == 0
    assert load_run_config(tmp_path / "out" / "run.yaml", []).labels == ("plaque_left",)
    mine.write_text("layout: manifest\nstructures: {liver: 1}\n")
    assert open_dataset(str(mine)).annotated == ("liver",)  # a file that was changed is read again


def test_masks_of_own_structures_are_scored_as_such(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mask without a table was read as a map, whose 1 is the liver by the data set."""
    (tmp_path / "mine.yaml").write_text("structures: {liver: 1, plaque_left: 2}")
    for folder, shift in (("a", 0), ("b", 3)):
        for number, name in ((1, "liver"), (2, "plaque_left")):
            mask = np.roll(plaques() == number, shift if number == 2 else 0, axis=1)
            save(tmp_path / folder / f"x_{name}.nii.gz", mask.astype(np.uint8))
    monkeypatch.setenv("HERE", str(tmp_path))
    assert main(["evaluate", str(tmp_path / "a"), str(tmp_path / "b"), "--labels", "${HERE}/mine.yaml", "--json"]) == 0
    scores = {row["structure"]: row["dice"]["mean"] for row in json.loads(capsys.readouterr().out)["structures"]}
    assert scores["liver"] == 1.0 and 0 < scores["plaque_left"] < 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("structures: {livr: 1}", "'livr' in structures is close to liver"),
        ("structures: {hepar: 1}", "'hepar' in structures is a name of liver"),
        ("structures: {thymus: 0}", "mine.yaml: thymus is a positive whole number"),
        ("structures: {thymus: 1, thymus: 2}", "the key 'thymus' twice"),
        ("structurs: {thymus: 1}", "the key 'structurs', did you mean 'structures'"),
        ("{}", "mine.yaml lists no structure"),
        ("[1]", "mine.yaml holds no mapping"),
        ("structures: {liver: 1, thymus: [1]}", "gives liver and thymus the same numbers"),
        ("{structures: {liver: 1}, files: {thymus: t}}", "structures .numbers. and files"),
        ("structures: [liver]", "structures is a mapping of structures"),
        ("files: {thymus: 3}", "the files of thymus are a list of patterns"),
        ("structures: {liver: {values: [1], side: left}}", "the side that its name ends with"),
    ],
)
def test_a_faulty_data_set_of_ones_own_is_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        open_dataset(str(path))
    with pytest.raises(InputError, match="cannot be read"):
        open_dataset(str(tmp_path / "none.yaml"))


def test_sides_follow_from_the_names() -> None:
    assert other_side("Plaque_Left") == "Plaque_Right" and other_side("PLAQUE_RIGHT") == "PLAQUE_LEFT"
    assert other_side("plaque_left") == "plaque_right" and other_side("thymus") == "thymus"
    assert not has_no_other_side("plaque_left") and has_no_other_side("lung_middle_lobe_right")
    pair = BatchAugmentation(AugmentationConfig(mirror=0.5), ["plaque_left", "plaque_right", "thymus"])
    assert pair.can_mirror
    assert not BatchAugmentation(AugmentationConfig(mirror=0.5), ["plaque_left", "thymus"]).can_mirror


def test_hard_negatives_of_own_structures() -> None:
    """The other side comes near; structures outside of the table are one group, beside the lesions."""
    assert confusable(["plaque_left"], ["plaque_right", "liver"]) == ["plaque_right"]
    assert confusable(["thymus"], ["stent", "liver"]) == ["stent"]
    assert confusable(["thymus"], ["liver_tumor", "liver"]) == ["liver_tumor"]
    assert confusable(["liver"], ["thymus", "stomach"]) == ["stomach"]


def test_labels_must_be_declared(tmp_path: Path) -> None:
    run = RunConfig(labels=("liver", "thymus"), bank="trained", model={"text_encoder": "bank(width=8)"})
    with pytest.raises(InputError, match=r"'thymus' is not a label of the class table[^\n]*\n.*structures: \{thymus:"):
        build_model(run)
    model, _ = build_model(dataclasses.replace(run, structures={"thymus": []}))
    assert model.config.labels == ["liver", "thymus"]


def test_their_other_words_are_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TEXT_ENCODERS, "build", lambda spec: LetterTower())
    model = small(labels=["liver", "thymus"], text_encoder="bank(width=384)")
    rows = TextRows(model, ["liver", "thymus"], 1.0, seed=0, own={"thymus": ["thymic gland"]})
    assert [len(words) for words in rows.wordings] == [3, 2]


def test_prompts_name_labels_of_the_model() -> None:
    model = small(labels=["liver", "plaque_left", "thymus"], trained_labels=["liver", "plaque_left"])
    for text in ("plaque_left", "Plaque left", "left plaque"):
        (prompt,) = understand([text], model)
        assert prompt.name == "plaque_left" and prompt.trained and prompt.warning is None
    assert understand(["hepar"], model)[0].name == "liver"
    (prompt,) = understand(["thymsu"], model)
    assert prompt.warning is not None and "did you mean 'thymus'?" in prompt.warning
    with pytest.raises(InputError, match="did you mean 'plaque_left'"):
        understand(["plague left"], model)
    numbers = {p.name: p.number for p in understand(["something else", "thymus", "liver", "contrast pool"], model)}
    assert numbers == {"something else": 3, "thymus": 2, "liver": None, "contrast pool": 4}  # above both own labels
    assert meant_name("Left plaque", ["liver", "plaque_left"], "mask") == "plaque_left"
    assert not unknown_label_notes(["liver", "plaque_left"])
    assert unknown_label_notes(["livr"])


def test_rules_of_post_processing_name_them() -> None:
    table = asked_rules(["left plaque=minimum_size(ml=2)", "hepar=fill_holes"], None)
    processing = PostProcessing(table, ["plaque_left", "liver"])
    built = {name: [rule for rule, _ in rules] for name, rules in processing._built.items()}
    assert built == {"plaque_left": ["minimum_size(ml=2.0)"], "liver": ["fill_holes"]}
    table = asked_rules(
        ["plaque_left=fill_holes", "left plaque=largest_component", "liver=inside(organ='L plaque')"], None
    )
    processing = PostProcessing(table, ["plaque_left", "liver"])
    assert [rule for rule, _ in processing._built["plaque_left"]] == ["fill_holes", "largest_component"]
    assert processing._built["liver"][0][1].reads == ("plaque_left",)


def test_all_stands_for_what_the_model_was_trained_on() -> None:
    model = small(labels=["liver", "spleen", "thymus"], trained_labels=["liver", "thymus"])
    for asked in (["all"], ["everything", "liver"], ["thymus", "ALL"]):
        found = understand(asked, model)
        assert sorted(prompt.name for prompt in found) == ["liver", "thymus"] and not any(p.warning for p in found)
    with pytest.raises(InputError, match="'all' asks for what the model was trained on, and its weights are random"):
        understand(["all"], small(labels=["liver"]))
    several = ("all, mandible", "everything and mandible", "mandible; all structures", "all/mandible", "all\nmandible")
    for text in (*several, "all - mandible", "All: mandible"):
        with pytest.raises(InputError, match="names more than '(all|All|everything|all structures)'"):
            understand([text], model)


def test_from_a_folder_to_masks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = nnunet(tmp_path / "data", {name: plaques() for name in "abcd"}, PLAQUES)
    own = ["--own", "plaque_left", "--own", "plaque_right"]
    prepared = ["data", "prepare", str(folder), "-o", str(tmp_path / "out"), "--memory", "1500MB"]
    assert main(prepared) == 2 and "--own plaque_left" in capsys.readouterr().err
    for command in (prepared, ["data", "check", str(folder)]):
        assert main([*command, *own, "--own", "thymus"]) == 2
        assert "no case annotates 'thymus'" in capsys.readouterr().err
    assert main(["data", "check", str(folder), *own]) == 0
    assert main([*prepared, *own]) == 0
    run = load_run_config(tmp_path / "out" / "run.yaml", [])
    assert run.labels == ("liver", "plaque_left", "plaque_right")
    assert run.own_structures == {"plaque_left": (), "plaque_right": ()}
    short = ["train.steps=2", "train.ema=0", "train.tracker=none", "train.threads=1"]
    towerless = ["bank=trained", "text_encoder=bank(width=8)", "model.text_dim=8", "sampling.prompts=2"]
    assert main(["train", "--config", str(tmp_path / "out" / "run.yaml"), *short, *towerless]) == 0
    model, masks = str(tmp_path / "out" / "run" / "model"), tmp_path / "masks"
    capsys.readouterr()
    ct = str(folder / "imagesTr" / "a_0000.nii.gz")
    assert main(["segment", ct, "-p", "left plaque", "-p", "liver", "-m", model, "-o", str(masks), "--multilabel"]) == 0
    assert "not trained" not in capsys.readouterr().err
    assert nib.load(masks / "a_0000.nii.gz").shape == SHAPE
    assert {e["name"]: e["id"] for e in read_label_table(masks / "a_0000.nii.gz")} == {"plaque_left": 137, "liver": 5}
    last = ["segment", ct, "-p", "plaque right", "-m", model, "-o", str(tmp_path / "last"), "--multilabel"]
    assert main(last) == 0  # the number is that of the model, not that of the prompts
    assert [e["id"] for e in read_label_table(tmp_path / "last" / "a_0000.nii.gz")] == [138]


def test_a_resumed_run_keeps_its_structures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = nnunet(tmp_path / "data", {name: liver_map() for name in "ab"}, {"liver": 1, "thymus": 2})
    prepared = ["data", "prepare", str(folder), "-o", str(tmp_path / "out"), "--memory", "1500MB", "--held-out", "0"]
    assert main([*prepared, "--own", "thymus"]) == 0
    train = ["train", "--config", str(tmp_path / "out" / "run.yaml"), "train.ema=0", "train.tracker=none",
             "train.threads=1", "bank=trained", "text_encoder=bank(width=8)", "model.text_dim=8"]  # fmt: skip
    assert main([*train, "train.steps=1"]) == 0
    assert main([*train, "train.steps=1", "structures={thymus: [thymic gland]}"]) == 2
    assert "was started with another 'structures.thymus'" in capsys.readouterr().err


def test_a_model_keeps_the_other_words_of_its_structures(tmp_path: Path) -> None:
    words = {"thymus": ["thymic gland"], "plaque_left": ["left calcification"]}
    model = small(labels=["liver", "plaque_left", "thymus"], trained_labels=["liver", "thymus"], synonyms=words)
    model.save_pretrained(tmp_path)
    loaded = MoME.from_pretrained(tmp_path)
    assert loaded.config.synonyms == words
    for text, name in (("thymic gland", "thymus"), ("Gland, thymic", "thymus"), ("calcification L", "plaque_left")):
        (prompt,) = understand([text], loaded)
        assert prompt.name == name and prompt.number is not None
    entries = {entry["name"]: entry for entry in json.loads((tmp_path / "labels.json").read_text())["labels"]}
    assert entries["thymus"] == {"name": "thymus", "synonyms": ["thymic gland"]}
    known = {"a": ["liver"], "b": {"thymus": ["thymic gland"]}, "c": {"thymus": []}}
    assert best_model(["thymic gland"], known, "model", "{} {}") == ("b", ["thymus"])
    loaded.relabel(["liver", "plaque_left"])
    assert loaded.config.synonyms == {"plaque_left": ["left calcification"]}
    assert "synonyms" not in small(labels=["liver"]).config.to_dict()


def test_labels_may_be_those_of_a_data_set(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("structures: {liver: [1, 2], thymus: 3}")
    mine = str(tmp_path / "mine.yaml")
    assert create_model("mome_ct_tiny", labels=mine).config.labels == ["liver", "thymus"]
    assert labels_of(mine) == ["liver", "thymus"]
    # A structure that is the union of two numbers is one, too.
    assert create_model("mome_ct_tiny", labels="lits").config.labels == ["liver", "liver_tumor"]


def test_words_of_a_model_take_nothing_from_the_class_table() -> None:
    model = small(labels=["liver", "thymus"], synonyms={"thymus": ["hepar"]})
    assert understand(["hepar"], model)[0].name == "liver"


@pytest.mark.parametrize(
    ("synonyms", "message"),
    [
        ({"thymsu": ["thymic gland"]}, "thymsu.*not among the labels"),
        ({"thymus": "thymic gland"}, "synonyms are lists of texts"),
        ({"thymus": [3]}, "synonyms are lists of texts"),
        ({"thymus": [""]}, "synonyms are lists of texts"),
        (["thymus"], "synonyms are lists of texts"),
        ({"thymus": ["x" * 10_000]}, "synonyms are lists of texts"),
        ({"thymus": ["x"] * 10_001}, "the limit is 10,000"),
    ],
)
def test_faulty_words_of_a_model_are_refused(synonyms: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        small(labels=["liver", "thymus"], synonyms=synonyms)


def test_a_run_writes_its_other_words_into_the_model(tmp_path: Path) -> None:
    folder = nnunet(tmp_path / "data", {name: liver_map() for name in "ab"}, {"liver": 1, "thymus": 2})
    prepared = ["data", "prepare", str(folder), "-o", str(tmp_path / "out"), "--memory", "1500MB", "--held-out", "0"]
    assert main([*prepared, "--own", "thymus"]) == 0
    train = ["train", "--config", str(tmp_path / "out" / "run.yaml"), "train.ema=0", "train.tracker=none",
             "train.threads=1", "bank=trained", "text_encoder=bank(width=8)", "model.text_dim=8"]  # fmt: skip
    assert main([*train, "train.steps=1", "structures={thymus: [thymic gland]}"]) == 0
    model = MoME.from_pretrained(tmp_path / "out" / "run" / "model")
    assert model.config.synonyms == {"thymus": ["thymic gland"]}
    assert understand(["thymic gland"], model)[0].name == "thymus"
