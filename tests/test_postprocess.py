"""Post-processing of masks: every rule on masks whose answer is known, and the tables of rules."""

from __future__ import annotations

import importlib
from itertools import product

import numpy as np
import pytest
from scipy import ndimage

from mome.errors import InputError
from mome.postprocess import POSTPROCESSORS, components
from mome.postprocess.base import MaskPlace
from mome.postprocess.components import label_pieces
from mome.postprocess.rules import asked_rules, checked_rules, default_rules
from mome.postprocess.run import PostProcessing, mask_inside
from mome.volumes import Grid

SHAPE = (24, 20, 18)
GRID = Grid(SHAPE, np.diag([2.0, 1.0, 5.0, 1.0]))  # 0.01 ml per voxel


class Masks:
    """Whole arrays in the form of `BoxedMasks`."""

    def __init__(self, **masks: np.ndarray) -> None:
        self.masks, self.names, self.shape = masks, list(masks), SHAPE
        self.replaced: list[str] = []

    def box(self, name):
        at = np.argwhere(self.masks[name])
        if not len(at):
            return ((0, 0),) * 3
        return tuple((int(a), int(b) + 1) for a, b in zip(at.min(0), at.max(0), strict=True))

    def crop(self, name):
        return self.masks[name][tuple(slice(*sides) for sides in self.box(name))].astype(np.uint8)

    def replace(self, name, first, block):
        self.replaced.append(name)
        self.masks[name] = np.zeros(self.shape, bool)
        self.masks[name][tuple(slice(a, a + n) for a, n in zip(first, block.shape, strict=True))] = block


def blocks(*boxes: tuple[int, int, int, int, int, int]) -> np.ndarray:
    """A mask of boxes (first i, j, k, and sizes)."""
    mask = np.zeros(SHAPE, bool)
    for i, j, k, *size in boxes:
        mask[i : i + size[0], j : j + size[1], k : k + size[2]] = True
    return mask


LARGE, MIDDLE, SMALL = (2, 2, 2, 6, 5, 4), (12, 3, 3, 3, 3, 3), (20, 15, 15, 1, 1, 2)


def run(rule: str | list[str], **masks: np.ndarray) -> tuple[Masks, list[str]]:
    held = Masks(**masks)
    table = rule if isinstance(rule, dict) else asked_rules(rule, None)
    notes = PostProcessing(table, held.names).run(held, GRID)
    return held, notes


def test_the_largest_pieces_stay() -> None:
    mask = blocks(LARGE, MIDDLE, SMALL)
    held, notes = run("largest_component", a=mask)
    assert np.array_equal(held.masks["a"], blocks(LARGE))
    assert notes == ["2 pieces, 0.29 ml, removed from a (largest_component)"]
    held, notes = run("largest_component(n=2)", a=mask)
    assert np.array_equal(held.masks["a"], blocks(LARGE, MIDDLE)) and notes[0].startswith("1 piece, 0.02 ml, removed")
    held, notes = run("largest_component(n=3)", a=mask)
    assert not notes and not held.replaced


def test_small_pieces_are_removed_by_volume_and_by_share() -> None:
    mask = blocks(LARGE, MIDDLE, SMALL)  # 1.2, 0.27 and 0.02 ml
    for rule, kept in (
        ("minimum_size(ml=0.02)", (LARGE, MIDDLE, SMALL)),
        ("minimum_size(ml=0.021)", (LARGE, MIDDLE)),
        ("minimum_size(ml=0.27)", (LARGE, MIDDLE)),
        ("minimum_size(ml=0, share=0.3)", (LARGE,)),
        ("minimum_size(ml=1.3)", ()),
    ):
        held, notes = run(rule, a=mask)
        assert np.array_equal(held.masks["a"], blocks(*kept)), rule
        assert bool(notes) == (len(kept) < 3)
    assert notes == ["3 pieces, 1.5 ml, removed from a (minimum_size(ml=1.3)), whose mask is now empty"]


def test_pieces_near_the_largest_stay_in_chains() -> None:
    chain = [(2, 2, 2, 4, 4, 4), (2, 2, 7, 2, 2, 2), (2, 2, 10, 2, 2, 1)]  # gaps of 2 planes and 2 planes, 5 mm each
    far = (18, 15, 2, 2, 2, 2)
    held, notes = run("keep_near(mm=10)", a=blocks(*chain, far))
    assert np.array_equal(held.masks["a"], blocks(*chain)) and len(notes) == 1
    held, _ = run("keep_near(mm=9.9)", a=blocks(*chain, far))
    assert np.array_equal(held.masks["a"], blocks(chain[0]))
    held, notes = run("keep_near(mm=1000)", a=blocks(*chain, far))
    assert not notes


