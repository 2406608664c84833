"""The registry: lookup, errors, plug-ins from other packages, and that listing stays light."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from mome.errors import InputError
from mome.registry import EXPERTS, REGISTRIES, ROUTERS, Registry
from mome.spec import dump, parse


def message(spec: object, registry: Registry = EXPERTS) -> str:
    with pytest.raises(InputError) as caught:
        registry.canonical(spec)
    assert len(str(caught.value).splitlines()) <= 3
    return str(caught.value)


def test_canonical_fills_defaults_and_dump_leaves_them_out() -> None:
    full = EXPERTS.canonical("swiglu(n=8)")
    assert list(full)[0] == "name" and full["n"] == 8 and full["activation"] == "silu"
    assert dump(full, EXPERTS) == "swiglu(n=8)"
    assert EXPERTS.canonical(full) == full
    assert EXPERTS.canonical({"n": 8, "name": "swiglu"}) == full


def test_every_builtin_part_round_trips() -> None:
    for registry in REGISTRIES.values():
        for name in registry.names():
            full = registry.canonical(name)
            assert registry.canonical(parse(dump(full, registry))) == full
            assert registry.summary(name)


PARTS = [pytest.param(r, name, id=f"{r.kind}-{name}") for r in REGISTRIES.values() for name in r.names()]


@pytest.mark.parametrize(("registry", "name"), PARTS)
def test_every_parts_config_object_is_a_spec(registry: Registry, name: str) -> None:
    cls, config = registry.resolve(name)
    assert registry.canonical(config) == registry.canonical(name)
    assert registry.resolve(config) == (cls, config)


def test_config_objects_with_arguments() -> None:
    from mome.configuration import MoMEConfig
    from mome.experts.mlp import FeedForwardExperts, SwiGLUExperts

    assert EXPERTS.canonical(SwiGLUExperts.Config(n=8)) == EXPERTS.canonical("swiglu(n=8)")
    assert MoMEConfig(experts=SwiGLUExperts.Config(n=8)).experts == EXPERTS.canonical("swiglu(n=8)")
    assert EXPERTS.build(SwiGLUExperts.Config(n=2), dim=4).num_experts == 2
    assert "not the Config of a registered expert" in message(FeedForwardExperts.Config())
    assert "not the Config of a registered router" in message(SwiGLUExperts.Config(), ROUTERS)


def test_a_config_that_two_parts_share_is_refused() -> None:
    from mome.experts.linear import LinearExperts

    registry = Registry("thing", "mome.experts", "mome.test_things")
    registry.register("a", "mome.experts.linear:LinearExperts")
    registry.register("b", "mome.experts.linear:LinearExperts")
    registry.register("broken", "no_such_package_here:C")
    assert "Config of several: a, b" in message(LinearExperts.Config(), registry)


def test_messages() -> None:
    assert "unknown expert 'swigu', did you mean 'swiglu'?" in message("swigu(n=8)")
    assert "has no argument 'hiden', did you mean 'hidden'?" in message("swiglu(hiden=8)")
    assert "'topk' is registered as a router, not as an expert" in message("topk")
    assert "argument 'n' is int, got 'a'" in message("swiglu(n='a')")
    assert "argument 'n' is int, got 2.0" in message("swiglu(n=2.0)")
    assert "try: text stands in quotes, as in score='sigmoid'" in message("group_limited(score=sigmoid)", ROUTERS)
    assert "quotes" not in message("swiglu(n=two)") and "quotes" not in message("swiglu(activation=silu(a=1))")
    assert message("ours").endswith("; a part of another package is known once that is installed")
    assert "another package" not in message("swigu")
    assert "argument 'normalize' is bool, got 1" in message("topk(normalize=1)", ROUTERS)


def test_wildcards() -> None:
    assert EXPERTS.names("*glu") == ["geglu", "swiglu"]


def test_duplicates_name_both_owners() -> None:
    registry = Registry("thing", "mome.experts", "mome.test_things")
    registry.register("a", "one:A", owner="first-package")
    with pytest.raises(InputError, match="first-package .* second-package"):
        registry.register("a", "two:A", owner="second-package")


def test_a_name_of_ours_is_refused_before_our_parts_are_listed() -> None:
    code = """
from mome.errors import InputError
from mome.registry import ROUTERS

try:
    ROUTERS.register("switch", "mine:Switch")
except InputError as error:
    print(error.what)
