"""The runner of the checks on a GPU, and what the checks leave out."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "kernels" / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    """Imports a module of the benchmark."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def test_a_process_that_dies_fails_its_check_alone(tmp_path: Path, benchmark) -> None:
    checks, results = benchmark("checks"), benchmark("results")
    script = tmp_path / "work.py"
    script.write_text(
        "import os, sys, time\n"
        "for line in sys.stdin:\n"
        "    if 'dies' in line: os.abort()\n"
        "    if 'hangs' in line: time.sleep(60)\n"
        "    print('{\"ok\": true}', flush=True)\n"
    )
    worker = checks.Worker([sys.executable, str(script)], tmp_path / "log")
    store = results.Results(tmp_path / "checks.json", {"device": "none"})
    checks.LONGEST = 3.0
    deadline = checks.time.monotonic() + 30
    left = checks.run([["first", "dies"], ["second"], ["hangs"], ["third"]], [worker], store, deadline)
    steps = json.loads(store.path.read_text())["steps"]
    assert not left and [name for name, step in steps.items() if step["ok"]] == ["first", "second", "third"]
    assert "ended" in steps["dies"]["problem"] and "no verdict" in steps["hangs"]["problem"]
    assert checks.run([["late"]], [worker], store, checks.time.monotonic()) == ["late"]


def test_a_session_goes_on_after_parts_that_fail_or_hang(tmp_path: Path, benchmark, monkeypatch, capsys) -> None:
    session = benchmark("session")
    done = "import sys\nopen(sys.argv[sys.argv.index('--out') + 1] + '/{}', 'w')\n"
    scripts = {"fails": "raise SystemExit(3)", "hangs": "import time\ntime.sleep(60)", "works": done.format("works")}
    for name, text in {**scripts, "last": done.format("last")}.items():
        (tmp_path / f"{name}.py").write_text(text)

    def part(name: str) -> session.Part:
        return session.Part(name, str(tmp_path / f"{name}.py"), (), 1.0)

    monkeypatch.setattr(session, "stages", lambda: [[part("works"), part("fails")], [part("hangs")], [part("last")]])
    monkeypatch.setattr(session, "_GRACE", -57.0)
    assert session.main(["--out", str(tmp_path / "out"), "--minutes", "5"]) == 0
    said = capsys.readouterr().out
    assert "fails ended with 3" in said and "works ended with 0" in said and "hangs was stopped" in said
    assert {"works", "last", "hangs.log"} <= {path.name for path in (tmp_path / "out").iterdir()}
    session.main(["--out", str(tmp_path / "out"), "--minutes", "0"])
    assert "no time is left for last" in capsys.readouterr().out


def test_a_session_asks_for_steps_that_exist(benchmark) -> None:
    session, run = benchmark("session"), benchmark("run")
    names = [name for name, _ in run.steps(run.Setting("cpu", {}, lambda: None), False)]
    parts = [part for stage in session.stages() for part in stage]
    assert len({part.name for part in parts}) == len(parts)
    for part in parts:
        assert not part.script or (BENCHMARKS.parents[1] / part.script).is_file()
        if part.script.endswith("run.py"):
            assert part.arguments[0] == "--steps"
            for start in part.arguments[1:]:
                assert len([name for name in names if name.startswith(start)]) >= 1, start


@pytest.mark.parametrize(
    "name", ["head of equal scores", "mlp 37-50 gated float16", "rerun combine", "mlp 512-1040 through TMA"]
)
def test_checks_pass_on_a_cpu_and_leave_the_settings(name: str, benchmark) -> None:
    verdict = benchmark("check_cases").checks("cpu", 40)[name].verdict()
    assert verdict["ok"]
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_wrong_result_and_an_unwritten_one_are_found(benchmark) -> None:
    cases, checks = benchmark("check_cases"), benchmark("device_checks")
    inputs = cases.mlp_inputs("cpu", torch.float32, (40, 4, 2, 16, 24))
    wrong = lambda x, *rest: checks.kernels.moe_mlp(x, *rest) * 1.001  # noqa: E731
    assert not checks.compare(wrong, checks.plain_mlp, inputs)["ok"]
    with cases.settings(tf32=False, poisoned=True):
        assert torch.empty(3).isnan().all()


def test_units_at_the_kink_are_left_out(benchmark) -> None:
    cases, kinks = benchmark("check_cases"), benchmark("kinks")
    inputs = cases.mlp_inputs("cpu", torch.float32, (40, 4, 2, 16, 24), "relu", False, "uniform", False)
    assert kinks.smooth_tokens(inputs).all()
    inputs[0].data[3] = 0  # every hidden unit of this token is zero
    keep = kinks.smooth_tokens(inputs)[:, 0]
    assert keep[3] == 0 and keep.sum() == 39
    head = cases.head_inputs("cpu", (1, 2, 3, 8, 50), 2, 0.1)
    assert kinks.smooth_voxels(head).mean() > 0.99
    head[0].data[0, 1, :, 7] = head[0].data[0, 0, :, 7]
    head[0].data[0, 2, :, 7] = head[0].data[0, 0, :, 7]
    head[2].data.zero_()
    assert (kinks.smooth_voxels(head)[0, :, 7] == 0).all()  # three equal scores, of which two are kept