def test_holes_are_filled_up_to_a_volume() -> None:
    mask = blocks((2, 2, 2, 10, 10, 8))
    mask[4:6, 4:6, 4:6] = False  # 0.08 ml
    mask[8, 8, 8] = False  # 0.01 ml
    mask[11, 5, 5] = False  # open to the outside
    held, notes = run("fill_holes", a=mask)
    filled = blocks((2, 2, 2, 10, 10, 8))
    filled[11, 5, 5] = False
    assert np.array_equal(held.masks["a"], filled) and notes == ["holes of 0.09 ml filled in a (fill_holes)"]
    held, notes = run("fill_holes(largest_ml=0.01)", a=mask)
    assert held.masks["a"][8, 8, 8] and not held.masks["a"][4, 4, 4] and "0.01 ml" in notes[0]
    _, notes = run("fill_holes", a=blocks(LARGE))
    assert not notes


def test_a_tumour_stays_inside_of_its_organ() -> None:
    liver, tumour = blocks((2, 2, 2, 8, 8, 8)), blocks((8, 4, 4, 4, 2, 2), (20, 15, 15, 2, 2, 2))
    held, notes = run("tumour=inside(organ='liver')", tumour=tumour, liver=liver)
    assert np.array_equal(held.masks["tumour"], tumour & liver)
    assert notes == ["0.16 ml outside of liver removed from tumour (inside(organ='liver'))"]
    grown = ndimage.distance_transform_edt(~liver, sampling=GRID.spacing) <= 2.5
    held, _ = run("tumour=inside(organ='hepar', mm=2.5)", tumour=tumour, liver=liver)
    assert np.array_equal(held.masks["tumour"], tumour & grown) and (tumour & grown).sum() > (tumour & liver).sum()
    held, _ = run("tumour=inside(organ='liver')", tumour=blocks((20, 15, 15, 2, 2, 2)), liver=liver)
    assert not held.masks["tumour"].any()
    held, notes = run("tumour=inside(organ='liver')", tumour=tumour, liver=np.zeros(SHAPE, bool))
    assert np.array_equal(held.masks["tumour"], tumour) and "the mask of liver is empty" in notes[0]


@pytest.mark.parametrize("rounding", [-1e-7, 0, 1e-7])
def test_rounding_of_a_header_decides_nothing(rounding: float) -> None:
    """A turned scan has voxels of 0.00999999 ml, say; pieces and gaps of exactly the limit were then beyond it."""
    grid = Grid(SHAPE, GRID.affine * (1 + rounding))
    pieces, chain = blocks(LARGE, MIDDLE), blocks((2, 2, 2, 4, 4, 4), (2, 2, 7, 2, 2, 2))
    hollow, beside = blocks((2, 2, 2, 10, 10, 8)), blocks((2, 2, 7, 2, 2, 1))
    hollow[4:6, 4:6, 4:6] = False
    for rule, mask, removed in (
        ("minimum_size(ml=0.27)", pieces, 0),
        ("minimum_size(ml=0.2701)", pieces, 27),
        ("keep_near(mm=10)", chain, 0),
        ("keep_near(mm=9.999)", chain, 8),
        ("fill_holes(largest_ml=0.08)", hollow, -8),
        ("fill_holes(largest_ml=0.0799)", hollow, 0),
        ("a=inside(organ='liver', mm=10)", beside, 0),
        ("a=inside(organ='liver', mm=9.999)", beside, 4),
    ):
        held = Masks(a=mask, liver=blocks((2, 2, 2, 4, 4, 4)))
        PostProcessing(asked_rules(rule, None), held.names).run(held, grid)
        assert int(mask.sum()) - int(held.masks["a"].sum()) == removed, rule


def test_the_organ_is_processed_before_the_tumour() -> None:
    liver, tumour = blocks((2, 2, 2, 8, 8, 8), (20, 15, 15, 3, 3, 2)), blocks((4, 4, 4, 2, 2, 2), (21, 16, 15, 1, 1, 1))
    rules = ["tumour=inside(organ='liver')", "liver=largest_component"]
    held, notes = run(rules, tumour=tumour, liver=liver)
    assert np.array_equal(held.masks["tumour"], blocks((4, 4, 4, 2, 2, 2))) and len(notes) == 2
    with pytest.raises(InputError, match="read each other"):
        run(["a=inside(organ='b')", "b=inside(organ='a')"], a=tumour, b=liver)
    with pytest.raises(InputError, match="not among the prompts") as error:
        run("inside(organ='liver')", tumour=tumour)
    assert "-p liver" in str(error.value)
    with pytest.raises(InputError, match="its own mask"):
        run("inside(organ='liver')", liver=liver)


