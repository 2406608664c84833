"""`kernels/benchmarks/tune.py`: the rule of its search, its files, and that a later call continues."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
from mome_kernels.gpu import configs
from mome_kernels.gpu.launch import Machine

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "kernels" / "benchmarks"
MACHINE = Machine("sm_90", 132)
# the row that V1 and V5 select, at its present place in the table
INDEX = configs.table("sm_90")["mlp_dw"].index(configs.fused(MACHINE, "mlp_dw", 48, 192, 2, False))
ROW = ("mlp_dw", INDEX)
SHIPPED = {"BM": 32, "BF": 64, "num_warps": 4, "num_stages": 2}  # in these tests, whatever the table has


@pytest.fixture
def load(monkeypatch):
    """Imports a module of `kernels/benchmarks` by its name."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-W", "ignore", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


# -- without a clock --------------------------------------------------------------------------------------------------


def test_neighbours_are_one_step_away(load) -> None:
    search = load("tuning_search")
    config = {"BM": 16, "BF": 256, "num_warps": 4, "num_stages": 2, "walk": 16, "per_processor": 2}
    steps = [dict(n.items() - config.items()) for n in search.neighbours("mlp", config)]
    assert steps == [
        {"BM": 32}, {"BF": 128}, {"num_warps": 8}, {"num_stages": 1}, {"num_stages": 3}, {"walk": 8},
        {"per_processor": 1}, {"per_processor": 3}, {"whole": 1},
    ]  # fmt: skip
    config = {"BN": 64, "tma": 1}
    assert search.neighbours("linear", config)[-1] == {**config, "tma": 0}


def test_improving_steps_are_merged_largest_first(load) -> None:
    search = load("tuning_search")
    config = {"BM": 64, "BF": 64, "walk": 4}
    around = search.neighbours("mlp", config)
    scores = {search.text_of(config): 1.0}
    scores |= {search.text_of(n): 1.2 for n in around}
    scores |= {search.text_of({**config, **step}): s for step, s in (({"BM": 128}, 0.9), ({"BF": 32}, 0.8))}
    assert search.merges(config, scores, around) == [{**config, "BF": 32, "BM": 128}]
    scores[search.text_of({**config, "walk": 8})] = 0.95
    assert search.merges(config, scores, around)[-1] == {"BM": 128, "BF": 32, "walk": 8}
    assert search.merges(config, {text: max(1.0, s) for text, s in scores.items()}, around) == []


def test_rule_of_selection(load) -> None:
    search = load("tuning_search")
    shipped = {"V1": 1.0, "V5": 2.0}
    assert not search.takes_the_row({"V1": 0.975, "V5": 1.95}, shipped)
    assert search.takes_the_row({"V1": 0.97, "V5": 1.94}, shipped)
    assert search.takes_the_row({"V1": 0.90, "V5": 2.04}, shipped)
    assert not search.takes_the_row({"V1": 0.50, "V5": 2.05}, shipped), "no case may lose more than 2 %"
    assert not search.takes_the_row({"V1": 0.50}, shipped), "every case counts"
    assert not search.takes_the_row({}, {})


def test_every_shape_selects_rows(load) -> None:
    cases, shapes = load("tuning_cases"), load("shapes").SHAPES
    found = cases.rows(shapes.values(), MACHINE, 2)
    assert {"V1", "V5"} <= {case.name for case in found[ROW]} and next(iter(found))[0] == "mlp"
    products = {case.product for (kernel, _), row in found.items() if kernel in ("linear", "dw") for case in row}
    assert products == {"up", "up with z", "down", "z", "dh", "dx", "d_up", "d_down"}
    assert all(row["up_to"].get("bytes", 2) == 2 for k, i in found for row in [configs.table("sm_90")[k][i]])


def test_an_override_is_restored(load) -> None:
    cases, shapes = load("tuning_cases"), load("shapes").SHAPES
    before = json.dumps(configs.table("sm_90"))
    bench = cases.Bench(cases.Case("mlp_dw", shapes["V1"]), "meta", torch.bfloat16)
    with cases.overridden(MACHINE, ROW, SHIPPED):
        plain = bench.plan(MACHINE)
    with pytest.raises(RuntimeError), cases.overridden(MACHINE, ROW, {"BF": 16, "extra": 1}):
        changed = bench.plan(MACHINE)
        raise RuntimeError
    assert json.dumps(configs.table("sm_90")) == before
    assert (changed[0].args["BF"], plain[0].args["BF"]) == (16, 64)
    assert changed[1].args["TILES"] < plain[1].args["TILES"], "more programs, fewer shares to sum"


