"""The imports inside `mome`: no circle, and arrows that follow the order of the design."""

from __future__ import annotations

from pathlib import Path

from import_graph import find_cycle, import_graph

import mome

ROOT = Path(mome.__file__).parent

# From the ground up. A module imports from its own layer and from those before it.
LAYERS = [
    [
        "errors",
        "spec",
        "temporary_names",
        "folder_lock",
        "text_file",
        "yaml_file",
        "printable",
        "threads",
        "cpu_load",
        "memory",
        "kept_memory",
        "atomic",
        "typed",
        "docstrings",
        "module_objects",
        "git_lfs",
        "hub_connection",
        "json_file",
        "checksums",
        "loopback",
    ],
    [
        "patterns",
        "part_fields",
        "part_import",
        "part_table",
        "registry",
        "part_lists",
        "cards",
        "presets",
        "pretrained",
        "map_context",
        "activation_checkpointing",
        "volumes",
        "labels",
        "metrics",
        "losses",
        "postprocess",
    ],
    ["routers", "experts", "encoders.text"],
    ["layers"],
    ["encoders"],
    [
        "configuration",
        "outputs",
        "forward_observer",
        "router_names",
        "hub",
        "processing",
        "processor_settings",
        "loading",
        "loaded_weights",
        "weights_file",
        "remote_code",
        "saved_files",
        "model_card",
        "changed_files",
        "model_size",
        "uninitialised",
        "model_inputs",
        "parts",
        "upcycling",
        "extra_experts",
        "expert_parallel",
    ],
    ["saving", "decoding", "modeling", "hf_experts"],
    ["prompts", "embedding", "auto", "model_cost", "zoo", "checkpoints", "convert"],
    ["data", "viz", "inference", "inspection"],
    ["training"],
    ["cli.quiet", "dicomweb"],
    ["server"],
    ["cli", "cli.main"],
]


def _layer(module: str) -> int:
    """The position of a module in `LAYERS`, by the longest name that fits."""
    name = module.removeprefix("mome").removeprefix(".")
    fits = [
        (len(entry), level)
        for level, entries in enumerate(LAYERS)
        for entry in entries
        if name == entry or name.startswith(f"{entry}.")
    ]
    assert fits, f"{module} has no place in the order of the house: add it to LAYERS"
    return max(fits)[1]


def test_no_import_circle() -> None:
    assert find_cycle(import_graph(ROOT)) is None


def test_imports_point_one_way() -> None:
    graph = import_graph(ROOT)
    wrong = [
        f"{module} imports {other}"
        for module, others in graph.items()
        for other in others
        if module != "mome" and other != "mome" and _layer(other) > _layer(module)
    ]
    assert not wrong, wrong
    # the package's face collects names of every layer; only the command line reads its version
    assert {module for module, others in graph.items() if "mome" in others} <= {"mome.cli.main"}


def test_foundations_know_nothing_of_the_model() -> None:
    graph = import_graph(ROOT)
    for module in graph:
        if module.split(".")[:2] in (["mome", "volumes"], ["mome", "labels"], ["mome", "metrics"]):
            assert all(_layer(other) <= _layer("mome.metrics") for other in graph[module]), module


def test_a_circle_is_found(tmp_path: Path) -> None:
    package = tmp_path / "house"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "a.py").write_text("def late():\n    from house import b\n")
    (package / "b.py").write_text("from house.a import late\n")
    assert find_cycle(import_graph(package)) == ["house.a", "house.b", "house.a"]
