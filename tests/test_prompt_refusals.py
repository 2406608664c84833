"""Prompts whose words would be lost, guessed at or read as another structure: refused, or read as they are meant."""

from __future__ import annotations

import pytest
from small_models import small

from mome.errors import InputError
from mome.labels import load_table
from mome.labels.characters import LONGEST_PROMPT
from mome.labels.reading import MOST_WORDS
from mome.labels.spelling import rivals
from mome.labels.tokens import Token, split_capitals
from mome.labels.vocabulary import load_vocabulary
from mome.prompts import understand

TABLE = load_table()
VOCABULARY = load_vocabulary()
SIDED = [label for label in TABLE if label.laterality]


def assert_refused(prompt: str, *words: str) -> None:
    found = TABLE.resolve(prompt)
    assert found.how == "refused" and found.names == () and found.hint, (prompt, found)
    assert all(word in found.warning for word in words), found.warning


def assert_is(prompt: str, *names: str) -> None:
    assert TABLE.resolve(prompt).names == names, (prompt, TABLE.resolve(prompt))


@pytest.mark.parametrize(
    ("prompt", "word"),
    [
        ("rib 1 1 left", "'1'"), ("rib 5.5 left", "'5'"), ("T 1 2", "'2'"), ("T1.5", "'5'"), ("rib 5 6 left", "'5'"),
        ("ribs 1-3 left", "'1'"), ("rib 5.0 left", "'5'"), ("rib 5mm left", "'5mm'"), ("Kidney_L-03", "'3'"),
        ("Kidney_L+5mm", "'5mm'"), ("heart 2", "'2'"), ("left kidney 2", "'2'"), ("liver segment 4", "'4'"),
        ("two kidneys", "'two'"), ("first rib first left", "'first'"), ("rib twenty five left", "'twenty'"),
        ("rib V left", "'V'"), ("L3-5", "'5'"), ("thoracic vertebra 1 2", "'1'"), ("left 5th", "'5th'"),
    ],
)  # fmt: skip
def test_numbers_are_counted(prompt: str, word: str) -> None:
    assert_refused(prompt, f"has {word}", "not understood")


def test_repeated_names_are_one_structure() -> None:
    assert_is("T1 T1", "vertebrae_T1")
    assert_is("right kidney (ren dexter)", "kidney_right")
    assert_is("rib 1 left, rib 1 right", "rib_left_1", "rib_right_1")
    assert_is("left parotid and right parotid gland", "parotid_gland_left", "parotid_gland_right")
    assert_is("RUL and LUL", "lung_upper_lobe_left", "lung_upper_lobe_right")
    assert_is("rib five left", "rib_left_5")
    for prompt in ("left kidney, kidney cyst", "rib 1 left rib 2 left", "L4-L5", "kidneys lungs", "aorta of the heart"):
        assert_refused(prompt, "several structures")


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("LKid", "kidney_left"), ("KidL", "kidney_left"), ("FemHeadL", "femoral_head_left"), ("RLung", "lung_right"),
        ("KidneyR", "kidney_right"), ("LFemurHead", "femoral_head_left"), ("HipL", "hip_left"),
        ("RAdrenalGland", "adrenal_gland_right"), ("upperlobeL lung", "lung_upper_lobe_left"),
        ("GluteusMaximusR", "gluteus_maximus_right"), ("LtKidney", "kidney_left"), ("lunglt", "lung_left"),
        ("RibL5", "rib_left_5"), ("LungRUL", "lung_upper_lobe_right"), ("RULs", "lung_upper_lobe_right"),
    ],
)  # fmt: skip
def test_sides_are_split_off_at_capitals(prompt: str, name: str) -> None:
    assert_is(prompt, name)


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("LHeart", "'heart' has no left and right"), ("AortaR", "right"), ("heartl", "may name the left side"),
        ("liverl", "may name the left side"), ("rspleen", "may name the right side"), ("lungl", "left side"),
        ("Lkidny", "may name the left side"), ("Lcochlea", "may name the left side"), ("EyeR", "right side"),
        ("LFoo", "left side"), ("CostaL", "'CostaL'"), ("AortaL", "no left and right"), ("leftcochlea", "left side"),
        ("nonleft kidney", "'left'"),
        ("outright kidney", "'right'"), ("leftkidneyfoo", "'left'"), ("L1Kidney", "'L1Kidney'"),
        ("left heart", "no left and right"), ("perikidney", "'perikidney'"), ("rleft kidney", "'left'"),
    ],
)  # fmt: skip
def test_glued_sides_that_no_label_has(prompt: str, words: str) -> None:
    assert_refused(prompt, words)