ROUTERS.register("mine", "mine:Switch")
print(ROUTERS.canonical("topk")["name"], {"mine", "switch", "uniform"} <= set(ROUTERS.names()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    first, second = done.stdout.splitlines()
    assert first.startswith("two packages register the router 'switch': mome (") and "mine (mine:Switch)" in first
    assert second == "topk True"


def test_the_owner_of_a_part_is_the_package_of_its_class() -> None:
    from mome.experts.linear import LinearExperts

    registry = Registry("thing", "mome.experts", "mome.test_things")
    registry.register("a", "one.two:A")
    registry.register("b", LinearExperts)
    registry.register("c", type("Mine", (LinearExperts,), {"__module__": "my_script"}))
    registry.register("d", "one:D", owner="first-package")
    assert [registry.origin(name)[0] for name in "abcd"] == ["one", "mome", "my_script", "first-package"]


def test_missing_package_says_what_to_install() -> None:
    registry = Registry("thing", "mome.experts", "mome.test_things")
    registry.register("a", "no_such_package_here.part:A", extra="dicom")
    registry.register("b", "no_such_package_here.part:B")
    assert "needs no_such_package_here" in message("a", registry)
    assert "pip install 'mome[dicom]'" in message("a", registry)
    assert "pip install no_such_package_here" in message("b", registry)


PLUGIN = """
from dataclasses import dataclass
from mome.experts.linear import LinearExperts

class Doubling(LinearExperts):
    @dataclass(frozen=True, kw_only=True)
    class Config:
        n: int = 1
        factor: float = 2.0

    def __init__(self, config, *, dim):
        super().__init__(LinearExperts.Config(n=config.n), dim=dim)
        self.factor = config.factor

    def forward(self, x_TD, routing=None):
        return self.factor * super().forward(x_TD, routing)
"""


@pytest.mark.wide
def test_a_second_package_adds_an_expert(tmp_path: Path) -> None:
    """A real package, built and installed by pip, is found through its entry point."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "doubling.py").write_text(PLUGIN)
    (source / "pyproject.toml").write_text(
        textwrap.dedent("""
        [build-system]
        requires = ["setuptools"]
        build-backend = "setuptools.build_meta"
        [project]
        name = "mome-doubling"
        version = "1.0"
        [project.entry-points."mome.experts"]
        doubling = "doubling:Doubling"
        [tool.setuptools]
        py-modules = ["doubling"]
        """)
    )
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--target", str(site), str(source)], check=True, capture_output=True)
    code = f"""
        import sys
        sys.path.insert(0, {str(site)!r})
        from mome.registry import EXPERTS
        assert "doubling" in EXPERTS.names(), EXPERTS.names()
        assert "torch" not in sys.modules
        assert EXPERTS.summary("doubling") == "from mome-doubling"
        from mome.configuration import MoMEConfig
        from mome.modeling import MoME
        config = MoMEConfig(encoder="unet(channels=[4, 8])", experts="doubling(n=2, factor=3)", text_encoder="none",
                            labels=["liver"], dim=4, router="topk(k=1)")
        print(MoME(config).scale_experts[0].body.experts.factor)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "3.0", done.stderr


def test_listing_imports_no_torch() -> None:
    code = (
        "import sys, mome, mome.registry as r; [x.names('*') for x in r.REGISTRIES.values()]; "
        "import mome.zoo; mome.zoo.list_models('mome*'); "
        "print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_faulty_plugin_hides_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.metadata import EntryPoint

    import mome.part_table as module

    points = [
        EntryPoint("swiglu", "clash:Foo", "mome.experts"),
        EntryPoint("object", "clash:Foo", "mome.experts"),
        EntryPoint("good", "mome.experts.mlp:MLPExperts [gpu]", "mome.experts"),
    ]
    monkeypatch.setattr(module, "entry_points", lambda group: points)
    monkeypatch.setattr(EXPERTS, "_loaded", {"builtin"})
    monkeypatch.setattr(EXPERTS, "_entries", dict(EXPERTS._entries))
    with pytest.warns(UserWarning, match="a part of the package clash is left out"):
        assert "good" in EXPERTS.names()
    assert EXPERTS.build("good(n=2)", dim=4).num_experts == 2


@pytest.mark.parametrize("name", ["my-router", "", "true", "two words"])
def test_names_can_be_written_in_config_strings(name: str) -> None:
    with pytest.raises(InputError, match="cannot be written in a config string"):
        EXPERTS.register(name, "a:B")
