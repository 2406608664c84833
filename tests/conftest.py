"""Fixtures and settings shared by all tests."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

from mome.threads import container_cpus

# The processes of pytest-xdist share the cores, so each uses one thread, as do the processes that its tests start.
# Otherwise the number is set, too: what other programs do must not change notes or rounding. This must be done before
# torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else str(container_cpus()))

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


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a small random model for liver and spleen, on a grid of 4 mm."""
    from small_models import liver_and_spleen

    from mome.processing import MoMEProcessor

    folder = tmp_path_factory.mktemp("model")
    liver_and_spleen().save_pretrained(folder)
    MoMEProcessor(spacing=[4, 4, 4]).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def scan(tmp_path: Path) -> Path:
    """A NIfTI file of 12 × 14 × 10 voxels of 4 mm with noise of 80 HU."""
    import nibabel as nib
    import numpy as np

    hu = np.random.default_rng(0).normal(0, 80, (12, 14, 10)).astype(np.int16)
    path = tmp_path / "scan.nii.gz"
    nib.save(nib.Nifti1Image(hu, np.diag([4.0, 4, 4, 1])), path)
    return path


@pytest.fixture(scope="module")
def server() -> Any:
    """The server that the tests of a process share; their module skips where its packages are absent."""
    from server_process import shared_server

    return shared_server()


@pytest.fixture(scope="module")
def ct() -> bytes:
    """A compressed NIfTI file of a synthetic patient."""
    import gzip

    from small_scans import patient_bytes

    return gzip.compress(patient_bytes(), 1)


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
