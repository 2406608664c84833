"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


def _find_ct_data() -> Path | None:
    """The folder of real CT: `MOME_TEST_DATA`, else `shared/ct` beside the checkout."""
    given = os.environ.get("MOME_TEST_DATA")
    for folder in ([Path(given)] if given else []) + [REPOSITORY.parent / "shared" / "ct"]:
        if folder.is_dir():
            return folder
    return None


@pytest.fixture(scope="session")
def ct_data() -> Path:
    """Folder of public CT scans with labels; tests that need it are skipped where it is absent."""
    folder = _find_ct_data()
    if folder is None:
        pytest.skip("no real CT here: set MOME_TEST_DATA to the folder that holds openkbp/ and torso/")
    return folder
