"""Opens a page in headless Chromium, which draws WebGL without a graphics card."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from matplotlib import image as mpl_image

_NAMES = ("chromium", "chromium-browser", "google-chrome")
_OPTIONS = (
    "--headless=new", "--no-sandbox", "--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader",
    "--hide-scrollbars", "--disable-background-networking", "--no-first-run",
)  # fmt: skip


def _run(page: Path, folder: Path, *options: str, milliseconds: int = 20_000) -> str:
    found = next(filter(None, map(shutil.which, _NAMES)), None)
    if found is None:
        pytest.skip("no Chromium here")
    command = [found, *_OPTIONS, f"--user-data-dir={folder / 'profile'}", f"--virtual-time-budget={milliseconds}"]
    done = subprocess.run(
        [*command, *options, page.absolute().as_uri()], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def screenshot(page: Path, folder: Path, size: tuple[int, int] = (1000, 700)) -> np.ndarray:
    """Returns a picture of a page, (rows, columns, 3), each from 0 to 255."""
    picture = folder / "screenshot.png"
    _run(page, folder, f"--window-size={size[0]},{size[1]}", f"--screenshot={picture}")
    return np.rint(mpl_image.imread(picture)[..., :3] * 255).astype(int)


def document(page: Path, folder: Path) -> str:
    """Returns the HTML of a page after its scripts ran."""
    return _run(page, folder, "--dump-dom")