# -- the search with a simulated clock --------------------------------------------------------------------------------


@pytest.fixture
def tuner(load, tmp_path: Path):
    """A tuner of meta tensors whose times depend on the configuration, and the list of what it timed."""
    measure, script, search = load("tuning_measure"), load("results"), load("tuning_search")
    timed: list[str] = []

    class Fake(measure.Tuner):
        slow_v5 = False

        def outputs(self, bench: Any, row: Any, config: dict) -> list[torch.Tensor]:
            if config["BM"] == 16:
                raise RuntimeError("out of resource: registers\nmore")
            return [torch.full((3,), 2.0 if config["BF"] == 128 else 1.0)]

        def time(self, bench: Any, row: Any, config: dict) -> float:
            timed.append(f"{bench.case.name} {search.text_of(config)}")
            gain = {1: 0.5, 3: 0.8}.get(config["num_stages"], 1.0) * (0.9 if config["num_warps"] == 8 else 1.0)
            return 1.03 if self.slow_v5 and bench.case.name == "V5" and gain < 1 else gain

    def compiler(jobs: list) -> list[dict]:
        """Reports too much memory for one stage, and spills for 32 units."""
        return [
            {"shared": 10 if job.config["num_stages"] == 1 else 5, "stack": 8 if job.config["BF"] == 32 else 0}
            for job in jobs
        ]

    def new(minutes: float = 1.0, **options: Any) -> Any:
        results = script.Results(tmp_path / "tuning_x.json", {"device": "x"})
        made = Fake(results, MACHINE, "meta", torch.bfloat16, measure.time.monotonic() + 60 * minutes, compiler,
                    shared=8)  # fmt: skip
        for key, value in options.items():
            setattr(made, key, value)
        return made

    cases = load("tuning_cases")
    with cases.overridden(MACHINE, ROW, SHIPPED):
        both = cases.rows(load("shapes").SHAPES.values(), MACHINE, 2)[ROW]
        yield new, [case for case in both if case.name in ("V1", "V5")], timed


def test_the_best_candidate_that_runs_is_chosen(tuner, tmp_path: Path) -> None:
    new, cases, timed = tuner
    wanted = {"BM": 32, "BF": 64, "num_warps": 8, "num_stages": 3}
    assert new().tune(ROW, cases) == wanted
    steps = json.loads((tmp_path / "tuning_x.json").read_text())["steps"]
    first = steps[f"mlp_dw {INDEX} V1"]["candidates"]
    assert first["BM=16 BF=64 num_warps=4 num_stages=2"] == {"problem": "out of resource: registers"}
    assert first["BM=32 BF=128 num_warps=4 num_stages=2"]["problem"].startswith("wrong")
    compiled = steps[f"compile mlp_dw {INDEX}"]["candidates"]
    assert "shared memory" in compiled["BM=32 BF=64 num_warps=4 num_stages=1"]["problem"]
    assert "spills 8 bytes" in compiled["BM=32 BF=32 num_warps=4 num_stages=2"]["problem"]
    failing = ("num_stages=1", "BM=16", "BF=128", "BF=32")
    assert timed and not [text for text in timed if any(part in text for part in failing)]
    assert not {text.split(" ", 1)[1] for text in timed if text.startswith("V5")} & {
        text for text, figures in first.items() if "problem" in figures
    }, "what failed on one case is not tried on the next"
    confirmed = steps[f"confirm mlp_dw {INDEX}: BM=32 BF=64 num_warps=8 num_stages=3"]
    assert confirmed["done"] and set(confirmed["candidates"]) == {"V1", "V5"}
    timed.clear()
    assert new().tune(ROW, cases) == wanted and not timed, "a second call measures nothing again"


def test_a_loss_in_one_case_keeps_the_row(tuner) -> None:
    new, cases, _ = tuner
    assert new(slow_v5=True).tune(ROW, cases) is None


def test_no_measurement_begins_after_the_time(tuner, load) -> None:
    new, cases, timed = tuner
    with pytest.raises(load("tuning_measure").OutOfTime):
        new(minutes=0.0).tune(ROW, cases)
    assert not timed


def test_a_candidate_that_kills_the_device_is_not_run_again(tuner, load, monkeypatch) -> None:
    new, cases, timed = tuner
    measure = load("tuning_measure")

    def lost(_: str) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(measure, "settle", lost)
    with pytest.raises(measure.DeviceLost):
        new().tune(ROW, cases)
    monkeypatch.undo()
    killers = [f for f in new().results.data["steps"][f"mlp_dw {INDEX} V1"]["candidates"].values() if f.get("fatal")]
    assert len(killers) == 1
    assert new().tune(ROW, cases) is not None


