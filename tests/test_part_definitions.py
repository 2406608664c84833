"""What a class must keep to be a part: a frozen Config whose arguments can be read, and nested kinds that exist."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from mome.errors import InputError
from mome.registry import REGISTRIES, ROUTERS, Registry, part
from mome.spec import dump
from mome.typed import type_name


def new_registry() -> Registry:
    return Registry("thing", "mome.experts", "mome.test_things")


def refused(cls: type, registry: Registry | None = None) -> str:
    with pytest.raises(InputError) as caught:
        (registry or new_registry()).register("odd", cls)
    assert len(str(caught.value).splitlines()) <= 3
    return str(caught.value)


def with_field(annotation: Any) -> type:
    """A class whose Config has one field of the type."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        value: Any = None

    Config.__annotations__["value"] = annotation
    return type("Part", (), {"Config": Config})


@pytest.mark.parametrize(
    "annotation",
    [
        list,
        tuple,
        tuple[int, str],
        tuple[int, int],
        tuple[()],
        set,
        set[int],
        bytes,
        list[set],
        Literal[1.5],
        int | set,
    ],
)
def test_types_that_are_not_read_are_refused_at_registration(annotation: Any) -> None:
    message = refused(with_field(annotation))
    assert "argument 'value' of thing 'odd' has the type" in message and "which is not read" in message


@pytest.mark.parametrize(
    "annotation",
    [int, float | None, str, bool, dict, dict[str, int], list[list[str]], tuple[float, ...], Literal["a", 1], Any],
)
def test_types_that_are_read_are_accepted(annotation: Any) -> None:
    registry = new_registry()
    registry.register("fine", with_field(annotation))
    assert registry.names("fi*") == ["fine"]


def test_a_type_that_is_not_defined_is_said() -> None:
    message = refused(with_field("NoSuchType | None"))
    assert "types of the arguments of thing 'odd' cannot be read" in message and "NoSuchType" in message


class Unfrozen:
    @dataclass
    class Config:
        n: int = 1


def test_a_config_that_can_change_is_refused() -> None:
    message = refused(Unfrozen)
    assert "the Config of thing 'odd' is not frozen" in message and "@dataclass(frozen=True, kw_only=True)" in message


def test_a_faulty_part_of_a_package_is_refused_when_it_is_first_used() -> None:
    registry = new_registry()
    registry.register("late", f"{__name__}:Unfrozen")
    with pytest.raises(InputError, match="the Config of thing 'late' is not frozen"):
        registry.resolve("late")


def test_a_misspelt_kind_is_refused_where_it_is_written() -> None:
    with pytest.raises(InputError, match=r"part\('expert', …\).*did you mean 'experts'") as caught:
        part("expert", "swiglu(n=4)")
    assert "kinds: encoders, text_encoders, experts" in str(caught.value)
    assert all(part(kind, None).metadata == {"part": kind} for kind in REGISTRIES)


class Choosing:
    @dataclass(frozen=True, kw_only=True)
    class Config:
        mode: Literal["slices", "inflate"] = "slices"
        size: Literal[2, 4] | None = 2
        widths: tuple[int, ...] = field(default=(1, 2))


def test_choices_are_checked_by_value_and_type() -> None:
    registry = new_registry()
    registry.register("choosing", Choosing)
    full = registry.canonical("choosing(mode='inflate', size=None)")
    assert full == {"name": "choosing", "mode": "inflate", "size": None, "widths": [1, 2]}
    assert dump(full, registry) == "choosing(mode='inflate', size=None)"
    for text, words in (
        ("choosing(mode='slice')", "argument 'mode' is one of slices, inflate, got 'slice', did you mean 'slices'"),
        ("choosing(mode=2)", "argument 'mode' is one of slices, inflate, got 2"),
        ("choosing(size=2.0)", "argument 'size' is one of 2, 4 or None, got 2.0"),
        ("choosing(size=True)", "got True"),
    ):
        with pytest.raises(InputError, match=words):
            registry.canonical(text)
    assert type_name(Literal["a", "b"]) == "one of a, b"


def test_messages_list_the_other_parts_in_the_plural() -> None:
    for spec in ("tpk", "swiglu"):
        with pytest.raises(InputError, match="routers: ") as caught:
            ROUTERS.canonical(spec)
        assert "router has" not in str(caught.value)
    assert [registry.plural for registry in REGISTRIES.values()][-2:] == ["layers", "losses"]
