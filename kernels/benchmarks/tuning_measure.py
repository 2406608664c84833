"""Times the candidates of a row launch by launch, and confirms the best of them against the shipped row.

Every figure is written as soon as it is known, and read from the file if an earlier call measured it. The search
depends on nothing else, so that a later call continues it.

The search of a row is a generator. It yields the candidates that it needs compiled and is sent the compiler's verdicts,
so that the candidates of all rows are compiled in one batch (`tune_all`).
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Generator, Mapping
from typing import Any, TypeVar

import torch
from mome_kernels.gpu import configs
from mome_kernels.gpu.launch import Launch, Machine
from results import Results
from run import first_line, median_ms, settle
from tuning_cases import Bench, Case, Config, Row, config_of, overridden
from tuning_compile import Job
from tuning_search import HOPELESS, SLOWER, mean_ratio, merges, neighbours, takes_the_row, text_of

T = TypeVar("T")
Search = Generator[list[Job], list[dict[str, Any]], T]  # yields jobs for the compiler, is sent their verdicts

SEARCHED = 9  # cases of a row that a search measures, evenly chosen; all cases are measured to confirm
SWEEPS, FINALISTS, ROUNDS = 2, 3, 5
_TOLERANCE = 0.02  # relative to the largest value and to the norm; covers another order of sums and bfloat16


class OutOfTime(Exception):
    """The time is over; the remaining measurements are left for another call."""


class DeviceLost(Exception):
    """A candidate made the device unusable for this process; it is recorded and not run again."""


class Wrong(Exception):
    """The outputs differ from those of the shipped configuration."""


def compare(outputs: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    """Raises `Wrong` where an output differs; compares in pieces, since the largest outputs are gigabytes."""
    for out, reference in zip(outputs, expected, strict=True):
        worst = largest = error = norm = 0.0
        pieces = zip(out.view(-1).split(1 << 26), reference.view(-1).split(1 << 26), strict=True)
        for piece, right in pieces:
            difference = piece.float() - right.float()
            worst = max(worst, float(difference.abs().nan_to_num(float("inf")).max()))
            largest = max(largest, float(right.abs().max()))
            error, norm = error + float(difference.square().sum()), norm + float(right.float().square().sum())
        if not (worst <= _TOLERANCE * largest and error <= _TOLERANCE**2 * norm):
            raise Wrong(f"wrong: off by {worst:.3g} where the largest value is {largest:.3g}")


class Tuner:
    """Measures candidates row by row; a figure that `results` already has is not measured again."""

    def __init__(
        self, results: Results, machine: Machine, device: str, dtype: torch.dtype, deadline: float,
        compiler: Callable[[list[Job]], list[dict[str, Any]]] | None = None, target: tuple[str, Any, int] = ("", 0, 0),
        shared: int = 0, narrow: bool = False,
    ) -> None:  # fmt: skip
        self.results, self.machine, self.device, self.dtype, self.deadline = results, machine, device, dtype, deadline
        self.compiler, self.target, self.shared = compiler, target, shared
        self.narrow = narrow  # for a rehearsal: two neighbours of the shipped row, one round
        self.warmed: set[tuple[Row, str, tuple[Case, ...]]] = set()

    # -- one launch --------------------------------------------------------------------------------------------

    def plan(self, bench: Bench, row: Row, config: Config) -> list[Launch]:
        with overridden(self.machine, row, config):
            return bench.plan(self.machine)

    def outputs(self, bench: Bench, row: Row, config: Config) -> list[torch.Tensor]:
        """The outputs of a configuration; elements that it does not write are NaN."""
        for out in bench.outputs:
            out.fill_(float("nan"))
        for launch in self.plan(bench, row, config):
            launch.run()
        return bench.outputs

    def time(self, bench: Bench, row: Row, config: Config) -> float:
        launches = self.plan(bench, row, config)
        return median_ms(lambda: [launch.run() for launch in launches], self.device)

    def guarded(self, entry: dict[str, Any], call: Callable[[], None]) -> None:
        """Runs `call` and records an exception in `entry`, as fatal if the device has become unusable."""
        try:
            call()
        except OutOfTime:
            raise
        except Exception as problem:  # a candidate may be unable to run
            entry["problem"] = first_line(problem)
            try:
                settle(self.device)
            except Exception as dead:
                entry["fatal"] = True
                raise DeviceLost(first_line(dead)) from problem

    def in_time(self) -> None:
        if time.monotonic() > self.deadline:
            raise OutOfTime

    # -- candidates on cases -----------------------------------------------------------------------------------

    def entry(self, name: str, row: Row) -> dict[str, Any]:
        """The entry of this name, or a new one that is not written yet."""
        bounds = configs.table(self.machine.arch)[row[0]][row[1]]["up_to"]
        return self.results.data["steps"].get(name) or {"up_to": bounds, "candidates": {}}

    def prepare(self, row: Row, shipped: Config, candidates: list[Config], cases: tuple[Case, ...]) -> Search[None]:
        """Asks for the compilation of candidates, and records those that do not fit the device."""
        name = f"compile {row[0]} {row[1]}{'' if cases else ' at its bounds'}"
        entry = self.entry(name, row)
        done, todo = entry["candidates"], []
        for config in [shipped, *candidates]:
            text = text_of(config)
            if (row, text, cases) not in self.warmed and "problem" not in done.get(text, {}):
                self.warmed.add((row, text, cases))
                todo.append(config)
        if self.compiler is None or not todo:
            return
        self.in_time()
        jobs = [Job(self.machine, self.target, row, config, cases, self.dtype) for config in todo]
        verdicts = yield jobs
        for config, result in zip(todo, verdicts, strict=True):
            done[text_of(config)] = result
        spilled = done[text_of(shipped)].get("stack", 0)
        for config in todo:
            result = done[text_of(config)]
            if result.get("shared", 0) > self.shared:
                result["problem"] = f"needs {result['shared']} bytes of shared memory, {self.shared} are there"
            elif result.get("stack", 0) > spilled:
                result["problem"] = f"spills {result['stack']} bytes of registers, the shipped row {spilled}"
        self.results.add(name, entry)

    def unfit(self, row: Row, text: str, bounds: bool = False) -> bool:
        name = f"compile {row[0]} {row[1]}{' at its bounds' if bounds else ''}"
        return "problem" in self.entry(name, row)["candidates"].get(text, {})

    def measure(
        self, row: Row, shipped: Config, candidates: list[Config], cases: list[Case]
    ) -> Search[dict[str, float]]:
        """Relative times of the candidates, 1 for the shipped row and infinite for dropped candidates."""
        first, texts = text_of(shipped), [text_of(config) for config in candidates]
        entries = {case.name: self.entry(f"{row[0]} {row[1]} {case.name}", row) for case in cases}
        known = lambda text: all(text in entry["candidates"] for entry in entries.values())  # noqa: E731
        new = [c for c, t in zip(candidates, texts, strict=True) if not (known(t) or self.hopeless(entries, t, first))]
        if new:
            yield from self.prepare(row, shipped, new, tuple(cases))
        for case in cases:
            entry = entries[case.name]
            if "problem" not in entry:
                fresh = [c for c in [shipped, *candidates] if text_of(c) not in entry["candidates"]]
                self.case(row, case, entry, shipped, fresh, lambda t: self.hopeless(entries, t, first))
                settle(self.device)  # frees the memory of the case
        times: dict[str, dict[str, float]] = {text: {} for text in [first, *texts]}
        for name, entry in entries.items():
            for text, figures in entry["candidates"].items():
                if text in times and "ms" in figures:
                    times[text][name] = figures["ms"]
        return {text: mean_ratio(times[text], times[first]) for text in times}

    def hopeless(self, entries: dict[str, dict[str, Any]], text: str, shipped: str) -> bool:
        """Whether the recorded figures show that a candidate failed or is much too slow."""
        for entry in entries.values():
            figures, base = entry["candidates"].get(text, {}), entry["candidates"].get(shipped, {})
            if "problem" in figures and "problem" not in base:
                return True
            if "ms" in base and figures.get("ms", 0.0) > HOPELESS * base["ms"]:
                return True
        return False

    def case(
        self, row: Row, case: Case, entry: dict[str, Any], shipped: Config, fresh: list[Config],
        hopeless: Callable[[str], bool],
    ) -> None:  # fmt: skip
        """Times these configurations on one case and writes the results at once."""
        fresh = [c for c in fresh if not (self.unfit(row, text_of(c)) or hopeless(text_of(c)))]
        if not fresh:
            return
        self.in_time()
        name = f"{row[0]} {row[1]} {case.name}"
        held: list[Any] = []

        def allocate() -> None:
            bench = Bench(case, self.device, self.dtype)
            held.extend([bench, [out.clone() for out in self.outputs(bench, row, shipped)]])

        try:
            self.guarded(entry, allocate)
            if "problem" in entry:  # the shipped row cannot run this case on this device
                return
            bench, expected = held
            for config in fresh:
                self.in_time()
                figures: dict[str, Any] = {}

                def one(config: Config = config, figures: dict[str, Any] = figures) -> None:
                    compare(self.outputs(bench, row, config), expected)
                    figures["ms"] = self.time(bench, row, config)

                try:
                    self.guarded(figures, one)
                finally:
                    if figures:  # empty if it was interrupted
                        entry["candidates"][text_of(config)] = figures
        finally:
            held.clear()
            self.results.add(name, entry)

    # -- one row -----------------------------------------------------------------------------------------------

    def tune(self, row: Row, cases: list[Case]) -> Config | None:
        """The confirmed configuration for the row, or None if the shipped one stays."""
        outcome = self.tune_all({row: cases})[row]
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def tune_all(self, rows: Mapping[Row, list[Case]]) -> dict[Row, Config | None | OutOfTime | DeviceLost]:
        """The outcome of every row's search; after a lost device the searches that are left are lost too."""
        outcomes: dict[Row, Config | None | OutOfTime | DeviceLost] = {}
        searches = {row: self.search(row, cases) for row, cases in rows.items()}
        verdicts: dict[Row, list[dict[str, Any]] | None] = dict.fromkeys(searches)
        while searches:
            wanted: dict[Row, list[Job]] = {}
            for row, search in list(searches.items()):
                try:
                    answer = verdicts[row]
                    wanted[row] = next(search) if answer is None else search.send(answer)
                    continue
                except StopIteration as end:
                    outcomes[row] = end.value
                except OutOfTime as problem:
                    outcomes[row] = problem
                except DeviceLost as problem:
                    return outcomes | dict.fromkeys(searches, problem)
                del searches[row]
            if wanted and self.compiler is not None:
                done = iter(self.compiler([job for jobs in wanted.values() for job in jobs]))
                verdicts = {row: [next(done) for _ in jobs] for row, jobs in wanted.items()}
        return outcomes

    def search(self, row: Row, cases: list[Case]) -> Search[Config | None]:
        """Searches around the shipped configuration of a row."""
        kernel, index = row
        shipped = config_of(configs.table(self.machine.arch)[kernel][index])
        count = min(SEARCHED, len(cases))
        searched = [cases[i * len(cases) // count] for i in range(count)]
        best, found, scores = shipped, {text_of(shipped): shipped}, {text_of(shipped): 1.0}
        for _ in range(1 if self.narrow else SWEEPS):
            around = neighbours(kernel, best)[: 2 if self.narrow else None]
            scores |= yield from self.measure(row, shipped, around, searched)
            together = merges(best, scores, around)
            scores |= yield from self.measure(row, shipped, together, searched)
            found |= {text_of(config): config for config in [*around, *together]}
            leader = found[min(found, key=lambda text: scores[text])]
            if leader == best:
                break
            best = leader
        order = sorted((text for text in found if scores[text] * SLOWER <= 1), key=lambda text: scores[text])
        for text in order[:FINALISTS]:
            if (yield from self.confirm(row, shipped, found[text], cases)):
                return found[text]
        return None

    def confirm(self, row: Row, shipped: Config, config: Config, cases: list[Case]) -> Search[bool]:
        """Measures both configurations again, in turn, on all cases; stops when the candidate breaks the rule."""
        text, name = text_of(config), f"confirm {row[0]} {row[1]}: {text_of(config)}"
        known = self.results.data["steps"].get(name, {})
        if not known.get("done"):
            yield from self.prepare(row, shipped, [config], tuple(cases))
            yield from self.prepare(row, shipped, [config], ())
        entry = self.entry(name, row)
        if self.unfit(row, text) or self.unfit(row, text, bounds=True):
            entry |= {"problem": "does not fit: see compile", "done": True}
            self.results.add(name, entry)
        figures = entry["candidates"]
        for case in cases:
            if entry.get("done"):
                break
            if case.name in figures:
                continue
            self.in_time()
            pair: dict[str, Any] = {}
            try:
                self.guarded(pair, functools.partial(self.both, row, shipped, config, case, pair))
            finally:
                if pair:  # empty if it was interrupted
                    figures[case.name] = pair
                    entry["done"] = pair.get("tuned", 0) > SLOWER * pair.get("shipped", 1) or "problem" in pair
                    self.results.add(name, entry)
        if not entry.get("done"):
            entry["done"] = True
            self.results.add(name, entry)
        whole = {case: pair for case, pair in figures.items() if "skipped" not in pair}
        shipped_ms = {case: pair.get("shipped", 0.0) for case, pair in whole.items()}
        tuned_ms = {case: pair.get("tuned", float("inf")) for case, pair in whole.items()}
        broken = "problem" in entry or any("problem" in pair for pair in whole.values())
        return not broken and len(figures) == len(cases) and takes_the_row(tuned_ms, shipped_ms)

    def both(self, row: Row, shipped: Config, config: Config, case: Case, pair: dict[str, Any]) -> None:
        try:
            bench = Bench(case, self.device, self.dtype)
            expected = [out.clone() for out in self.outputs(bench, row, shipped)]
        except torch.OutOfMemoryError as problem:  # no configuration can run this case on this device
            pair["skipped"] = first_line(problem)
            return
        compare(self.outputs(bench, row, config), expected)
        times: dict[str, list[float]] = {"shipped": [], "tuned": []}
        for _ in range(1 if self.narrow else ROUNDS):
            times["shipped"].append(self.time(bench, row, shipped))
            times["tuned"].append(self.time(bench, row, config))
        pair |= {key: statistics.median(values) for key, values in times.items()}
