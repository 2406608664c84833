"""Candidates compiled in a pool of processes, before a device runs them.

A worker plans on meta tensors and compiles through Triton's own launch path, up to the launch, with a replacement for
the device's driver. The keys in Triton's cache on disk are then those of the real launch, in every version of Triton,
and no worker opens the device.
"""

from __future__ import annotations

import multiprocessing
import re
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mome_kernels.gpu import configs
from mome_kernels.gpu.launch import Launch, Machine
from tuning_cases import Bench, Case, Config, Row, overridden

_TESTS = Path(__file__).resolve().parents[2] / "tests" / "kernels"
_SECONDS = 240  # for one candidate


@dataclass(frozen=True)
class Job:
    """A configuration of a row with the cases to compile; without cases, the bounds of the row are compiled."""

    machine: Machine
    target: tuple[str, Any, int]  # backend, architecture and warp size of the device
    row: Row
    config: Config
    cases: tuple[Case, ...] = ()
    dtype: torch.dtype = torch.bfloat16


class _DriverStub:
    """The methods of a driver that Triton calls before it launches."""

    def __init__(self, target: Any) -> None:
        self.target = target

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def warm(launch: Launch) -> Any:
    """Compiles a launch as `Launch.run` does, without running it."""
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages, **launch.options}
    return launch.kernel.warmup(**launch.args, grid=launch.grid, **options)


def _spilled(compiled: Any) -> int:
    """Bytes of registers that a thread spills; 0 where this cannot be determined."""
    import triton

    if "cubin" not in compiled.asm:
        return 4 * sum(map(int, re.findall(r"vgpr_spill_count:\s+(\d+)", compiled.asm.get("amdgcn", ""))))
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.is_file():
        return 0
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        done = subprocess.run([str(tool), "-res-usage", file.name], capture_output=True, text=True, check=False)
    found = re.search(r"STACK:(\d+)", done.stdout)
    return int(found.group(1)) if found else 0


def _launches(job: Job) -> list[Launch]:
    if job.cases:
        return [launch for case in job.cases for launch in Bench(case, "meta", job.dtype).plan(job.machine)]
    if not (_TESTS / "compile_cases.py").is_file():
        return []  # the bounds need the tests, which an installed package lacks
    sys.path.insert(0, str(_TESTS))
    from compile_cases import linear_variants, row_launch

    kernel, index = job.row
    row = configs.table(job.machine.arch)[kernel][index]
    more = list(linear_variants(job.machine, row)) if kernel == "linear" else []
    return [row_launch(job.machine, kernel, row), *more]


def compile_job(job: Job) -> dict[str, Any]:
    """The largest shared memory and stack of a job's launches in bytes, or the `problem`."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    signal.alarm(_SECONDS)  # ends a compiler that hangs; the pool then reports it
    try:
        driver.set_active(_DriverStub(GPUTarget(*job.target)))
        with overridden(job.machine, job.row, job.config):
            compiled = [warm(launch) for launch in _launches(job)]
        shared = max((one.metadata.shared for one in compiled), default=0)
        return {"shared": shared, "stack": max(map(_spilled, compiled), default=0)}
    except Exception as problem:  # many configurations do not compile
        return {"problem": next(iter(str(problem).splitlines()), "")[:300] or repr(problem)[:300]}
    finally:
        signal.alarm(0)


class Compiler:
    """A pool of processes for `compile_job`; a compiler that crashes fails only its own candidate."""

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._pool = self._new(workers)

    @staticmethod
    def _new(workers: int) -> ProcessPoolExecutor:
        # a forked child would share the parent's state of the device
        return ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))

    def __call__(self, jobs: list[Job]) -> list[dict[str, Any]]:
        results: list[dict[str, Any] | None] = []
        try:
            futures = [self._pool.submit(compile_job, job) for job in jobs]
            for future in futures:
                results.append(None if isinstance(future.exception(), BrokenProcessPool) else future.result())
        except BrokenProcessPool:
            pass
        results += [None] * (len(jobs) - len(results))
        if None not in results:
            return [result for result in results if result is not None]
        self.close()
        # one of the jobs without a result crashed; each of them runs again in its own process
        done = [self._alone(job) if result is None else result for job, result in zip(jobs, results, strict=True)]
        self._pool = self._new(self.workers)
        return done

    def _alone(self, job: Job) -> dict[str, Any]:
        with self._new(1) as pool:
            try:
                return pool.submit(compile_job, job).result()
            except BrokenProcessPool:
                return {"problem": f"the compiler crashed, or took more than {_SECONDS} s"}

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
