"""Fixtures and settings shared by all tests."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

# The processes of pytest-xdist share the cores, so each uses one thread, as do the processes that its tests start. This
# must be set before torch is imported.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

REPOSITORY = Path(__file__).resolve().parent.parent


def _find_ct_data() -> Path | None:
    """The folder of real CT: `MOME_TEST_DATA`, else `shared/ct` next to the checkout; None if there is neither."""
    given = os.environ.get("MOME_TEST_DATA")
    for folder in ([Path(given)] if given else []) + [REPOSITORY.parent / "shared" / "ct"]:
        if folder.is_dir():
            return folder
    return None


@pytest.fixture(scope="session")
def ct_data() -> Path:
    """Folder of public CT scans with labels; tests that need it are skipped if it is missing."""
    folder = _find_ct_data()
    if folder is None:
        pytest.skip("no real CT here: set MOME_TEST_DATA to the folder that holds openkbp/ and torso/")
    return folder


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Tensors that are too small for threads run many times faster without them."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    """Appends each failure at once to the file `MOME_TEST_FAILURES`, for a run that a deadline may end."""
    report = yield
    if report.failed and call.excinfo is not None and (path := os.environ.get("MOME_TEST_FAILURES")):
        first = call.excinfo.exconly().partition("\n")[0]
        with open(path, "a") as file:
            file.write(f"{item.nodeid} ({report.when}): {first:.500}\n")
    return report