@pytest.mark.parametrize("seed", range(4))
def test_pieces_are_the_same_with_and_without_cc3d(seed: int, monkeypatch) -> None:
    pytest.importorskip("cc3d", reason="connected-components-3d is not installed")
    rng = np.random.default_rng(seed)
    masks = [rng.random((13, 11, 9)) < share for share in (0.02, 0.08, 0.15, 0.4)] + [np.zeros((3, 3, 3), bool)]
    real = importlib.import_module

    def without(name: str, *rest):
        if name == "cc3d":
            raise ImportError(name)
        return real(name, *rest)

    fast = [label_pieces(mask) for mask in masks]
    monkeypatch.setattr(components.importlib, "import_module", without)
    for mask, (numbers, sizes) in zip(masks, fast, strict=True):
        plain, plain_sizes = label_pieces(mask)
        assert np.array_equal(numbers, plain) and np.array_equal(sizes, plain_sizes)
        assert np.array_equal(numbers > 0, mask) and np.all(np.diff(sizes) <= 0) and sizes.sum() == mask.sum()
        assert [np.count_nonzero(numbers == n + 1) for n in range(len(sizes))] == list(sizes)


def test_every_rule_works_on_random_masks_and_keeps_its_promise() -> None:
    rng = np.random.default_rng(0)
    rules = ["largest_component", "minimum_size(ml=0.05)", "keep_near(mm=4)", "fill_holes", "inside(organ='liver')"]
    assert {rule.partition("(")[0] for rule in rules} == set(POSTPROCESSORS.names())
    for rule, share in product(rules, (0.01, 0.3, 0.9)):
        masks = {"a": rng.random(SHAPE) < share, "liver": rng.random(SHAPE) < 0.5}
        held, _ = run(f"a={rule}", **{name: mask.copy() for name, mask in masks.items()})
        assert np.array_equal(held.masks["liver"], masks["liver"])
        before, after = masks["a"], held.masks["a"]
        assert np.all(after >= before) if rule == "fill_holes" else np.all(after <= before)
        once, again = run(f"a={rule}", a=after.copy(), liver=masks["liver"])
        assert not again and np.array_equal(once.masks["a"], after)  # a second run changes nothing
    _, notes = run(rules[:-1], a=np.zeros(SHAPE, bool))
    assert notes == []


def test_a_mask_inside_of_another_box() -> None:
    held = Masks(a=blocks(LARGE))
    box = ((0, 5), (4, 20), (3, 4))
    assert np.array_equal(mask_inside(held, "a", box), held.masks["a"][0:5, 4:20, 3:4])
    assert not mask_inside(held, "a", ((20, 24), (0, 5), (0, 5))).any()
    place = MaskPlace((1.0, 1.0, 1.0), 0.001, box, SHAPE, lambda n, b: mask_inside(held, n, b))
    assert place.other("a", box).any()


def test_what_a_request_means() -> None:
    own = {"spinal_cord": ["largest_component"]}
    assert asked_rules(None, None) == {} and asked_rules(None, own) == own
    assert asked_rules("none", own) == {} and asked_rules("rules", own) == own
    assert asked_rules("rules", None) == default_rules()
    assert asked_rules("largest_component(n=1)", own) == {"*": ["largest_component"]}
    pair = asked_rules(["kidneys=fill_holes", "left kidney=largest_component(n=2)", "my thing=fill_holes"], None)
    assert pair["kidney_left"] == ["fill_holes", "largest_component(n=2)"] and pair["my thing"] == ["fill_holes"]
    assert pair["kidney_right"] == ["fill_holes"]
    for wrong, message in (
        ("largest_components", "did you mean 'largest_component'"),
        ("rule", "did you mean 'rules'"),
        ("largest_component(n=0)", "at least 1"),
        ("minimum_size(share=5)", "minimum_size.share is from 0 to 1, got 5"),
        ("largest_component(k=2)", "k"),
        ("liver=", "config string|unknown"),
        ("inside", "organ"),
        ("inside(organ='kidneys')", "names 2 structures"),
        (["none", "fill_holes"], "switches post-processing off"),
    ):
        with pytest.raises(InputError, match=message) as error:
            asked_rules(wrong, None)
        assert len(str(error.value).splitlines()) <= 3


