"""Prompts and their sides: every spelling of a side, pairs and groups, other anatomy, abbreviations, free text."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import small

from mome.errors import InputError
from mome.inference.packed import PackedMasks
from mome.labels import Label, load_table
from mome.labels.spelling import corrections, edit_distance
from mome.labels.vocabulary import load_vocabulary
from mome.metrics import evaluate_folder
from mome.prompts import embed_prompts, understand
from mome.registry import TEXT_ENCODERS
from mome.volumes import Grid, write_mask

TABLE = load_table()
VOCABULARY = load_vocabulary()
SIDED = [label for label in TABLE if label.laterality]
SPELLINGS = {
    "left": "left Left LEFT lefts l L lt Lt LT lt. (L) [left] sin. Sin sinister left-sided".split(),
    "right": "right Right RIGHT rights r R rt Rt RT rt. (R) [right] dex. Dext. dexter right-sided".split(),
}
PAROTIDS = ("parotid_gland_left", "parotid_gland_right")
KIDNEYS = ("kidney_left", "kidney_right")
LUNGS = ("lung_left", "lung_right")


def without_side(phrase: str) -> list[str]:
    return [word for word in phrase.replace("_", " ").split() if word not in ("left", "right")]


def wordings(label: Label) -> set[str]:
    """The name and the synonyms without their sides."""
    return {" ".join(without_side(phrase)) for phrase in (label.name, *label.synonyms)}


def placed(label: Label, wording: str, spelling: str) -> list[str]:
    """The wording with the side at every place."""
    words = wording.split()
    return [" ".join([*words[:at], spelling, *words[at:]]) for at in range(len(words) + 1)]


def assert_side(label: Label, prompt: str) -> None:
    found = TABLE.resolve(prompt)
    assert found.names == (label.name,) and found.label is label, (prompt, found)
    assert found.how in ("exact", "synonym") and found.warning is None


@pytest.mark.parametrize("separator", [" ", "_", "-", ".", ", ", "/"])
def test_names_keep_their_side_in_every_place(separator: str) -> None:
    for label in SIDED:
        for spelling in SPELLINGS[label.laterality]:
            for prompt in placed(label, " ".join(without_side(label.name)), spelling):
                assert_side(label, prompt.replace(" ", separator))


@pytest.mark.wide
@pytest.mark.parametrize("separator", [" ", "_"])
def test_synonyms_keep_their_side_in_every_place(separator: str) -> None:
    for label in SIDED:
        for wording, spelling in itertools.product(wordings(label), SPELLINGS[label.laterality]):
            for prompt in placed(label, wording, spelling):
                assert_side(label, prompt.replace(" ", separator))
                assert_side(label, prompt.upper())


def test_every_listed_word_for_a_side_is_one() -> None:
    for word, side in VOCABULARY.sides.items():
        for prompt in (f"{word} kidney", f"Kidney_{word}", f"KIDNEY, {word.upper()}."):
            found = TABLE.resolve(prompt)
            if side == "relative":
                assert found.how == "refused" and found.hint == "say left or right", prompt
            else:
                assert found.names == (KIDNEYS if side == "both" else (f"kidney_{side}",)), (prompt, found)


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_the_other_side_is_never_taken(data: st.DataObject) -> None:
    """Any label, wording, spelling and place, with letters of any case and noise around the words."""
    label = data.draw(st.sampled_from(SIDED))
    wording = data.draw(st.sampled_from(sorted(wordings(label))))
    spelling = data.draw(st.sampled_from(SPELLINGS[label.laterality]))
    prompt = data.draw(st.sampled_from(placed(label, wording, spelling)))
    for _ in range(data.draw(st.integers(0, 3))):
        at = data.draw(st.integers(0, len(prompt) - 1))
        prompt = prompt[:at] + prompt[at].swapcase() + prompt[at + 1 :]
    prompt = prompt.replace(" ", data.draw(st.sampled_from([" ", "  ", "_", "-", " - ", ": "])))
    assert_side(label, data.draw(st.sampled_from(["", "the ", "structure of ", "Entire "])) + prompt)


@pytest.mark.parametrize("form", ["name", "upper", "spaces", "plural", "compound"])
def test_every_name_and_synonym_is_found_in_all_forms(form: str) -> None:
    def plural(phrase: str) -> str:
        if phrase.endswith("y"):
            return phrase[:-1] + "ies"
        return phrase + ("es" if phrase.endswith(("s", "x", "ch", "sh")) else "s")

    change = {
        "name": lambda phrase: phrase.replace(" ", "_"),
        "upper": lambda phrase: phrase.upper().replace(" ", "-"),
        "spaces": lambda phrase: f"  {phrase.replace(' ', '  ').title()} ",
        "plural": plural,
        "compound": lambda phrase: "".join(phrase.title().split()),
    }[form]
    for label in TABLE:
        for phrase in (label.name.replace("_", " "), *label.synonyms):
            if form == "compound" and (label.laterality or any(c.isdigit() for c in phrase)):
                continue
            found = TABLE.resolve(change(phrase))
            assert found.names == (label.name,), (change(phrase), found)
            assert found.how in ("exact", "synonym")


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("Parotid_L", "parotid_gland_left"), ("L parotid", "parotid_gland_left"), ("Parotid_R", "parotid_gland_right"),
        ("Kidney_R", "kidney_right"), ("Lung_L", "lung_left"), ("Glnd_Adrenal_L", "adrenal_gland_left"),
        ("Glnd_Thyroid", "thyroid_gland"), ("SpinalCord", "spinal_cord"), ("Brainstem", "brainstem"),
        ("Brain", "brain"), ("Bone_Mandible", "mandible"), ("Esophagus", "esophagus"), ("Larynx", "larynx"),
        ("Bowel_Small", "small_bowel"), ("Bowel_Large", "colon"), ("Femur_Head_L", "femoral_head_left"),
        ("Femur_R", "femur_right"), ("Bladder", "urinary_bladder"), ("A_Aorta", "aorta"), ("A_Celiac", "celiac_trunk"),
        ("A_Subclavian_R", "subclavian_artery_right"), ("V_Venacava_I", "inferior_vena_cava"),
        ("V_Venacava_S", "superior_vena_cava"), ("V_Pulmonary", "pulmonary_vein"),
        ("V_Brachioceph_L", "brachiocephalic_vein_left"), ("A_Brachiocephls", "brachiocephalic_trunk"),
        ("A_Iliac_L", "iliac_artery_left"), ("V_Iliac_R", "iliac_vena_right"), ("Humerus_L", "humerus_left"),
        ("Rib05_L", "rib_left_5"), ("Rib_L_12", "rib_left_12"), ("rib 5R", "rib_right_5"),
        ("5th left rib", "rib_left_5"), ("Lung_LUL", "lung_upper_lobe_left"), ("RML", "lung_middle_lobe_right"),
        ("Musc_Iliopsoas_L", "iliopsoas_left"),
    ],
)  # fmt: skip
def test_names_of_radiotherapy(prompt: str, name: str) -> None:
    assert_side(TABLE[name], prompt)


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("structure of left kidney", "kidney_left"), ("Left kidney structure", "kidney_left"),
        ("Structure of right adrenal gland (body structure)", "adrenal_gland_right"),
        ("Entire left parotid gland", "parotid_gland_left"),
        ("Structure of upper lobe of left lung", "lung_upper_lobe_left"),
        ("Bone structure of left femur", "femur_left"), ("left-sided parotid", "parotid_gland_left"),
        ("ren sinister", "kidney_left"), ("glandula parotidea dextra", "parotid_gland_right"),
        ("kidney on the left side", "kidney_left"), ("ParotidL", "parotid_gland_left"), ("LKidney", "kidney_left"),
        ("leftKidney", "kidney_left"), ("AdrenalGlandR", "adrenal_gland_right"), ("rightlung", "lung_right"),
        ("left kidneys", "kidney_left"), ("vertebra L 5", "vertebrae_L5"), ("L-5", "vertebrae_L5"),
        ("Th12", "vertebrae_T12"), ("lumbar vertebra 3", "vertebrae_L3"), ("Oesophagus", "esophagus"),
        ("LAA", "atrial_appendage_left"), ("spinal chord", "spinal_cord"), ("the left kidney's", "kidney_left"),
    ],
)  # fmt: skip
def test_other_wordings_of_a_side(prompt: str, name: str) -> None:
    assert_side(TABLE[name], prompt)


@pytest.mark.parametrize(
    ("prompt", "names"),
    [
        ("parotid", PAROTIDS), ("parotids", PAROTIDS), ("Parotids", PAROTIDS), ("both parotids", PAROTIDS),
        ("parotid glands", PAROTIDS), ("left and right parotid", PAROTIDS),
        ("right and left parotid glands", PAROTIDS), ("L/R parotid", PAROTIDS), ("bilateral parotid", PAROTIDS),
        ("Parotid_Bilat", PAROTIDS), ("left parotid and right parotid", PAROTIDS), ("kidney", KIDNEYS),
        ("kidneys", KIDNEYS), ("Kidneys", KIDNEYS), ("both kidneys", KIDNEYS), ("KIDNEYS_BOTH", KIDNEYS),
        ("lungs", LUNGS), ("Lung", LUNGS), ("femora", ("femur_left", "femur_right")),
        ("upper lobes of lung", ("lung_upper_lobe_left", "lung_upper_lobe_right")),
        ("first ribs", ("rib_left_1", "rib_right_1")), ("adrenals", ("adrenal_gland_left", "adrenal_gland_right")),
        ("bilateral kidney cysts", ("kidney_cyst_left", "kidney_cyst_right")),
    ],
)  # fmt: skip
def test_pairs_are_both_sides(prompt: str, names: tuple[str, ...]) -> None:
    found = TABLE.resolve(prompt)
    assert found.names == names and found.name is None and found.how == "pair"
    assert prompt in found.warning and f"{names[0]} and {names[1]}" in found.warning
    assert TABLE.names_of(prompt) == names


def test_every_sided_structure_without_its_side_is_its_pair() -> None:
    unsided = {tuple(without_side(label.name)) for label in TABLE if not label.laterality}
    for label in SIDED:
        words = without_side(label.name)
        if tuple(words) in unsided:
            continue  # "kidney cyst" is a label of its own
        found = TABLE.resolve(" ".join(words))
        assert set(found.names) == {label.name, label.mirror} - {None} and found.how == "pair" and found.warning


@pytest.mark.parametrize(
    ("prompt", "pattern", "count"),
    [
        ("ribs", "rib_", 24), ("rib", "rib_", 24), ("ribs left", "rib_left_", 12), ("Right ribs", "rib_right_", 12),
        ("all ribs", "rib_", 24), ("vertebrae", "vertebrae_", 25), ("vertebra", "vertebrae_", 25),
        ("spine", "vertebrae_", 25), ("lumbar vertebrae", "vertebrae_L", 5), ("L-spine", "vertebrae_L", 5),
        ("thoracic spine", "vertebrae_T", 12), ("cervical vertebrae", "vertebrae_C", 7), ("lung lobes", "lung_", 5),
        ("left lobes of lung", "lung_", 2), ("gluteal muscles", "gluteus_", 6), ("left glutei", "gluteus_", 3),
    ],
)  # fmt: skip
def test_groups_are_all_their_labels(prompt: str, pattern: str, count: int) -> None:
    found = TABLE.resolve(prompt)
    assert found.how == "group" and len(found.names) == len(set(found.names)) == count
    assert all(name.startswith(pattern) for name in found.names)
    assert str(count) in found.warning and prompt in found.warning


TERMS = sorted({*VOCABULARY.paired_terms, *VOCABULARY.unpaired_terms})


def test_other_anatomy_is_never_a_label() -> None:
    assert len(TERMS) > 300
    for term in TERMS:
        for prompt in (term, term.upper(), term.title().replace(" ", "_"), f"{term}s"):
            found = TABLE.resolve(prompt)
            assert found.names == () and found.how in ("free", "refused"), (prompt, found)


@pytest.mark.parametrize("side", ["left", "L", "rt.", "both"])
def test_other_anatomy_with_a_side_is_never_a_label(side: str) -> None:
    for term in TERMS:
        found = TABLE.resolve(f"{term} {side}")
        assert found.names == (), (term, found)
        assert found.how == "free" if side == "both" else found.how == "refused"
        if side == "both" and found.how == "free":
            assert found.free_text.startswith("left and right ") and found.free_text in found.warning


@pytest.mark.parametrize(
    "prompt", ["pharynx", "hyoid", "parathyroid", "carotid", "rectus", "ventricles", "scapha", "oropharynx", "fibula"]
)
def test_one_organ_is_no_typo_of_another(prompt: str) -> None:
    assert TABLE.resolve(prompt).names == ()


@pytest.mark.parametrize(
    ("prompt", "names"),
    [
        ("livr", ("liver",)), ("oesofagus", ("esophagus",)), ("mandibel", ("mandible",)),
        ("left kidny", ("kidney_left",)), ("Kidny_R", ("kidney_right",)), ("kidny", KIDNEYS),
        ("rigth parotid", ("parotid_gland_right",)), ("lef kidney cyst", ("kidney_cyst_left",)),
        ("leftt parottid", ("parotid_gland_left",)), ("kidney righ", ("kidney_right",)),
        ("bilaterall kidneys", KIDNEYS), ("kidnies", KIDNEYS),
    ],
)  # fmt: skip
def test_typos_are_corrected_and_said(prompt: str, names: tuple[str, ...]) -> None:
    found = TABLE.resolve(prompt)
    assert found.names == names and found.how == "close"
    assert prompt in found.warning and all(name in found.warning for name in names)
    assert TABLE.names_of(prompt) == ()


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("Cochlea_L", "left side"), ("left submandibular gland", "left side"), ("Glnd_Lacrimal_R", "right side"),
        ("LN_Neck_II_L", "lymph node"), ("Kidney_Cortex_L", "left side"), ("a lesion in the left lung", "left side"),
        ("left liver", "no left and right"), ("right spleen", "no left and right"),
        ("brainstem left", "no left and right"), ("both livers", "no left and right"),
        ("left lung middle lobe", "lung_middle_lobe_right only"),
        ("right atrial appendage", "atrial_appendage_left only"), ("left kidney and right lung", "several structures"),
        ("liver and spleen", "several structures"), ("Parotid_Ipsi", "'Ipsi'"),
        ("contralateral kidney", "'contralateral'"), ("left", "names no structure"), ("R", "names no structure"),
        ("kidneyl", "may name the left side"), ("llung", "may name the left side"), ("left rib 13", "left side"),
        ("A_Carotid_L", "left side"), ("left L5", "no left and right"), ("kidney L1", "'L1' may be a side"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_refused(prompt: str, words: str) -> None:
    model = small()
    found = TABLE.resolve(prompt)
    assert found.how == "refused" and found.names == () and words in found.warning and found.hint
    with pytest.raises(InputError) as caught:
        understand([prompt], model)
    assert words in str(caught.value) and "try:" in str(caught.value) and len(str(caught.value).splitlines()) <= 3


def test_abbreviations_are_labels_or_refused() -> None:
    for short, words in {"GB": "gallbladder", "IVC": "inferior_vena_cava", "SVC": "superior_vena_cava"}.items():
        assert TABLE.resolve(short).name == TABLE.resolve(short.lower()).name == words
    assert (
        TABLE.resolve("RUL").name == "lung_upper_lobe_right"
        and TABLE.resolve("LCCA").name == "common_carotid_artery_left"
    )
    for short, meanings in VOCABULARY.refused.items():
        for prompt in (short, short.upper(), f"{short.upper()} L", f"LN {short}"):
            found = TABLE.resolve(prompt)
            assert found.how == "refused" and found.names == (), prompt
        assert meanings.split(";")[0] in TABLE.resolve(short).warning
    for short in ("XYZ", "IVS", "qqx", "Lens OD", "SVVC"):
        assert TABLE.resolve(short).how == "refused", short
    for text in ("PTV_7000", "Lungs-GTV", "SpinalCord_PRV05"):
        assert TABLE.resolve(text).how == "refused", text


def test_abbreviations_stand_for_labels() -> None:
    for short, words in VOCABULARY.expanded.items():
        if words not in ("bilateral", "left", "right"):
            assert TABLE.resolve(short).names, short


def test_free_text_for_a_paired_structure_names_both_sides() -> None:
    for prompt in ("cochlea", "Cochleas", "optic nerve", "both cochleae", "bilateral lenses"):
        found = TABLE.resolve(prompt)
        assert found.how == "free" and found.free_text.startswith("left and right ") and "both sides" in found.warning
    for prompt in ("horseshoe kidney", "superficial parotid", "optic nerve sheath", "let kidney", "lung nodule"):
        found = TABLE.resolve(prompt)
        assert found.names == () and found.free_text == f"left and right {prompt}", found
    for prompt in ("pharynx", "a hypodense lesion", "hepatic artery", "third ventricle", "rib cage"):
        assert TABLE.resolve(prompt).free_text is None


def test_pairs_become_one_prompt_per_label() -> None:
    model = small(
        labels=["kidney_left", "kidney_right", "liver"], trained_labels=["kidney_left", "kidney_right", "liver"]
    )
    model.text_bank.set(torch.randn(3, 12))
    prompts = understand(["liver", "kidneys", "Kidney_R", "kidney"], model)
    assert [p.name for p in prompts] == ["liver", "kidney_left", "kidney_right"]
    assert [p.text for p in prompts] == ["liver", "kidneys", "kidneys"]
    assert [p.warning is not None for p in prompts] == [False, True, False]
    later = {p.name: p for p in understand(["Kidney_L", "kidneys"], model)}
    assert later["kidney_left"].warning is None and "both" in later["kidney_right"].warning
    assert torch.equal(embed_prompts(prompts, model), model.text_bank.rows_LT[[2, 0, 1]])


def test_a_models_own_label_is_not_read() -> None:
    model = small(labels=["cochlea_left", "SMA", "parotid"], trained_labels=["parotid"])
    assert [p.name for p in understand(["cochlea_left", "SMA", " parotid"], model)] == [
        "cochlea_left",
        "SMA",
        "parotid",
    ]
    assert understand(["parotid"], model)[0].warning is None


def test_the_text_tower_gets_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    class Tower:
        needs_tower = True

        def encode(self, texts: list[str]) -> torch.Tensor:
            asked.extend(texts)
            return torch.zeros(len(texts), 12)

    monkeypatch.setattr("mome.prompts._tower", lambda spec: Tower())
    prompts = understand(["cochlea", "pharynx", "heart"], small())
    assert [p.name for p in prompts] == ["cochlea", "pharynx", "heart"]
    embed_prompts(prompts, small())
    assert asked == ["left and right cochlea", "pharynx", "heart"]


def test_typos_by_distance() -> None:
    pairs = {("liver", "livr"): 1, ("left", "lfet"): 1, ("larynx", "pharynx"): 2, ("", "abc"): 3, ("same", "same"): 0}
    for (a, b), distance in pairs.items():
        assert edit_distance(a, b) == edit_distance(b, a) == distance
    known = ["parotid", "liver", "esophagus", "lien"]
    assert corrections("carotid", known) == [] and corrections("river", known) == []
    assert corrections("parotd", known) == ["parotid"] and corrections("esofagus", known) == ["esophagus"]
    assert corrections("line", known) == [] and corrections("liv", known) == []


def test_a_hub_that_cannot_be_reached_is_asked_once(monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    """The Hub's library would repeat its requests for most of a minute."""
    from huggingface_hub import constants

    requests: list[str] = []

    class NoNetwork:
        def head(self, url: str, timeout: float) -> None:
            assert timeout <= 5
            requests.append(url)
            raise ConnectionError("no route to host")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.get_session", NoNetwork)
    tower = TEXT_ENCODERS.build("hf(model='nobody/no-such-tower', width=4)")
    with pytest.raises(InputError, match="'nobody/no-such-tower' .* cannot be loaded") as caught:
        tower.encode(["liver"])
    assert len(requests) == 1 and constants.HF_HUB_OFFLINE is False and "Retrying" not in caplog.text
    assert len(str(caught.value).splitlines()) <= 3 and "hf download nobody/no-such-tower" in str(caught.value)


def test_masks_are_found_by_other_names() -> None:
    masks = PackedMasks(["kidney_left", "kidney_right"], (4, 4, 4), axis=2)
    assert masks.name_of("Kidney_L") == masks.name_of("sin. kidney") == "kidney_left" and "kidney (R)" in masks
    for key in ("kidneys", "kidny left", "Cochlea_L", "SMA"):
        with pytest.raises(KeyError, match="only of kidney_left, kidney_right"):
            masks[key]


def test_pairs_are_evaluated_as_both_sides(tmp_path: Path) -> None:
    grid = Grid((6, 6, 6), np.eye(4))
    for name in ("kidney_left", "kidney_right", "liver"):
        write_mask(tmp_path / f"a_{name}.nii.gz", np.ones((6, 6, 6), np.uint8), grid)
    scores = evaluate_folder(tmp_path, tmp_path, structures=["kidneys"])
    assert sorted(score.structure for score in scores) == ["kidney_left", "kidney_right"]
    assert [score.structure for score in evaluate_folder(tmp_path, tmp_path, structures="Kidney_R")] == ["kidney_right"]