def test_capitals() -> None:
    def split(word: str) -> list[str]:
        return [part.text for part in split_capitals(Token(word.lower(), word))]

    assert split("LKid") == ["l", "kid"] and split("FemHeadL") == ["fem", "head", "l"]
    assert split("KIDNEY") == ["kidney"] and split("kidney") == ["kidney"] and split("PTVLeft") == ["ptv", "left"]
    assert split("L5") == ["l5"] and split("Højre") == ["højre"]


@pytest.mark.parametrize("word", [word for word, side in VOCABULARY.sides.items() if side == "relative"])
def test_sides_that_depend_on_another(word: str) -> None:
    for prompt in (f"{word} kidney", f"Lung_{word}", f"{word} side parotid", f"{word}_side left kidney", f"{word} eye"):
        assert_refused(prompt, "depends on what it is compared with")


@pytest.mark.parametrize("word", ["w/o", *sorted(VOCABULARY.negations)])
def test_negations(word: str) -> None:
    for prompt in (f"right {word} left kidney", f"{word}-left kidney", f"kidney {word} left", f"liver {word} tumor"):
        assert_refused(prompt, "takes something away")
    assert_refused(f"{word.title()}Left kidney" if word.isalpha() else f"{word} left kidney")


@pytest.mark.parametrize("word", sorted(VOCABULARY.alternatives))
def test_alternatives(word: str) -> None:
    for prompt in (f"left kidney {word} right kidney", f"left {word} right kidney", f"liver {word} spleen"):
        assert_refused(prompt, "leaves a choice")


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("left RUL", "'RUL', which is right"), ("LUL R", "'LUL', which is left"), ("both RUL", "both sides"),
        ("left upper lobe and RUL", "'RUL'"), ("RML left", "right"), ("LAA right", "left"), ("rcca L", "right"),
        ("right kidney left", "different places"), ("left kidney, right", "different places"),
        ("left kidney right lung", "different places"), ("right rib L5", "different places"),
        ("LeftKidneyRight", "different places"), ("bilateral left kidney", "both sides"),
        ("upper lobe right lung left", "different places"),
    ],
)  # fmt: skip
def test_sides_that_contradict_each_other(prompt: str, words: str) -> None:
    assert_refused(prompt, words)


@pytest.mark.parametrize(
    ("words", "side"),
    [
        ("venstre vänster vänstra vasen levá levý lewy lewa izq. izda sx li. gauche links esquerda sinistra lijevo",
         "left"),
        ("højre høyre höger hægri oikea pravá pravý prawy dcha dx re. droite rechts direita destra desno dreapta",
         "right"),
    ],
)  # fmt: skip
def test_sides_of_other_languages(words: str, side: str) -> None:
    for word in words.split():
        for prompt in (f"{word} kidney", f"kidney {word}", f"Kidney_{word.upper()}"):
            assert_is(prompt, f"kidney_{side}")
        assert_refused(f"{word} liver", f"names a side ({side})")


@pytest.mark.parametrize(
    "word",
    "D G S I der. esq dir sol sağ bal jobb kiri kanan ezker eskuin trái phải левый правая 左 右 왼쪽 αριστερός أيسر "
    "levyy- lewostronny vänstersidig ipsilatral contralatral leftmst A".split(),
)
def test_words_that_may_be_a_side_are_never_dropped(word: str) -> None:
    for structure in ("kidney", "Parotid", "lungs", "femoral head", "rib 5", "cochlea"):
        assert_refused(f"{structure} {word}")
        if word != "A":
            assert_refused(f"{word} {structure}")


