"""Cards of parts: what every registered part must document, and what a card shows of a part of another package."""

from __future__ import annotations

import dataclasses
import json
import textwrap
from dataclasses import dataclass
from typing import Any

import pytest

import mome
from mome.cards import card
from mome.cli.main import main
from mome.docstrings import argument_meanings, own_docstring, sources
from mome.errors import InputError
from mome.experts.base import TokenExperts
from mome.registry import EXPERTS, REGISTRIES, Registry

PARTS = [pytest.param(r, name, id=f"{r.kind}-{name}") for r in REGISTRIES.values() for name in r.names()]


def class_of(registry: Registry, name: str) -> Any:
    try:
        return registry.part_class(name)
    except InputError as error:
        if "not installed" not in str(error):
            raise
        pytest.skip(str(error))


@pytest.mark.parametrize(("registry", "name"), PARTS)
def test_every_part_documents_itself(registry: Registry, name: str) -> None:
    part_class = class_of(registry, name)
    assert registry.summary(name) and len(registry.summary(name)) <= 100
    meanings = argument_meanings(part_class.Config)
    missing = [f.name for f in dataclasses.fields(part_class.Config) if not meanings.get(f.name)]
    assert not missing
    assert sources(own_docstring(part_class)), "the class docstring names no paper, link or 'our choice'"


@pytest.mark.parametrize(("registry", "name"), PARTS)
def test_every_part_has_a_card(registry: Registry, name: str) -> None:
    class_of(registry, name)
    found = card(registry.kind, name)
    assert json.loads(json.dumps(found.as_dict()))["name"] == name
    assert [a.name for a in found.arguments] == [f.name for f in dataclasses.fields(registry.part_class(name).Config)]
    assert found.summary in str(found) and found.package == "mome"
    if registry.kind != "loss":
        assert found.fits


def test_the_card_of_an_encoder_says_where_sparse_layers_stand() -> None:
    assert mome.card("encoder", "vit3d").fits[1] == "Takes sparse layers as feed_forward=."
    assert mome.card("encoder", "unet").fits[1] == "Takes sparse layers as layer=."
    assert mome.card("encoder", "mednext").fits[1] == "Takes no sparse layers inside."


def test_a_card_of_a_router() -> None:
    found = mome.card("routers", "topk")
    assert found == mome.card("router", "topk")
    k = next(argument for argument in found.arguments if argument.name == "k")
    assert (k.type, k.default, k.meaning) == ("int", "2", "Experts per token.")
    assert found.fits[0] == "Gives every voxel the same number of experts: works with all experts."


def test_arguments_of_a_base_config_are_documented_by_it() -> None:
    found = {argument.name: argument for argument in mome.card("experts", "swiglu").arguments}
    assert (
        found["hidden"].meaning == "Hidden width; 0 takes it from `ratio`." and found["activation"].default == "'silu'"
    )
    assert mome.card("experts", "swiglu").sources == ("https://arxiv.org/abs/2002.05202",)


def test_nested_parts_are_shown_as_specs() -> None:
    found = mome.card("layer", "moe").arguments[1]
    assert (found.type, found.default) == ("a spec of routers", "topk(k=2)")


class Foreign(TokenExperts):
    """y = x, from another package.

    A second paragraph (Doe 2020, https://example.org/paper.).

    Attributes:
        hidden: Not part of the card.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Settings.

        Args:
            n: Number of experts,
                all alike.
            first, second: Two numbers.

        Raises:
            undocumented: This is not an argument.
        """

        n: int
        first: float = 1.0
        second: float = 2.0
        undocumented: bool = True


class Bare(TokenExperts):
    @dataclass(frozen=True, kw_only=True)
    class Config:
        n: int = 1


def test_a_part_of_another_package_has_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EXPERTS, "_entries", dict(EXPERTS._entries))
    EXPERTS.register("foreign", Foreign, owner="their-package", summary="from their-package")
    EXPERTS.register("bare", Bare, owner="their-package", summary="from their-package")
    found = card("experts", "foreign")
    assert found.summary == "y = x, from another package" and found.package == "their-package"
    assert found.description.endswith("(Doe 2020, https://example.org/paper.).")
    assert found.sources == ("https://example.org/paper",)
    meanings = {a.name: (a.default, a.meaning) for a in found.arguments}
    assert meanings["n"] == (None, "Number of experts, all alike.")
    assert meanings["second"] == ("2.0", "Two numbers.") and meanings["undocumented"] == ("True", "")
    assert "n  int, required" in str(found)
    bare = card("experts", "bare")
    assert bare.summary == "from their-package" and bare.description == "" and bare.arguments[0].meaning == ""


def test_mome_info_prints_a_card(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "router", "topk"]) == 0
    printed = capsys.readouterr().out
    assert "k  int, default 2\n      Experts per token." in printed and "\\x0a" not in printed
    assert main(["info", "routers", "topk", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["arguments"][0]["name"] == "k"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["routr", "topk"], "did you mean 'router"),
        (["router", "tpk"], "unknown router 'tpk', did you mean 'topk'"),
        (["router", "swiglu"], "'swiglu' is registered as an expert, not as a router"),
        (["router"], "the name of the router is missing"),
        (["swiglu"], "mome info expert swiglu"),
    ],
)
def test_what_has_no_card_is_said(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", *words]) == 2
    printed = capsys.readouterr().err
    assert message in printed and len(printed.strip().splitlines()) <= 3


def test_documentation_is_read_with_its_own_indentation() -> None:
    text = textwrap.dedent("""
        Args:
            a: First: with a colon,
                b: which is no argument.
            c, d: Both.
    """)
    config = type("Config", (), {"__doc__": text})
    assert argument_meanings(config) == {
        "a": "First: with a colon, b: which is no argument.",
        "c": "Both.",
        "d": "Both.",
    }


def test_the_test_of_sources_can_fail() -> None:
    assert not sources("After Fedus et al. 2021.") and not sources(own_docstring(Bare))
    assert sources("Fedus et al. 2021 (arXiv 2101.03961)") == ["https://arxiv.org/abs/2101.03961"]
    assert sources("Our choice.") == ["our choice"]
