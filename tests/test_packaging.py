"""The wheel: what is inside, and what must not be; and that our folder does not shadow the pip package `kernels`."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "-w", str(out), str(REPOSITORY)], check=True, capture_output=True)
    return zipfile.ZipFile(next(out.glob("mome-*.whl")))


def test_wheel_holds_the_two_packages_and_their_data(wheel: zipfile.ZipFile) -> None:
    names = wheel.namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"mome", "mome_kernels"}
    modules = [p.relative_to(REPOSITORY).as_posix() for p in (REPOSITORY / "mome").rglob("*.py")]
    assert not [m for m in modules if m not in names]
    for data in (
        "mome/labels/table.json",
        "mome/labels/maps/openkbp.yaml",
        "mome/presets.json",
        "mome/py.typed",
    ):
        assert data in names
    for checkpoint in (REPOSITORY / "mome" / "checkpoints").glob("*/*"):
        assert checkpoint.relative_to(REPOSITORY).as_posix() in names
    entry_points = next(name for name in names if name.endswith("entry_points.txt"))
    assert "mome = mome.cli.main:main" in wheel.read(entry_points).decode()


def test_no_package_of_ours_is_called_kernels() -> None:
    assert not (REPOSITORY / "kernels" / "__init__.py").exists()
    pytest.importorskip("kernels", reason="the pip package kernels is not installed")
    code = "import kernels; print(kernels.get_kernel.__module__.split('.')[0], kernels.__file__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert done.stdout.startswith("kernels ") and str(REPOSITORY / "kernels") not in done.stdout


def test_every_python_folder_is_a_package() -> None:
    """A folder without __init__ would be left out of the wheel silently."""
    for path in (REPOSITORY / "mome").rglob("*.py"):
        if path.name == "modeling_mome.py":  # the stub beside a checkpoint's weights is data
            continue
        assert (path.parent / "__init__.py").is_file(), path
