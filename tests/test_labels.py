"""The class table, the resolver, the data sets' numbers."""

from __future__ import annotations

import subprocess
import sys

import pytest

from mome.errors import InputError
from mome.labels import dataset_names, load_dataset, load_table

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
    sizes = {name: len(load_dataset(name).name_to_id) for name in dataset_names()}
    assert sizes == {"ancestor_32": 32, "openkbp": 7, "totalsegmentator_v2": 117}
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
        ("left rib 13", None, "free"),
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


def test_a_pair_without_its_side_is_free_text_and_says_so() -> None:
    found = TABLE.resolve("kidney")
    assert found.name is None and "kidney_left and kidney_right" in found.warning


def test_empty_prompts() -> None:
    for prompt in ("", "  ", "_-"):
        with pytest.raises(InputError, match="empty"):
            TABLE.resolve(prompt)


def test_labels_need_no_torch() -> None:
    code = "import sys, mome.labels as l; l.load_table(); l.load_dataset('openkbp'); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
