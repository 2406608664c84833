"""Statistics of routers and fusion in the training log: against numbers by hand, and beside runs without them."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from statistics_processes import TwoRouters, routing_of
from training_runs import REPOSITORY, losses, write_recipe

from mome.registry import ROUTERS
from mome.router_names import named_routers
from mome.routers.groups import Groups
from mome.routers.routing import Assignments, Slots
from mome.routers.shares import slot_masses, winners, wins
from mome.training.config_file import load_run_config
from mome.training.loop import train
from mome.training.progress import StepReporter
from mome.training.router_statistics import RouterStatistics, flat


class _Alone:
    """Stands for the Accelerator of one process."""

    def reduce(self, values: torch.Tensor, reduction: str) -> torch.Tensor:
        assert reduction == "sum"
        return values


def test_token_choice_by_hand() -> None:
    """Two batches, of which the second has two tokens: means go over tokens, not over batches."""
    model = TwoRouters()
    statistics = RouterStatistics(model, ["liver", "spleen"])
    with statistics.collecting():
        model.observer.on_routings([routing_of(model.first, [[0.5, 0.5, 0.0]], [0], z=1.0)])
        model.observer.on_routings([routing_of(model.first, [[1.0, 0.0, 0.0], [0.25, 0.75, 0.0]], [0, 1], z=4.0)])
    assert model.observer is None
    report = statistics.read(_Alone())
    assert list(report["routers"]) == ["first"]  # the other router saw nothing
    seen = report["routers"]["first"]
    assert seen["load"] == pytest.approx([2 / 3, 1 / 3, 0])
    assert seen["idle_experts"] == 1 and seen["without_expert"] == 0
    quarter = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    assert seen["mean_entropy"] == pytest.approx((math.log(2) + 0 + quarter) / 3 / math.log(3))
    p, q = 1.75 / 3, 1.25 / 3
    assert seen["entropy_of_mean"] == pytest.approx(-(p * math.log(p) + q * math.log(q)) / math.log(3))
    assert seen["losses"] == {"router_z": pytest.approx(2.5)}
    assert statistics.read(_Alone()) == {"routers": {}, "fusion": {}}  # a step does not see the one before
    numbers = flat(report)
    assert numbers["routers/first/load/0"] == pytest.approx(2 / 3) and "routers/first/losses/router_z" in numbers


def test_dropped_tokens_and_saved_state() -> None:
    model = TwoRouters()
    model.second.bias.bias_E.copy_(torch.tensor([0.5, -0.5, 0.0]))
    routing = Assignments(
        torch.tensor([2, 1, 0]),
        tokens_N=torch.tensor([0, 2, 2]),
        experts_N=torch.tensor([0, 0, 1]),
        weights_N=torch.tensor([0.3, 0.1, -0.3]),
        tokens=4,
        router=model.second,
    )
    statistics = RouterStatistics(model, [])
    statistics.on_routings([routing])
    seen = statistics.read(_Alone())["routers"]["second"]
    assert seen["without_expert"] == 0.5 and seen["load"] == pytest.approx([2 / 3, 1 / 3, 0])
    one = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75)) / math.log(3)
    assert seen["mean_entropy"] == pytest.approx(one / 2)  # tokens without an expert have no entropy
    assert seen["state"] == {"bias.bias_E": [0.5, -0.5, 0.0]}  # counts, which are not saved, are no state
    assert winners(routing).tolist() == [0, -1, 0, -1]


def test_slots_are_read_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    groups = Groups(2, (2, 2, 2), window=2)
    routing = Slots(torch.tensor([4, 4, 4]), keys_GMC=torch.randn(2, 8, 5), queries_SC=torch.randn(6, 5), groups=groups)
    dispatch_GMS, combine_GMS = routing.matrices()
    monkeypatch.setattr("mome.routers.slot_attention._PIECE_ELEMENTS", 36)  # three tokens at a time
    dispatch_TE, combine_TE = slot_masses(routing)
    for got_TE, want_GME in (
        (dispatch_TE, dispatch_GMS.view(2, 8, 3, 2).mean(-1)),
        (combine_TE, combine_GMS.view(2, 8, 3, 2).sum(-1)),
    ):
        torch.testing.assert_close(got_TE, groups.join(want_GME))
    torch.testing.assert_close(combine_TE.sum(1), torch.ones(16))


def test_fusion_shares_by_hand() -> None:
    model = TwoRouters()
    statistics = RouterStatistics(model, ["liver", "spleen"])
    weights_BSV = torch.tensor([[[0.75, 0.5, 0.0, 0.25], [0.25, 0.5, 1.0, 0.75]]])
    statistics.on_fusion(1, weights_BSV.view(1, 2, 1, 2, 2))
    statistics.on_fusion(1, weights_BSV.flip(1).view(1, 2, 1, 2, 2)[..., :1])
    report = statistics.read(_Alone())["fusion"]
    assert list(report) == ["spleen"]
    # the second call sees voxels 0 and 2 with exchanged scales
    assert report["spleen"]["weight"] == pytest.approx([(1.5 + 1.25) / 6, (2.5 + 0.75) / 6])
    assert report["spleen"]["wins"] == pytest.approx([2.5 / 6, 3.5 / 6])  # equal weights share their voxel
    assert wins(torch.ones(4, 1))[:, 0].tolist() == [0.25] * 4


def test_routers_inside_routers_are_not_named_twice() -> None:
    outer = torch.nn.ModuleDict({"a": ROUTERS.build("depth(router=topk(k=1))", dim=4, num_experts=2)})
    assert list(named_routers(outer)) == ["a"]


def test_the_log_has_statistics_and_losses_stay_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With accumulation over two batches; a run that is killed in step 3 continues its log."""
    recipe, real = write_recipe(tmp_path), StepReporter.step
    common = ["encoder=unet(channels=[4, 8, 8])", "train.validate_every=0", "train.checkpoint_every=2", "train.steps=4"]

    def killed(self: StepReporter, done: int, *rest: object) -> None:
        real(self, done, *rest)
        if done == 3:
            raise KeyboardInterrupt

    runs = {}
    for every in (0, 2):
        out = tmp_path / f"every_{every}"
        run = load_run_config(recipe, [*common, f"train.log_every={every}", f"train.out={out}"])
        monkeypatch.setattr(StepReporter, "step", killed)
        with pytest.raises(KeyboardInterrupt):
            train(run)
        monkeypatch.setattr(StepReporter, "step", real)
        train(run)
        runs[every] = losses(out)
    assert runs[0] == runs[2] and sorted(runs[2]) == [1, 2, 3, 4]
    models = [(tmp_path / f"every_{every}" / "model" / "model.safetensors").read_bytes() for every in (0, 2)]
    assert models[0] == models[1]
    entries = [json.loads(line) for line in (tmp_path / "every_2" / "log.jsonl").read_text().splitlines()]
    assert ["routers" in entry for entry in entries] == [False, True, False, True]
    for entry in entries[1::2]:
        assert list(entry["routers"]) == ["scale_0", "scale_1"]
        for router in entry["routers"].values():
            assert sum(router["load"]) == pytest.approx(1) and 0 <= router["mean_entropy"] <= 1
        balance = [router["losses"]["load_balance"] for router in entry["routers"].values()]
        assert sum(balance) / 2 == pytest.approx(entry["aux_loss/load_balance"], rel=1e-5)
        assert list(entry["fusion"]) == ["parotid_gland_left", "parotid_gland_right", "mandible"]
        for shares in entry["fusion"].values():
            assert sum(shares["weight"]) == pytest.approx(1) and sum(shares["wins"]) == pytest.approx(1)


@pytest.mark.wide
def test_two_processes_report_what_one_does(tmp_path: Path) -> None:
    script = REPOSITORY / "tests" / "statistics_processes.py"
    results = []
    for processes in (1, 2):
        result = tmp_path / f"{processes}.json"
        started = [
            subprocess.Popen(
                [sys.executable, str(script), str(rank), str(processes), str(tmp_path / "meet"), str(result)]
            )
            for rank in range(processes)
        ]
        assert [process.wait(timeout=200) for process in started] == [0] * processes
        results.append(flat(json.loads(result.read_text())))
    assert results[0] == pytest.approx(results[1])


def test_the_scores_of_a_validation_stand_in_one_line_of_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    scores = {f"dice/parotid_gland_{side}": 0.5 for side in ("left", "right")} | {"dice/submandibular_gland": 0.5}
    with StepReporter(Accelerator(cpu=True), tmp_path, 0, 4, 0) as report:
        report.validation(2, scores)
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("step 2"))
    assert all(name in line for name in scores)