@pytest.mark.parametrize(
    "value",
    [
        [],
        "fill_holes",
        {"liver": "fill_holes"},
        {"liver": ["fill_holes"] * 11},
        {"liver": [{"name": "fill_holes"}]},
        {"liver": ["__import__('os')"]},
        {"liver": ["a" * 1000]},
        {3: ["fill_holes"]},
        {"": ["fill_holes"]},
        {str(n): [] for n in range(3000)},
    ],
)
def test_a_table_from_anybody_is_checked(value: object) -> None:
    with pytest.raises(InputError) as error:
        checked_rules(value)
    assert len(str(error.value)) < 500


def test_the_rules_of_the_package_are_valid() -> None:
    from mome.labels import load_table

    assert all(name in load_table() for name in default_rules())


def test_a_checkpoint_may_hold_rules(tmp_path) -> None:
    from mome.processing import MoMEProcessor

    plain = MoMEProcessor()
    assert plain.postprocess is None and "postprocess" not in plain.to_dict() and "postprocess" not in plain.settings()
    (tmp_path / "config.json").write_text("{}")  # a folder with a model
    rules = {"spinal_cord": ["keep_near(mm=10)", "minimum_size(ml=0.5)"]}
    MoMEProcessor(postprocess=rules).save_pretrained(tmp_path)
    loaded = MoMEProcessor.from_pretrained(tmp_path)
    assert loaded.postprocess == {"spinal_cord": ["keep_near", "minimum_size(ml=0.5)"]}  # 10 mm is the default
    file = tmp_path / "preprocessor_config.json"
    file.write_text(file.read_text().replace("minimum_size(ml=0.5)", "__import__('os')"))
    with pytest.raises(InputError, match="preprocessor_config.json|config string"):
        MoMEProcessor.from_pretrained(tmp_path)


def test_packed_masks_are_replaced() -> None:
    from mome.inference.packed import PackedMasks

    mask = blocks(LARGE, MIDDLE, SMALL)
    for axis in range(3):
        masks = PackedMasks(["a", "b"], SHAPE, axis)
        for plane in range(SHAPE[axis]):
            masks.write("a", [plane], np.take(mask, [plane], axis))
        notes = PostProcessing({"a": ["largest_component"]}, masks.names).run(masks, GRID)
        assert len(notes) == 1 and np.array_equal(masks["a"], blocks(LARGE)) and masks.voxels["a"] == 120
        PostProcessing({"*": ["minimum_size(ml=2)"]}, masks.names).run(masks, GRID)
        assert not masks["a"].any() and masks.voxels == {"a": 0, "b": 0}


def test_a_segmenter_applies_rules_and_notes_them() -> None:
    from small_scans import patient_affine, patient_hu
    from stand_in_models import Contrast

    from mome.inference import Segmenter
    from mome.processing import MoMEProcessor
    from mome.volumes import Volume

    hu = patient_hu().astype(np.float32)
    hu[:2, :2, :2] = 900  # a stray piece far from the bone
    volume = Volume(hu, patient_affine())
    model = Contrast(("liver", "spleen"), (0.7, 0.7), 16)
    rules = {"liver": ["largest_component"], "spleen": ["inside(organ='pancreas')"]}
    own = MoMEProcessor(spacing=[9, 9, 9], hu_window=(-1000, 1000), postprocess=rules)

    def segment(postprocess=None, processor=own):
        return Segmenter(model, processor, postprocess=postprocess, exact=True).segment(volume, ["liver", "spleen"])

    plain, ruled = segment("none"), segment()
    assert plain.masks["liver"][0, 0, 0] and not ruled.masks["liver"][0, 0, 0]
    assert np.array_equal(plain.masks["spleen"], ruled.masks["spleen"])
    assert ruled.volume_ml("liver") < plain.volume_ml("liver") and "postprocess" in ruled.seconds
    notes = [note for note in ruled.notes if note not in plain.notes]
    assert notes[0] == "inside(organ='pancreas') is not applied to spleen, because pancreas is not among the prompts"
    assert "1 piece" in notes[1] and "removed from liver (largest_component)" in notes[1] and len(notes) == 2
    everything = segment("largest_component", MoMEProcessor(spacing=[9, 9, 9], hu_window=(-1000, 1000)))
    assert not everything.masks["spleen"][0, 0, 0]
    with pytest.raises(InputError, match="pancreas"):
        segment("spleen=inside(organ='pancreas')")
