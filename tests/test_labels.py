"""The class table, the resolver of prompts, and the label numbers of data sets."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mome.errors import InputError
from mome.labels import Label, LabelTable, dataset_names, load_dataset, load_table
from mome.labels.resolve import normalise

TABLE = load_table()


def test_every_name_and_synonym_resolves_to_its_label() -> None:
    for label in TABLE:
        assert TABLE.resolve(label.name).how == "exact" and TABLE.resolve(label.name).label is label
        for synonym in label.synonyms:
            found = TABLE.resolve(synonym.upper())
            assert found.name == label.name and found.how in ("synonym", "exact") and found.warning is None


def test_ids_are_unique_and_mirrors_are_pairs() -> None:
    assert [label.id for label in TABLE] == list(range(1, len(TABLE) + 1))
    for label in TABLE:
        assert label.laterality in (None, "left", "right") and all(0 <= c <= 255 for c in label.color)
        if label.mirror:
            other = TABLE[label.mirror]
            assert other.mirror == label.name and {label.laterality, other.laterality} == {"left", "right"}
            assert other.snomed == label.snomed
    assert TABLE["lung_middle_lobe_right"].mirror is None
    assert TABLE["liver"].snomed == "10200004" and TABLE["liver_tumor"].snomed is None


def test_data_sets() -> None:
    sizes = {name: len(load_dataset(name).name_to_id) for name in ("ancestor_32", "openkbp", "totalsegmentator_v2")}
    assert sizes == {"ancestor_32": 32, "openkbp": 7, "totalsegmentator_v2": 117}
    assert len(dataset_names()) >= 23
    assert load_dataset("openkbp").name_to_id["larynx"] == 7
    assert load_dataset("totalsegmentator_v2").name_to_id["liver"] == 5
    for name in ("nothing", "../table", "/etc/passwd", ""):
        with pytest.raises(InputError, match="unknown data set"):
            load_dataset(name)


@pytest.mark.parametrize(
    ("prompt", "name", "how"),
    [
        ("Left Parotid", "parotid_gland_left", "synonym"),
        ("parotid gland, left", "parotid_gland_left", "exact"),
        ("oesophagus", "esophagus", "synonym"),
        ("livr", "liver", "close"),
        ("left kidny", "kidney_left", "close"),
        ("vertebra L3", "vertebrae_L3", "synonym"),
        ("vertebra L8", None, "free"),
        ("left rib 13", None, "refused"),
        ("pancreas tumour", "pancreas_tumor", "synonym"),
        ("a hypodense lesion", None, "free"),
    ],
)
def test_resolver(prompt: str, name: str | None, how: str) -> None:
    found = TABLE.resolve(prompt)
    assert (found.name, found.how) == (name, how)
    assert (found.warning is None) == (how in ("exact", "synonym"))


def test_close_matches_never_change_sides() -> None:
    for label in TABLE:
        if label.mirror:
            typo = label.name.replace("_", " ")[:-1] if not label.name.endswith(("left", "right")) else None
            found = (
                TABLE.resolve(label.name.replace("_", " ").replace("a", "aa", 1))
                if typo is None
                else TABLE.resolve(typo)
            )
            assert found.name != label.mirror


def test_a_pair_without_its_side_is_both_sides_and_says_so() -> None:
    found = TABLE.resolve("kidney")
    assert found.name is None and "kidney_left and kidney_right" in found.warning
    assert found.how == "pair" and found.names == ("kidney_left", "kidney_right")


def test_empty_prompts() -> None:
    for prompt in ("", "  ", "_-"):
        with pytest.raises(InputError, match="empty"):
            TABLE.resolve(prompt)


def test_labels_need_no_torch() -> None:
    code = "import sys, mome.labels as l; l.load_table(); l.load_dataset('openkbp'); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_laterality_is_the_side_in_the_name() -> None:
    for label in TABLE:
        sides = [word for word in label.name.split("_") if word in ("left", "right")]
        assert sides == ([label.laterality] if label.laterality else []), label.name
        assert label.mirror is None or label.mirror in TABLE
        for phrase in label.synonyms:
            said = [word for word in phrase.split() if word in ("left", "right")]
            assert said in ([], [label.laterality]), phrase


def test_no_phrase_has_two_owners() -> None:
    owners: dict[str, set[str]] = {}
    for label in TABLE:
        for phrase in (label.name, *label.synonyms):
            owners.setdefault(normalise(phrase), set()).add(label.name)
    assert [phrase for phrase, names in owners.items() if len(names) > 1] == []
    # resolving compares normalised text, so a phrase that is not normalised would never be found
    assert all(normalise(phrase) == phrase for phrase in TABLE.phrases)

    def entry(number: int, name: str, *synonyms: str) -> Label:
        rest = {"laterality": None, "mirror": None, "snomed": None, "color": (0, 0, 0)}
        return Label(id=number, name=name, synonyms=synonyms, **rest)

    with pytest.raises(ValueError, match="'gut' names both bowel and colon"):
        LabelTable(1, [entry(1, "bowel", "gut"), entry(2, "colon", "gut")])


def test_the_numbers_of_a_data_set_are_its_own() -> None:
    for name in ("ancestor_32", "openkbp", "totalsegmentator_v2"):
        numbers = load_dataset(name).name_to_id
        assert sorted(numbers.values()) == list(range(1, len(numbers) + 1))
        assert all(label in TABLE for label in numbers)
    for name in ("../x", "../datasets/openkbp", "openkbp.yaml", "OpenKBP"):
        with pytest.raises(InputError, match="known: abdomenct_12organ, .*openkbp, .*totalsegmentator_v2"):
            load_dataset(name)


def test_a_parotid_without_its_side_is_both() -> None:
    for prompt in ("parotid gland", "Parotid_Gland"):
        found = TABLE.resolve(prompt)
        assert (found.name, found.label, found.how) == (None, None, "pair")
        assert "parotid_gland_left and parotid_gland_right" in found.warning


def details(text: str) -> tuple[set[str], list[str]]:
    words = normalise(text).split()
    return {w for w in words if w in ("left", "right")}, re.findall(r"\d+", " ".join(words))


@st.composite
def misspelt(draw: st.DrawFn) -> tuple[str, str]:
    """Draws a phrase of the table with letters lost, doubled, swapped or replaced, and perhaps its words shuffled."""
    words = draw(st.sampled_from(sorted(TABLE.phrases))).split()
    phrase = " ".join(words)
    free = [i for i, w in enumerate(words) if w not in ("left", "right") and w.isalpha() and len(w) > 3]
    for i in draw(st.lists(st.sampled_from(free), max_size=3)) if free else []:
        at = draw(st.integers(0, len(words[i]) - 2))
        w = words[i]
        words[i] = draw(
            st.sampled_from(
                (
                    w[:at] + w[at + 1 :],
                    w[:at] + w[at] + w[at:],
                    w[:at] + w[at + 1] + w[at] + w[at + 2 :],
                    w[:at] + draw(st.sampled_from("aeioustrn")) + w[at + 1 :],
                )
            )
        )
    if draw(st.booleans()):
        words = draw(st.permutations(words))
    return phrase, " ".join(words)


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(misspelt())
def test_close_matches_keep_the_side_and_the_digits(pair: tuple[str, str]) -> None:
    _, typed = pair
    found = TABLE.resolve(typed)
    if found.how != "close":
        return
    sides, digits = details(typed)
    assert found.name in found.warning and typed in found.warning
    assert sides == {found.label.laterality} - {None}
    if digits:
        assert details(found.name)[1] == digits


def test_digits_and_sides_that_do_not_exist_are_never_close() -> None:
    for region in ("vertebrae L", "vertebra T", "vertebra C", "lumbar vertebra ", "left rib ", "rib left "):
        for number in range(31):
            found = TABLE.resolve(f"{region}{number}")
            assert found.how != "close" and (found.name is None or details(found.name)[1] == [str(number)])
    for prompt in ("left liver", "right spleen", "left right kidney", "brainstem left"):
        found = TABLE.resolve(prompt)
        assert found.how != "close", found.name


@pytest.mark.parametrize(
    "prompt",
    ["second sacral vertebra", "sixth lumbar vertebra", "eighth cervical vertebra", "left thirteenth rib"],
)
def test_close_matches_keep_numbers_in_words(prompt: str) -> None:
    assert TABLE.resolve(prompt).name is None


@pytest.mark.parametrize("prompt", ["hepatic artery", "pulmonary trunk", "liver vein", "thyroid cartilage"])
def test_another_organ_is_never_a_close_match(prompt: str) -> None:
    assert TABLE.resolve(prompt).how == "free"


@pytest.mark.parametrize("prompt", ["7", "3.5", "12 7"])
def test_a_number_is_no_name_of_a_structure(prompt: str) -> None:
    found = TABLE.resolve(prompt)
    assert found.how == "refused" and "beside the other words" not in str(found.warning)


def test_a_side_that_a_structure_lacks_is_refused() -> None:
    assert TABLE.resolve("lung middle lobe left").how == "refused"


def test_a_misspelt_side_keeps_the_side() -> None:
    assert TABLE.resolve("lef kidney cyst").name == "kidney_cyst_left"
