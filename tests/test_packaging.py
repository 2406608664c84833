"""The wheel: what is inside, and what must not be; and that our folder does not shadow the pip package `kernels`."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheel_file(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "-w", str(out), str(REPOSITORY)], check=True, capture_output=True)
    return next(out.glob("mome-*.whl"))


@pytest.fixture(scope="module")
def wheel(wheel_file: Path) -> zipfile.ZipFile:
    return zipfile.ZipFile(wheel_file)


def test_wheel_holds_the_two_packages_and_their_data(wheel: zipfile.ZipFile) -> None:
    names = wheel.namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"mome", "mome_kernels"}
    modules = [p.relative_to(REPOSITORY).as_posix() for p in (REPOSITORY / "mome").rglob("*.py")]
    assert not [m for m in modules if m not in names]
    for data in (
        "mome/labels/table.json",
        "mome/labels/maps/openkbp.yaml",
        "mome/preset_sizes.json",
        "mome/py.typed",
    ):
        assert data in names
    for folder in ("assets", "niivue"):
        for file in (REPOSITORY / "mome" / "viz" / folder).iterdir():
            assert file.relative_to(REPOSITORY).as_posix() in names
    for checkpoint in (REPOSITORY / "mome" / "checkpoints").glob("*/*"):
        assert checkpoint.relative_to(REPOSITORY).as_posix() in names
    entry_points = next(name for name in names if name.endswith("entry_points.txt"))
    assert "mome = mome.cli.main:main" in wheel.read(entry_points).decode()


@pytest.mark.wide
def test_an_installed_wheel_runs_the_demo_without_the_repository(wheel_file: Path, tmp_path: Path) -> None:
    site, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", str(site)]
    subprocess.run([*install, str(wheel_file)], check=True, capture_output=True)
    assert not (site / "kernels").exists()
    environment = {**os.environ, "PYTHONPATH": str(site), "HF_HUB_OFFLINE": "1"}
    code = "import sys, mome; from mome.cli.main import main; print(mome.__file__); sys.exit(main(['demo']))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=empty, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[0].startswith(str(site)) and "mandible" in done.stdout
    assert list(empty.glob("mome-demo/*_mandible.nii.gz")) and list(empty.glob("mome-demo/*.png"))


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