@pytest.mark.parametrize(
    ("prompt", "choices"),
    [("spline", ("'spine'", "'spleen'")), ("rectun", ("'rectum'", "'rectus'")), ("splen", ("'spine'", "'spleen'"))],
)
def test_ambiguous_typos_are_refused_with_their_readings(prompt: str, choices: tuple[str, ...]) -> None:
    assert_refused(prompt, "may be a typo of", *choices)
    for prefix in ("the ", "Whole "):
        assert_refused(prefix + prompt)


def test_typos_of_paired_anatomy_are_no_free_text_without_sides() -> None:
    for prompt in ("cartoid", "cochlae", "lungg", "sumandibular gland"):
        assert_refused(prompt, "not understood")


def test_a_dash_between_spaces_may_mean_without() -> None:
    """Before, "liver - tumor" gave the mask of the tumor."""
    for prompt in ("liver - tumor", "liver \u2013 tumor", "liver -tumor", "Kidney - cyst", "lung - upper lobe left"):
        assert_refused(prompt, "may mean 'without'")
    for prompt, name in (
        ("liver-tumor", "liver_tumor"),
        ("liver tumor", "liver_tumor"),
        ("kidney - left", "kidney_left"),
        ("spinal - cord", "spinal_cord"),
        ("rib - left - 1", "rib_left_1"),
    ):
        assert_is(prompt, name)


def test_rivals() -> None:
    assert rivals("spline", ["spine", "spleen", "sternum"], ["spinous"]) == ["spine", "spleen"]
    assert rivals("rectun", ["rectum"], ["rectus", "rectal"]) == ["rectum", "rectus"]
    assert rivals("liver", ["kidney"], ["lever"]) == []


@pytest.mark.parametrize(
    "character",
    ["\x00", "\x07", "\u200b", "\u200d", "\u200e", "\u200f", "\u202e", "\u2066", "\ufeff", "\xad", "\u0336", "\u0338",
     "\u0456", "\u0430", "\u03bf", "\u00b2", "\u00bd", "\u2460", "\u2212", "~", "^", "!", "?", "*", "=", "<", "\u2190",
     "\u0665", "\U0001f449"],
)  # fmt: skip
def test_characters_that_are_refused(character: str) -> None:
    for prompt in (f"kidney{character} left", f"{character}left kidney", f"rib 1{character} left", f"liver{character}"):
        assert_refused(prompt, "U+")


def test_characters_that_are_read() -> None:
    for prompt in (
        "\uff4c\uff45\uff46\uff54 kidney", "kidney\u00a0left", "kidney\tleft\n", "l\u00e9ft kidney",
        "\u2018left\u2019 kidney", "kidney\u2014left", "le\u0301ft kidney", "kidney: [left]",
    ):  # fmt: skip
        assert_is(prompt, "kidney_left")
    assert_is("rib \uff15 left", "rib_left_5")
    assert_is("\U0001d425\U0001d422\U0001d42f\U0001d41e\U0001d42b", "liver")


def test_long_prompts_are_refused_at_once() -> None:
    model = small()
    for prompt in ("l" * 10_000, "left kidney " * 1000, " " * 10_000 + "liver", "a" * (LONGEST_PROMPT + 1)):
        assert_refused(prompt, f"at most {LONGEST_PROMPT}")
        with pytest.raises(InputError, match="has .* characters") as caught:
            understand([prompt], model)
        assert len(str(caught.value)) < 400
    assert_refused("rib 1 " * 11, f"more than {MOST_WORDS} words")


@pytest.mark.parametrize("word", [*sorted(VOCABULARY.derived), *"PTV CTVn GTVp1 PRV03 ITV PTVopt zPTV".split()])
def test_volumes_made_from_a_structure_are_not_the_structure(word: str) -> None:
    for structure in ("liver", "Kidney_L", "lungs", "SpinalCord", "CochleaL"):
        for prompt in (f"{structure}_{word}", f"{word} {structure}", f"{structure}-{word}"):
            assert_refused(prompt)


def test_terms_of_anatomy_may_hold_such_a_word() -> None:
    assert TABLE.resolve("costal margin").how == "free"
    assert_is("first part of the small intestine", "duodenum")


