"""The package of examples/custom_expert: pip installs it, `mome list` shows it, and a model trains with it."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "custom_expert"

# The subprocess sees the package only through the entry point in the folder that pip filled.
TRAIN = """
import sys
from mome.cli.main import main
assert main(["list", "experts", "poly*"]) == 0 and "torch" not in sys.modules
assert main(["info", "expert", "polynomial"]) == 0
import torch
from mome import create_model, list_parts
assert list_parts("experts", "poly*") == ["polynomial"]
torch.manual_seed(0)
model = create_model("mome_ct_tiny", encoder="unet(channels=[4, 8])", experts="polynomial(n=3, degree=3)",
                     router="topk(k=2)", labels=["liver", "spleen"], dim=8, patch_size=[8, 8, 8]).train()
optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
volume, text = torch.rand(1, 1, 8, 8, 8), torch.randn(2, model.config.text_dim)
weights = [scale.body.experts.coefficients_EID for scale in model.scale_experts]
assert weights and all(w.shape[:2] == (3, 3) for w in weights)
before = [w.detach().clone() for w in weights]
for _ in range(2):
    optimiser.zero_grad()
    loss = model(volume, text, torch.ones(1, 2, 8, 8, 8)).loss
    loss.backward()
    optimiser.step()
    assert torch.isfinite(loss)
assert all(not torch.equal(a, b) for a, b in zip(before, weights))
print("trained", model.config.part_strings()["experts"])
"""


def test_the_example_is_about_forty_lines() -> None:
    lines = [line for path in EXAMPLE.glob("*.*") if path.suffix in (".py", ".toml") for line in _code(path)]
    assert 20 < len(lines) <= 48


def _code(path: Path) -> list[str]:
    return [line for line in path.read_text().splitlines() if line.strip()]


@pytest.mark.wide
def test_pip_installs_the_example_and_it_trains(tmp_path: Path) -> None:
    source, site = tmp_path / "source", tmp_path / "site"
    source.mkdir()
    for path in EXAMPLE.iterdir():  # pip would leave its build folder beside the sources
        if path.is_file():
            (source / path.name).write_bytes(path.read_bytes())
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--target", str(site), str(source)], check=True, capture_output=True)
    _lists_and_trains(site)


def test_the_example_trains_through_its_entry_point(tmp_path: Path) -> None:
    """The same without pip: the metadata that an installation writes is laid beside the module."""
    (tmp_path / "mome_polynomial.py").write_bytes((EXAMPLE / "mome_polynomial.py").read_bytes())
    information = tmp_path / "mome_polynomial-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: mome-polynomial\nVersion: 1.0\n")
    project = (EXAMPLE / "pyproject.toml").read_text()
    point = next(line for line in project.splitlines() if "PolynomialExperts" in line).replace('"', "")
    (information / "entry_points.txt").write_text(f"[mome.experts]\n{point}\n")
    _lists_and_trains(tmp_path)


def _lists_and_trains(site: Path) -> None:
    path = os.pathsep.join([str(site), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(TRAIN)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "from mome-polynomial" in done.stdout and "Highest power of a channel's value" in done.stdout
    assert done.stdout.splitlines()[-1] == "trained polynomial(n=3, degree=3)"
