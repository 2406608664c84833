"""Lists of parts and models: patterns, tags of weights, and the table of sizes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

import mome
from mome import MoME, create_model, list_models, list_parts
from mome.cli.main import main
from mome.errors import InputError
from mome.patterns import matching
from mome.presets import PRESETS, bundled_models, preset_sizes
from mome.pretrained import DEPRECATED_TAGS, PRETRAINED
from mome.processing import MoMEProcessor
from mome.registry import PARTS
from mome.zoo import measure_sizes

README = (Path(__file__).resolve().parent.parent / "README.md").read_text()

# -- patterns ---------------------------------------------------------------------------------------------------------


def test_parts_are_listed_by_patterns() -> None:
    assert list_parts("experts", ["*glu", "lin*"], exclude="ge*") == ["linear", "swiglu"]
    assert list_parts("text encoder", "none") == list_parts("text_encoders", "none") == ["none"]
    assert matching(["a", "b", "]", "A"], "[]a]") == ["]", "a"] and matching(["a", "b"], "[!a]") == ["b"]


@pytest.mark.parametrize(
    ("pattern", "words"),
    [("[a", "opens a bracket"), ("sw*[", "opens a bracket"), (" ", "is empty"), ([""], "is empty"), ([3], "is a text")],
)
def test_invalid_patterns_are_refused(pattern: object, words: str) -> None:
    for call in (
        lambda: list_parts("experts", pattern),
        lambda: list_models(pattern),
        lambda: list_models(exclude=pattern),
    ):
        with pytest.raises(InputError, match=words):
            call()


def test_several_patterns_and_exclusions(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "experts", "swi*", "lin*", "--json"]) == 0
    assert {row["name"] for row in json.loads(capsys.readouterr().out)["experts"]} >= {"swiglu", "linear"}
    assert main(["list", "experts", "*glu", "--exclude", "swi*", "--json"]) == 0
    assert [row["name"] for row in json.loads(capsys.readouterr().out)["experts"]] == ["geglu"]
    assert main(["list", "models", "mome-ct-tiny*", "--pretrained", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["models"]
    assert [row["name"] for row in rows] == ["mome_ct_tiny.openkbp", "mome_ct_tiny.torso"]
    assert all(row["licence"] == "Apache-2.0" for row in rows)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["experts", "swi*", "zzz*"], "nothing is called 'zzz*'"),
        (["experts", "zzz*", "--json"], "nothing is called 'zzz*'"),
        (["experts", "[a-"], "opens a bracket"),
        (["experts", "--exclude", "[a"], "opens a bracket"),
        (["experts", "--exclude", "*"], "nothing is called '*'"),
        (["routers", "topk", "--exclude", "*k"], "nothing is called 'topk' apart from what --exclude leaves out"),
        (["presets"], "did you mean 'models'"),
        (["experts", "--pretrained"], "--pretrained concerns models"),
        (["routers", "topq"], "did you mean 'topk'"),
    ],
)
def test_lists_refuse_what_they_cannot_show(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", *words]) == 2
    printed = capsys.readouterr()
    assert message in printed.err and not printed.out and len(printed.err.strip().splitlines()) <= 3


# -- tags -------------------------------------------------------------------------------------------------------------


def test_models_are_listed_by_patterns() -> None:
    assert list_models("plain*", exclude=["*-large", "*small"]) == ["plain_ct_base", "plain_ct_tiny"]
    weights = ["mome_ct_tiny.openkbp", "mome_ct_tiny.torso"]
    assert list_models(pretrained=True) == list_models("mome-ct-tiny.*", pretrained=True) == weights
    assert list_models(exclude="*") == [] and set(list_models()) == set(PRESETS)


def test_a_tag_loads_its_weights() -> None:
    tagged, plain = create_model("mome-ct-tiny.openkbp"), MoME.from_pretrained("mome-ct-tiny")
    default, loaded = create_model("mome_ct_tiny", pretrained=True), MoME.from_pretrained("mome_ct_tiny.openkbp")
    for model in (tagged, default, loaded):
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
    assert tagged.processor.settings() == MoMEProcessor.from_pretrained("mome-ct-tiny").settings()
    random = create_model("mome_ct_tiny.openkbp", pretrained=False)
    assert not random.config.trained_labels and tagged.config.trained_labels


def test_unknown_tags_are_refused() -> None:
    for call in (create_model, MoME.from_pretrained, mome.preset_processor):
        with pytest.raises(InputError, match="no weights tagged 'openkb', did you mean 'openkbp'"):
            call("mome_ct_tiny.openkb")
        with pytest.raises(InputError, match="no weights tagged 'x'"):
            call("mome_ct_base.x")


def test_a_replaced_tag_still_works_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DEPRECATED_TAGS, "mome_ct_tiny.heads", "mome_ct_tiny.openkbp")
    with pytest.warns(DeprecationWarning, match="now called 'mome_ct_tiny.openkbp'"):
        assert create_model("mome-ct-tiny.heads", pretrained=False).config.dim == 16


def test_every_bundled_checkpoint_has_a_tag() -> None:
    folders = [weights.folder for by_tag in PRETRAINED.values() for weights in by_tag.values()]
    assert sorted(folders) == bundled_models() and set(PRETRAINED) <= set(PRESETS)


# -- sizes ------------------------------------------------------------------------------------------------------------


def test_the_zoo_has_its_sizes() -> None:
    for family in ("mome_ct_{}", "mome_ct_{}_sparse", "universal_ct_{}", "plain_ct_{}"):
        assert all(family.format(size) in PRESETS for size in ("tiny", "small", "base", "large")), family
    for encoder in ("timm", "resenc", "vit3d"):
        assert list_models(f"mome_ct_{encoder}_*"), encoder
    assert list(preset_sizes()) == list(PRESETS)


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if "tiny" in n else pytest.mark.wide) for n in PRESETS])
def test_sizes_are_those_of_the_presets(name: str) -> None:
    """mome/preset_sizes.json is generated: python -m mome.zoo"""
    if "resenc" in name:
        pytest.importorskip("dynamic_network_architectures")
    assert json.loads(json.dumps(measure_sizes([name])))[name] == preset_sizes()[name]


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_builds_on_the_meta_device(name: str) -> None:
    if "resenc" in name:
        pytest.importorskip("dynamic_network_architectures")
    with torch.device("meta"):
        model = create_model(name)
    assert sum(parameter.numel() for parameter in model.parameters()) == preset_sizes()[name]["parameters"]
    assert model.config.part_strings() == preset_sizes()[name]["parts"]


def test_active_parameters_and_operations_follow_from_the_shapes() -> None:
    """One scale with four experts of which a voxel takes one, against a count by hand."""
    from mome.model_cost import measure

    sparse, dense = (
        measure(
            create_model(
                "mome_ct_tiny",
                encoder="unet(channels=[4, 8])",
                experts=experts,
                router="topk(k=1)",
                fusion="last",
                dim=8,
                patch_size=[8, 8, 8],
            )
        )
        for experts in ("swiglu(n=4, hidden=16)", "linear(n=1)")
    )
    expert = 3 * 8 * 16
    assert sparse.parameters - sparse.active_parameters == 3 * expert
    assert dense.parameters == dense.active_parameters
    voxels, router, linear = 8**3, 2 * 8 * 4, 2 * 8 * 8
    assert sparse.flops - dense.flops == voxels * (2 * expert + router - linear)
    assert sparse.prompt_flops == dense.prompt_flops > 0


def counted(experts: str, router: str):
    """The cost of a model with one scale of width 8, eight voxels along each axis, and two labels."""
    from mome.model_cost import measure

    parts = {"encoder": "unet(channels=[4, 8])", "fusion": "last", "dim": 8, "patch_size": [8, 8, 8]}
    return measure(create_model("mome_ct_tiny", experts=experts, router=router, labels=["liver", "spleen"], **parts))


SWIGLU = 3 * 8 * 8  # one swiglu expert of width 8 and hidden width 8
ADAPTIVE = "adaptive(experts=swiglu(n=4, hidden=8), zero=1, identity=1, constant=2)"


@pytest.mark.parametrize(
    ("experts", "router", "idle"),
    [
        ("swiglu(n=4, hidden=8)", "relu(k=1)", 3 * SWIGLU),
        ("swiglu(n=4, hidden=8)", "expert_choice(capacity=2.0)", 2 * SWIGLU),
        ("swiglu(n=4, hidden=8)", "soft", 0),
        ("shared(routed=swiglu(n=4, hidden=8), shared=swiglu(n=1, hidden=8))", "topk(k=2)", 2 * SWIGLU),
        ("lora(n=4, rank=4, base=linear)", "topk(k=2)", 2 * (2 * 4 * 8)),
        (ADAPTIVE, "topk(k=2)", 0.75 * (4 * SWIGLU + 2 * 3 * 8)),
        ("conv(n=4)", "topk(k=2)", 0),
    ],
)
def test_active_parameters_of_composed_experts(experts: str, router: str, idle: int) -> None:
    cost = counted(experts, router)
    assert cost.parameters - cost.active_parameters == idle
    assert cost.flops > 0


def test_an_even_load_is_counted_where_the_rows_depend_on_values() -> None:
    relu, topk = (counted("swiglu(n=4, hidden=8)", router) for router in ("relu(k=2)", "topk(k=2)"))
    assert relu.flops == topk.flops
    free = "adaptive(experts=swiglu(n=4, hidden=8), zero=2, identity=2, constant=0)"
    adaptive, routed = (counted(experts, "topk(k=2)") for experts in (free, "swiglu(n=8, hidden=8)"))
    assert routed.flops - adaptive.flops == 8**3 * 2 * SWIGLU  # half of the two assignments are to nested experts
    conv = [counted(f"conv(n={n})", "topk(k=1)").flops for n in (2, 3)]
    assert conv[1] - conv[0] == 8**3 * 2 * (27 * 8 + 8 * 8 + 8)  # one more expert, and its column of the router


def test_a_cost_that_depends_on_prompts_is_refused() -> None:
    with pytest.raises(InputError, match="cannot be counted") as caught:
        counted("swiglu(n=4, hidden=8)", "label_group")
    assert "router=label_group" in str(caught.value)


def test_a_measured_model_is_left_as_it_is() -> None:
    from mome.model_cost import measure

    model = create_model("plain_ct_tiny", patch_size=[32, 32, 32]).train()
    measure(model)
    assert model.training and all(p.requires_grad and p.device.type == "cpu" for p in model.parameters())


def test_the_readme_names_every_part() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", README, flags=re.MULTILINE))
    for part, registry in PARTS.items():
        named = set(re.findall(r"`(\w+)`", rows[part]))
        assert not {name for name in registry.names() if registry.origin(name)[0] == "mome"} ^ named, part


def test_the_readme_has_the_table_of_presets() -> None:
    rows = dict(re.findall(r"^\| `((?:mome|universal|plain)_ct_\w+)` \| (.*) \|$", README, flags=re.MULTILINE))
    assert list(rows) == list(PRESETS)
    for name, row in rows.items():
        entry = preset_sizes()[name]
        assert row == (
            f"{entry['parameters'] / 1e6:.1f} | {entry['active_parameters'] / 1e6:.1f} | {entry['flops'] / 1e9:.0f} | "
            f"{' × '.join(map(str, entry['patch_size']))} | {', '.join(entry['weights']) or 'none'}"
        ), name
