"""The Kernel Hub layout, the pip package `kernels` beside this repository's folder, and the benchmark script."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KERNELS = ROOT / "kernels"


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)


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
        "try: dispatch._kernels('gpu.experts')\n"
        "except RuntimeError as error: print(error)"
    )
    done = run("-W", "ignore", "-c", code)
    assert "tensor(24.)" in done.stdout and "pip install triton" in done.stdout, done.stderr


def test_a_built_folder_loads_through_the_kernels_package(tmp_path: Path) -> None:
    """What a build makes of `build.toml`: the sources, a namespace of their own, and the metadata."""
    pytest.importorskip("kernels", reason="the pip package kernels is not installed")
    general = tomllib.loads((KERNELS / "build.toml").read_text())["general"]
    variant = tmp_path / "build" / "torch-universal"
    shutil.copytree(KERNELS / "torch-ext" / "mome_kernels", variant, ignore=shutil.ignore_patterns("__pycache__"))
    ops = variant / "_ops.py"
    ops.write_text(ops.read_text().replace('NAMESPACE = "mome"', 'NAMESPACE = "mome_kernels_built"'))
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
        "x, ids, gates = torch.randn(5, 3), torch.tensor([[0], [1], [1], [0], [1]]), torch.rand(5, 1)\n"
        "w = torch.randn(2, 4, 3)\n"
        "assert torch.equal(built.moe_linear(x, ids, gates, w), mome_kernels.moe_linear(x, ids, gates, w))\n"
        "assert built.__file__ != mome_kernels.__file__\n"
        "print(sorted(built.__all__) == sorted(mome_kernels.__all__), torch.ops.mome_kernels_built.moe_linear.default)"
    )
    done = run("-W", "ignore", "-c", code)
    assert done.stdout.startswith("True mome_kernels_built.moe_linear"), done.stderr


def test_sources_import_only_torch_triton_and_the_standard_library() -> None:
    """The Kernel Hub's rule, and relative imports within the package."""
    allowed = {"torch", "triton"} | sys.stdlib_module_names
    for path in (KERNELS / "torch-ext" / "mome_kernels").rglob("*.py"):
        for line in path.read_text().splitlines():
            words = line.split()
            if words[:1] in (["import"], ["from"]) and not words[1].startswith("."):
                assert words[1].split(".")[0] in allowed, (path, line)


def test_benchmark_without_a_gpu_says_so(tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    done = run(str(KERNELS / "benchmarks" / "run.py"), "--out", str(tmp_path))
    assert done.returncode == 2 and "no CUDA device" in done.stderr and not list(tmp_path.iterdir())


def test_benchmark_goes_on_where_it_stopped(tmp_path: Path) -> None:
    script = [str(KERNELS / "benchmarks" / "run.py"), "--out", str(tmp_path), "--rehearse", "--minutes"]
    first = run("-W", "ignore", *script, "0.01")
    kept = json.loads((tmp_path / "cpu.json").read_text())["steps"] if (tmp_path / "cpu.json").exists() else {}
    second = run("-W", "ignore", *script, "2")
    data = json.loads((tmp_path / "cpu.json").read_text())
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert data["rehearsal"] and len(kept) < len(data["steps"]) and "0 left" in second.stdout
    assert all(data["steps"][name] == step for name, step in kept.items())
    assert all(step["ok"] for name, step in data["steps"].items() if name.startswith("check"))
    for name, step in data["steps"].items():
        if name.startswith("layer"):
            assert {"mome", "eager_loop", "grouped_mm", "dense"} <= set(step)
            assert "forward_ms" in step["mome"] and "forward_ms" in step["eager_loop"], (name, step)


def test_readme_tables_are_generated() -> None:
    sys.path.insert(0, str(KERNELS / "benchmarks"))
    import table

    text = table.README.read_text()
    assert text == table.insert(text, table.tables())


def test_rooflines_are_those_of_the_survey() -> None:
    """Milliseconds on an H100 worked out by hand: bytes moved, arithmetic and activations."""
    sys.path.insert(0, str(KERNELS / "benchmarks"))
    import shapes

    v1, h100 = shapes.SHAPES["V1"], shapes.DEVICES["H100"]
    moved = 2 * 2 * 221184 * 48 + 2 * 2 * 8 * 48 * 192 + 8 * 221184
    activations = 221184 * 192 * 28 / (132 * 128 * 1.7e9)
    assert shapes.roofline_ms(v1, h100, False) == pytest.approx(1e3 * max(moved / 3e12, activations))
    l1 = shapes.SHAPES["L1"]
    assert l1.flops == pytest.approx(5772.4e9, rel=1e-4)
    assert shapes.roofline_ms(l1, h100, False) == pytest.approx(7.307, rel=1e-3)
    assert len(shapes.SHAPES) == 21
