"""One process of `RouterStatistics`: `statistics_processes.py RANK PROCESSES RENDEZVOUS RESULT`.

The processes share four routings. The first one writes the report of all of them.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from mome.registry import ROUTERS
from mome.routers.routing import TokenChoice, count_assignments


class TwoRouters(nn.Module):
    """Stands for a model with two routers of three experts."""

    def __init__(self) -> None:
        super().__init__()
        self.observer: Any = None
        self.first = ROUTERS.build("topk(k=1)", dim=4, num_experts=3)
        self.second = ROUTERS.build("sigmoid(k=1)", dim=4, num_experts=3)


def routing_of(router: nn.Module, scores: Any, ids: list[int], z: float) -> TokenChoice:
    """A routing with these scores and one expert per token."""
    scores_TE, ids_T1 = torch.as_tensor(scores), torch.tensor(ids)[:, None]
    return TokenChoice(
        count_assignments(ids_T1, 3),
        scores_TE,
        {"router_z": torch.tensor(z)},
        router,
        ids_TK=ids_T1,
        weights_TK=scores_TE.gather(1, ids_T1),
    )


def main(rank: int, processes: int, rendezvous: str, result: str) -> None:
    from accelerate import Accelerator

    from mome.training.router_statistics import RouterStatistics

    torch.set_num_threads(1)
    if processes > 1:
        places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        os.environ |= {name: str(number) for name, number in places.items()}
        dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=processes)
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == processes
    model = TwoRouters()
    statistics = RouterStatistics(model, ["liver"])
    for number in range(4):
        if number % processes == rank:
            random = torch.Generator().manual_seed(number)
            scores_TE = torch.rand(5, 3, generator=random).softmax(1)
            statistics.on_routings([routing_of(model.first, scores_TE, scores_TE.argmax(1).tolist(), z=float(number))])
            statistics.on_fusion(0, torch.rand(1, 2, 2, 2, 2, generator=random).softmax(1))
    report = statistics.read(accelerator)
    if rank == 0:
        Path(result).write_text(json.dumps(report))
    if processes > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
