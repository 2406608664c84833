"""Config strings: the grammar, its round trip, and strings that want to be executed."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mome import spec as spec_module
from mome.errors import InputError
from mome.spec import SPEC_VERSION, SpecError, canonical, dump, migrate, parse

identifiers = st.from_regex(r"[a-z_][a-z0-9_]{0,8}", fullmatch=True).filter(spec_module._is_word)
names = st.lists(identifiers, min_size=1, max_size=2).map(".".join)
numbers = st.integers(-(10**12), 10**12) | st.floats(allow_nan=False, allow_infinity=False)
scalars = numbers | st.booleans() | st.none() | st.text(max_size=12)


def _specs(values: st.SearchStrategy) -> st.SearchStrategy:
    arguments = st.dictionaries(identifiers.filter(lambda k: k != "name"), values, max_size=3)
    return st.builds(lambda name, args: {"name": name, **args}, names, arguments)


values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=5).filter(lambda k: k != "name"), inner, max_size=3)
        | _specs(inner)
    ),
    max_leaves=8,
)


@given(_specs(values))
def test_round_trip(spec: dict) -> None:
    assert parse(dump(spec)) == spec
    assert json.loads(json.dumps(spec)) == canonical(spec)


@given(st.text(max_size=60))
def test_any_text_is_a_spec_or_a_spec_error(text: str) -> None:
    try:
        parsed = parse(text)
    except SpecError as error:
        assert len(str(error).splitlines()) <= 3
    else:
        assert isinstance(parsed["name"], str)


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('touch hacked')",
        "(lambda: 1)()",
        "x(a=open('/etc/passwd').read())",
        "x(a=[i for i in range(9)])",
        "x(a=1 + 1)",
        "x(**{'a': 1})",
        "x(a=b'bytes')",
        "x(a=f'{1}')",
        "x(a=1j)",
        "x(a=...)",
        "x(a:=1)",
        "x[0]",
        "x(a={1: 2})",
        "(" * 3000,
        "x(a=" + "[" * 800 + "]" * 800 + ")",
        "x" * 20_000,
        "",
        "3",
        "x(a=1e999)",
        "x(name='y')",
    ],
)
def test_hostile_strings_are_refused(text: str, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SpecError):
        parse(text)
    assert not list(tmp_path.iterdir())


def test_values() -> None:
    assert parse("a.b(c=[1, -2.5, (3, 4)], d={'x': y(z=true)}, e='t', f=null)") == {
        "name": "a.b",
        "c": [1, -2.5, [3, 4]],
        "d": {"x": {"name": "y", "z": True}},
        "e": "t",
        "f": None,
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("text-guided", "a name is written with _, not with -, at column 1\n  text-guided\n  ^"),
        (" ", "a config string is empty\n  try: begin with a name, as in mlp(n=4)"),
        ("swiglu(8)", "arguments need a name, write key=value, at column 8\n  swiglu(8)\n         ^"),
        ("swiglu(n=8", "not a config string: '(' was never closed, at column 7\n  swiglu(n=8\n        ^"),
    ],
)
def test_messages_show_where(text: str, message: str) -> None:
    with pytest.raises(SpecError) as caught:
        parse(text)
    assert str(caught.value) == message


def test_canonical_refuses_what_is_no_spec() -> None:
    assert canonical({"n": (1, 2), "name": "thing"}) == {"name": "thing", "n": [1, 2]}
    for wrong in (3, {"n": 1}, {"name": "x", "a": object()}, {"name": "x", "a": float("nan")}):
        with pytest.raises(SpecError):
            canonical(wrong)


def test_migration(monkeypatch) -> None:
    assert migrate({"name": "x"}, SPEC_VERSION) == {"name": "x"}
    with pytest.raises(SpecError, match="pip install --upgrade mome"):
        migrate({"name": "x"}, SPEC_VERSION + 1)
    monkeypatch.setattr(spec_module, "SPEC_VERSION", 2)
    monkeypatch.setattr(
        spec_module, "_MIGRATIONS", {1: lambda s: {"m" if key == "n" else key: v for key, v in s.items()}}
    )
    assert migrate({"name": "x", "n": 1}, 1) == {"name": "x", "m": 1}
    assert issubclass(SpecError, InputError)