@pytest.mark.parametrize("spelling", ["L", "Left", "Lt", "R", "Right", "Rt", "LR"])
def test_every_sided_label_keeps_a_glued_side(spelling: str) -> None:
    """The side is written as one word with the capitalised name, before and after it."""
    for label in SIDED:
        words = [word for word in label.name.split("_") if word not in ("left", "right")]
        name = "".join(word.title() for word in words if not word.isdigit())
        number = next((word for word in words if word.isdigit()), "")
        wanted = {"L": ("left",), "R": ("right",)}[spelling[0]] if spelling != "LR" else ("left", "right")
        for prompt in (f"{spelling}{name} {number}", f"{name}{spelling} {number}"):
            found = TABLE.resolve(prompt)
            if found.how == "refused":
                assert label.mirror is None and set(wanted) != {label.laterality}, (prompt, found)
                continue
            asked = {TABLE[found_name].laterality for found_name in found.names}
            assert asked == set(wanted), (prompt, found)
            assert set(found.names) <= {label.name, label.mirror}, (prompt, found)


EXTRA = "xqz bal gooo 7 13 0.5 D s qw1 zz-top левый ptv not ring unclear".split()


@pytest.mark.parametrize("extra", EXTRA)
def test_an_extra_word_never_gives_a_label(extra: str) -> None:
    for label in TABLE:
        for phrase in (label.name, label.name.replace("_", " ").title()):
            for prompt in (f"{phrase} {extra}", f"{extra}_{phrase}"):
                found = TABLE.resolve(prompt)
                assert found.names == () and found.how in ("free", "refused"), (prompt, found)
                assert found.warning and extra.split("-")[0] in found.warning
                if label.laterality:
                    assert found.how == "refused", (prompt, found)


@pytest.mark.wide
@pytest.mark.parametrize("extra", [*EXTRA, "other", "L", "and", "kidney", "cyst", "upper"])
def test_an_extra_word_never_gives_another_label_silently(extra: str) -> None:
    for label in TABLE:
        for phrase in (label.name, *label.synonyms):
            for prompt in (f"{phrase} {extra}", f"{extra} {phrase}"):
                found = TABLE.resolve(prompt)
                if found.names and set(found.names) != {label.name}:
                    # The words of the prompt are those of the other label, or the note names what is asked for.
                    names = " ".join(found.names).split()
                    assert found.how in ("pair", "group", "close") or all(
                        extra in TABLE[name].name.split("_") or extra == "L" for name in names
                    ), (prompt, found)


def test_and_joins_sides_and_not_the_words_of_one_name() -> None:
    for prompt in ("liver and tumor", "left kidney + cyst", "lung & tumour", "kidney; cyst", "rib +5 left"):
        assert_refused(prompt, "joins two names by 'and'")
    assert_is("portal vein and splenic vein", "portal_vein_and_splenic_vein")
    assert_is("Portal & Splenic Veins", "portal_vein_and_splenic_vein")
    for prompt in ("kidney L+R", "left and right kidney", "left kidney and right"):
        assert_is(prompt, "kidney_left", "kidney_right")


def test_signs_of_numbers_and_names_within_words() -> None:
    for prompt in ("rib -5 left", "left rib -1", "-5 rib left", "rib (-5) left"):
        assert_refused(prompt, "negative number")
    assert_is("rib-5-left", "rib_left_5")
    for prompt in ("LULobe", "XHeartQ", "SpinalCordX"):
        assert_refused(prompt, "not understood")
    assert TABLE.resolve("renal").free_text == "left and right renal"


@pytest.mark.parametrize("prompt", ["lens OS", "eye OD", "parotid OS", "ear AS", "ear, a.d."])
def test_sides_of_eyes_and_ears_are_refused(prompt: str) -> None:
    assert load_table().resolve(prompt).how == "refused"


def test_the_latin_word_for_bone_is_no_side() -> None:
    table = load_table()
    assert table.resolve("os sacrum").names == ("sacrum",)
    assert table.resolve("os coxae left").names == ("hip_left",)


@pytest.mark.parametrize("prompt", ["larynx/pharynx", "larynx & pharynx", "trachea and bronchus"])
def test_a_label_joined_to_other_anatomy_is_refused(prompt: str) -> None:
    found = load_table().resolve(prompt)
    assert found.how == "refused" and "several structures" in (found.warning or "")


def test_a_comma_may_invert_one_name() -> None:
    assert load_table().resolve("cartilage, thyroid").how == "free"
