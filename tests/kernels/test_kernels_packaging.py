"""The Kernel Hub layout, the pip package `kernels` beside this repository's folder, and the benchmark script."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import importlib
import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
KERNELS = ROOT / "kernels"


def run(*arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)


def test_import_kernels_from_the_root_is_the_pip_package() -> None:
    pytest.importorskip("kernels", reason="the pip package kernels is not installed")
    done = run("-c", "import kernels; print(kernels.get_kernel.__module__)")
    assert done.returncode == 0 and done.stdout.startswith("kernels."), done.stderr


def test_import_does_not_need_triton() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, mome_kernels as k\n"
        "print(k.moe_linear(torch.ones(2, 3), torch.zeros(2, 1).long(), torch.ones(2, 1), torch.ones(1, 4, 3)).sum())\n"
        "from mome_kernels import dispatch\n"
        "try: dispatch._kernels('experts')\n"
        "except RuntimeError as error: print(error)"
    )
    done = run("-W", "ignore", "-c", code)
    assert "tensor(24.)" in done.stdout and "pip install triton" in done.stdout, done.stderr


def test_a_built_folder_loads_through_the_kernels_package(tmp_path: Path) -> None:
    """A built folder has the sources, a unique namespace, and the metadata."""
    pytest.importorskip("kernels", reason="the pip package kernels is not installed")
    general = tomllib.loads((KERNELS / "build.toml").read_text())["general"]
    variant = tmp_path / "build" / "torch-universal"
    shutil.copytree(KERNELS / "torch-ext" / "mome_kernels", variant, ignore=shutil.ignore_patterns("__pycache__"))
    # kernel-builder replaces this file and defines these two names only
    (variant / "_ops.py").write_text(
        "import torch\n\nops = torch.ops.mome_kernels_built\n\n\n"
        "def add_op_namespace_prefix(op_name: str):\n    return f'mome_kernels_built::{op_name}'\n"
    )
    digests = {
        str(path.relative_to(variant)): base64.b64encode(hashlib.sha256(path.read_bytes()).digest()).decode()
        for path in sorted(variant.rglob("*"))
        if path.is_file()
    }
    metadata = {
        "name": general["name"], "id": "mome_kernels_built", "version": general["version"],
        "license": general["license"], "python-depends": [], "backend": {"type": "cpu"},
        "digest": {"algorithm": "sha256", "files": digests},
    }  # fmt: skip
    (variant / "metadata.json").write_text(json.dumps(metadata))
    code = (
        "import sys, torch, mome_kernels\n"
        "from pathlib import Path\n"
        "from kernels import get_local_kernel\n"
        f"built = get_local_kernel(Path({str(tmp_path)!r}))\n"
        "x, ids, weights = torch.randn(5, 3), torch.tensor([[0], [1], [1], [0], [1]]), torch.rand(5, 1)\n"
        "w = torch.randn(2, 4, 3)\n"
        "assert torch.equal(built.moe_linear(x, ids, weights, w), mome_kernels.moe_linear(x, ids, weights, w))\n"
        "assert built.__file__ != mome_kernels.__file__\n"
        "print(sorted(built.__all__) == sorted(mome_kernels.__all__), torch.ops.mome_kernels_built.moe_linear.default)"
    )
    done = run("-W", "ignore", "-c", code)
    assert done.stdout.startswith("True mome_kernels_built.moe_linear"), done.stderr


def test_sources_import_only_torch_triton_and_the_standard_library() -> None:
    """The Kernel Hub requires this, and relative imports within the package."""
    allowed = {"torch", "triton"} | sys.stdlib_module_names
    for path in (KERNELS / "torch-ext" / "mome_kernels").rglob("*.py"):
        for line in path.read_text().splitlines():
            words = line.split()
            if words[:1] in (["import"], ["from"]) and not words[1].startswith("."):
                assert words[1].split(".")[0] in allowed, (path, line)


@pytest.mark.wide
def test_benchmark_continues(tmp_path: Path) -> None:
    script = [str(KERNELS / "benchmarks" / "run.py"), "--out", str(tmp_path), "--rehearse", "--minutes"]
    first = run("-W", "ignore", *script, "2")
    path = tmp_path / "cpu.json"
    data = json.loads(path.read_text())
    kept = dict(list(data["steps"].items())[:5])
    path.write_text(json.dumps({**data, "steps": kept}))
    late = run("-W", "ignore", *script, "0")
    assert late.returncode == 0 and f"5 measurements, {len(data['steps']) - 5} left" in late.stdout
    second = run("-W", "ignore", *script, "2")
    data = json.loads((tmp_path / "cpu.json").read_text())
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert kept and not set(kept) & set(second.stdout.splitlines()), "finished steps are not run again"
    assert data["rehearsal"] and len(kept) < len(data["steps"]) and "0 left" in second.stdout
    assert all(data["steps"][name] == step for name, step in kept.items())
    assert all(step["ok"] for name, step in data["steps"].items() if name.startswith("check"))
    for name, step in data["steps"].items():
        if name.startswith("layer"):
            assert {"mome", "eager_loop", "grouped_mm", "dense"} <= set(step)
            assert "forward_ms" in step["mome"] and "forward_ms" in step["eager_loop"], (name, step)


@pytest.fixture
def benchmark(monkeypatch):
    """Imports a module of `kernels/benchmarks` by its name."""
    monkeypatch.syspath_prepend(str(KERNELS / "benchmarks"))
    return importlib.import_module


def test_benchmark_without_a_gpu_exits(tmp_path: Path, benchmark, capsys) -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    assert benchmark("run").main(["--out", str(tmp_path)]) == 2
    assert "no CUDA device" in capsys.readouterr().err and not list(tmp_path.iterdir())


def lost(_: str) -> None:
    raise RuntimeError("an illegal memory access was encountered")


@pytest.mark.parametrize("name", ["run", "tune"])
def test_a_folder_that_cannot_be_used_is_named(name: str, tmp_path: Path, benchmark, capsys) -> None:
    script, file = benchmark(name), tmp_path / "file"
    file.touch()
    assert script.main(["--out", str(file), "--rehearse"]) == 2
    assert capsys.readouterr().err == f"{name}.py: cannot write to {file}: File exists\n"
    stored = tmp_path / ("cpu.json" if name == "run" else "tuning_cpu.json")
    for text, problem in (("{", "is not JSON"), ("[1]", "was not written"), ("{}", "was not written")):
        stored.write_text(text)
        assert script.main(["--out", str(tmp_path), "--rehearse"]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"{name}.py: {stored} {problem}") and error.count("\n") == 1
        assert stored.read_text() == text
    with pytest.raises(SystemExit):
        script.main(["--out", str(tmp_path), "--minutes", "nan"])


def test_a_wrong_layer_fails_the_benchmark(tmp_path: Path, monkeypatch, benchmark, capsys) -> None:
    script = benchmark("run")
    wrong = {"ok": False, "wrong": True, "problem": "differs"}
    monkeypatch.setattr(script, "steps", lambda *_: iter([("layer V1", lambda result: result.update(wrong))]))
    assert script.main(["--out", str(tmp_path), "--rehearse"]) == 1
    assert capsys.readouterr().out.endswith("1 of them wrong or failed: layer V1\n")


def test_a_step_that_kills_the_device_is_not_run_again(tmp_path: Path, monkeypatch, benchmark) -> None:
    script, ran = benchmark("run"), []

    def deadly(result: dict) -> None:
        ran.append("deadly")
        result["mome"] = {"forward_ms": 1.0, "both_ms": 2.0, "peak_mib": None}
        raise RuntimeError("launch failed")

    def check(result: dict) -> None:
        ran.append("check")
        result["ok"] = True

    monkeypatch.setattr(script, "steps", lambda *_: iter([("layer x", deadly), ("check y", check)]))
    monkeypatch.setattr(script, "settle", lost)
    arguments = ["--out", str(tmp_path), "--rehearse"]
    assert script.main(arguments) == 1 and ran == ["deadly"]
    assert script.main(arguments) == 0 and ran == ["deadly", "check"]
    step = json.loads((tmp_path / "cpu.json").read_text())["steps"]["layer x"]
    assert step["fatal"] and step["problem"] == "launch failed" and step["mome"]["both_ms"] == 2.0


def test_our_figures_are_kept_when_a_peer_kills_the_device(tmp_path: Path, monkeypatch, benchmark) -> None:
    script, peers, shapes = benchmark("run"), benchmark("peers"), benchmark("shapes")

    def killer(*_: object) -> None:
        raise RuntimeError("unspecified launch failure")

    shape = dataclasses.replace(shapes.SHAPES["V1"], T=20, D=8, F=8)
    monkeypatch.setattr(peers, "PEERS", {"killer": killer})
    setting = script.Setting("cpu", peers.PEERS)
    monkeypatch.setattr(script, "settle", lost)
    result: dict = {}
    with pytest.raises(RuntimeError, match="illegal"):
        script.layer_step(shape, "uniform", "gelu", setting, result)
    assert "both_ms" in result["mome"]
    assert result["killer"] == {"problem": "unspecified launch failure", "fatal": True}
    results = benchmark("results").Results(tmp_path / "x.json", {})
    results.add("layer V1", {**result, "ok": False, "problem": "illegal", "fatal": True})
    assert results.killers() == {"killer"}
    left = {name: peer for name, peer in peers.PEERS.items() if name not in results.killers()}
    script.layer_step(shape, "uniform", "gelu", script.Setting("cpu", left), result := {})
    assert set(result) == {"mome"}


def test_table_says_what_was_wrong(benchmark) -> None:
    table = benchmark("table")
    measured = {
        "mome": {"forward_ms": 1.0, "forward_graph_ms": 0.8, "both_ms": 4.0, "peak_mib": 50.0},
        "eager_loop": {"forward_ms": 3.0, "both_ms": 10.0, "peak_mib": 200.0},
        "dense": {"forward_ms": 0.1, "both_ms": 0.1, "peak_mib": 1.0},
        "liger": {"problem": "gated SiLU only"},
        "bounds_ms": {"forward": {"memory": 0.5, "tensor_cores": 0.1}, "both": {"memory": 1.0, "tensor_cores": 2.0}},
    }
    steps = {
        "layer V1 uniform gelu": measured,
        "layer V2 uniform gelu": {"ok": False, "wrong": True, "problem": "differs"},
        "layer V5 uniform gelu": {"ok": False, "problem": "out of memory"},
    }
    rows = {line.split()[1]: line.split(" | ")[1:] for line in table.table({"steps": steps}).splitlines()[2:]}
    assert " | ".join(rows["V1"]) == (
        "1.000 ms | 0.800 ms | 62% (memory) | 3.00× | 4.000 ms | – | 50% (tensor_cores) | 2.50× | 0.25× |"
    )
    assert rows["V2"][0] == "wrong" and rows["V5"][0] == "failed" and rows["V6"][0] == "not yet measured"


def test_checks_of_large_tensors(benchmark) -> None:
    checks = benchmark("device_checks")
    for case in (checks.large_combine_case, checks.large_linear_case):
        assert "skipped" in case("cpu")
        assert case("cpu", 300)["ok"]


def test_the_first_steps_are_the_most_important(benchmark) -> None:
    script = benchmark("run")
    names = [name for name, _ in script.steps(script.Setting("cpu", {}), False)]
    assert len(names) == len(set(names))
    assert all(name.startswith("check mlp") for name in names[:5]) and names[5].startswith("check head")
    assert names[6] == "ceilings"
    assert [name.split()[1] for name in names[7:14]] == ["V1", "V2", "V5", "V6", "V7", "V14", "V11"]
    assert names[14].startswith("head")


def test_readme_tables_are_generated(tmp_path: Path, benchmark) -> None:
    table = benchmark("table")
    assert table.tables(tmp_path) == "No GPU has been measured yet."
    text = table.README.read_text()
    assert text == table.insert(text, table.tables())
    assert text == table.insert(text, table.fused_table(), "fused")
    assert text == table.insert(text, table.cpu_table(), "cpu")


def test_rooflines_are_those_of_the_survey(benchmark) -> None:
    """Milliseconds on an H100 calculated by hand from bytes, arithmetic and activations."""
    shapes = benchmark("shapes")
    v1, h100 = shapes.SHAPES["V1"], shapes.Device(790e12, 3.0e12, 132 * 128 * 1.7e9)
    moved = 2 * 2 * 221184 * 48 + 2 * 2 * 8 * 48 * 192 + 8 * 221184
    activations = 221184 * 192 * 10 / (132 * 128 * 1.7e9)
    bounds = shapes.bounds_ms(v1, h100, False)
    assert bounds["memory"] == pytest.approx(1e3 * moved / 3e12) == pytest.approx(0.0146, rel=0.02)
    assert bounds["activations"] == pytest.approx(1e3 * activations)
    l1 = shapes.SHAPES["L1"]
    assert l1.flops == pytest.approx(5772.4e9, rel=1e-4)
    assert shapes.bounds_ms(l1, h100, False)["tensor_cores"] == pytest.approx(7.307, rel=1e-3)
    assert shapes.bounds_ms(l1, h100, True)["tensor_cores"] == pytest.approx(3 * 7.307, rel=1e-3)
    head = shapes.head_bounds_ms(32, 5, 8, 96**3, h100, False)
    assert head["memory"] == pytest.approx(1e3 * 4 * (40 + 32) * 96**3 / 3e12)
    assert head["arithmetic"] == pytest.approx(0.213, rel=1e-2)
    assert len(shapes.SHAPES) == 21
