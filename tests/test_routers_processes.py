"""Every router gives two processes with one scan each the losses and gradients of one process with both scans."""

from __future__ import annotations

import subprocess
import sys

import pytest
import router_parity_run
import torch
from torch import Tensor

from mome.registry import ROUTERS

# Float32 inside a router, relative to the largest value of a tensor: the order of sums differs between the two.
TOLERANCE = 2e-6


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The steps of one process and of two."""
    folder = tmp_path_factory.mktemp("routers")
    program = [sys.executable, router_parity_run.__file__]
    running = [subprocess.Popen([*program, str(rank), "2", str(folder)]) for rank in range(2)]
    one = router_parity_run.steps([0, 1])
    assert [process.wait(timeout=240) for process in running] == [0, 0]
    return one, torch.load(folder / "2.pt", weights_only=True)


@pytest.mark.wide
@pytest.mark.parametrize("router", ROUTERS.names())
def test_the_step_does_not_depend_on_the_number_of_processes(
    router: str, both: tuple[dict[str, Tensor], dict[str, Tensor]]
) -> None:
    one, two = ({key: value for key, value in values.items() if key.startswith(f"{router}.")} for values in both)
    assert one.keys() == two.keys() and f"{router}.loss" in one
    for key, value in one.items():
        scale = max(1.0, value.abs().max().item()) if value.numel() else 1.0
        difference = (two[key].double() - value.double()).abs().max().item() if value.numel() else 0.0
        assert difference <= TOLERANCE * scale, f"{key} differs by {difference}"


@pytest.mark.wide
def test_the_losses_of_routers_are_there(both: tuple[dict[str, Tensor], dict[str, Tensor]]) -> None:
    wanted = {"topk.loss.importance", "noisy_topk.loss.load", "relu.loss.l1", "switch.loss.load_balance"}
    assert wanted <= both[0].keys() and all(both[0][key] > 0 for key in wanted)