# -- compiling, and the script ----------------------------------------------------------------------------------------


@pytest.mark.wide
def test_workers_compile_under_the_key_of_a_launch(tmp_path: Path) -> None:
    """A launch with real tensors finds what a worker compiled; in a separate process, since the driver is replaced."""
    code = f"""
import sys
sys.path.insert(0, {str(BENCHMARKS)!r})
import torch, triton
from triton.backends.compiler import GPUTarget
from mome_kernels.gpu.launch import Launch, Machine
from mome_kernels.gpu import configs, grouped, rows
from tuning_cases import Case, config_of, rows as rows_of
from tuning_compile import Job, compile_job, warm
from shapes import SHAPES
machine, row = Machine("sm_90", 132), ("mlp", 0)
cases = rows_of([SHAPES["V6"]], machine, 2)[row]
config = config_of(configs.table("sm_90")["mlp"][0])
hits = []
triton.knobs.compilation.listener = lambda *, cache_hit, **_: hits.append(cache_hit)
job = lambda **change: Job(machine, ("cuda", 90, 32), row, {{**config, **change}}, tuple(cases))
done = compile_job(job())
assert 0 < done["shared"] < 227 * 1024 and done["stack"] == 0, done
assert compile_job(job(BM=48))["problem"]
real = lambda t: torch.zeros(1024, dtype=t.dtype) if torch.is_tensor(t) else t
from tuning_cases import Bench
launch, = Bench(cases[0], "meta", torch.bfloat16).plan(machine)
launch.kernel.device_caches.clear()
launch.args.update({{name: real(value) for name, value in launch.args.items()}})
warm(launch)
print(hits)
"""
    done = run("-c", code, TRITON_CACHE_DIR=str(tmp_path))
    assert done.stdout.strip() == "[False, True]", done.stdout + done.stderr


@pytest.mark.wide
def test_products_are_those_of_the_layers() -> None:
    done = run(str(Path(__file__).with_name("tuned_products.py")), TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr[-3000:]
    errors = json.loads(done.stdout)
    assert len(errors) >= 23 and max(errors.values()) < 5e-6, errors


def test_without_a_gpu_it_exits(tmp_path: Path, load, capsys) -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    assert load("tune").main(["--out", str(tmp_path)]) == 2
    assert "no CUDA device" in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.wide
def test_rehearsal_continues(tmp_path: Path, load, monkeypatch, capsys) -> None:
    arguments = ["--out", str(tmp_path), "--rehearse"]
    first = run(str(BENCHMARKS / "tune.py"), *arguments)
    assert first.returncode == 0 and "another call: none" in first.stdout, first.stderr
    measured = json.loads((tmp_path / "tuning_cpu.json").read_text())
    assert measured["rehearsal"] and {name.split()[0] for name in measured["steps"]} <= {"mlp", "dw", "confirm"}
    assert {"V1", "L5 d_up", "L5 d_down"} <= {name.split(" ", 2)[2] for name in measured["steps"]}
    for step in measured["steps"].values():
        assert step["up_to"] and step["candidates"]
    # no time is needed when everything is measured; another figure would change the file
    assert load("tune").main([*arguments, "--minutes", "0"]) == 0
    assert "another call: none" in capsys.readouterr().out
    assert json.loads((tmp_path / "tuning_cpu.json").read_text()) == measured

    monkeypatch.setattr(configs, "_FOLDER", tmp_path)
    tuned, shipped = configs.table("sm_90_rehearsal"), configs.table("sm_90")
    assert {k: [row["up_to"] for row in rows] for k, rows in tuned.items()} == {
        k: [row["up_to"] for row in rows] for k, rows in shipped.items()
    }
    assert all(list(a) == list(b) for k in tuned for a, b in zip(tuned[k], shipped[k], strict=True))

    measured["source"] = "another"
    (tmp_path / "tuning_cpu.json").write_text(json.dumps(measured))
    assert load("tune").main(arguments) == 2
    assert capsys.readouterr().err.strip().endswith("another source: choose another folder")


def test_the_table_is_written_as_it_is_shipped(load) -> None:
    script: ModuleType = load("tune")
    shipped = configs._FOLDER / "sm_90.json"
    assert script.dump_table(script.table_with("sm_90", {})) == shipped.read_text()
    new = script.table_with("sm_90", {ROW: {"BM": 64, "BF": 16}})
    assert new["mlp_dw"][1] == {"up_to": configs.table("sm_90")["mlp_dw"][1]["up_to"], "BM": 64, "BF": 16}
