"""Compares two checkouts of this repository: equal results, speed and peak memory.

    git worktree add ../before COMMIT
    python benchmarks/compare_commits.py ../before . --out benchmarks/results/compare_commits.json

Both checkouts can share one Python environment: each probe runs in a fresh process whose PYTHONPATH is the checkout.
`--before-python` and `--after-python` name other interpreters.

Equality: the logits of the bundled checkpoint on a phantom, the losses of ten training steps on phantoms, and the masks
of the demo, all in float32 on one thread, must have the same bits.

Speed and memory (`--pairs`): encode, decode with 32 prompts, and a training step of the bundled checkpoint. In every
pair both checkouts run once, in alternating order, so that a busy machine slows both alike. A probe's time is the
median of its repetitions after a warm-up, and its memory the peak resident memory of its process.

`--share` compares how much longer `encode` takes than its encoder alone.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import platform
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from processes import commit_of, in_turns, medians, packages_of, probe, run_python, write_results

CHECKPOINT = "mome-ct-tiny"
TIMED = ("encode", "decode", "train_step")
PROMPTS = 32
RECIPE = """
preset: mome_ct_tiny
labels: [spinal_cord, brainstem, mandible, larynx]
bank: trained
model: {text_encoder: learned, patch_size: [32, 32, 32]}
cache: CACHE
sources: [{kind: phantom, count: 2, seed: 0}]
augmentation: {affine: 0.5}
train: {steps: 10, batch_size: 2, gradient_accumulation: 2, checkpoint_every: 0, threads: 1, ema: 0.9,
        tracker: none, log_every: 0, out: OUT}
"""


@dataclass(frozen=True)
class Side:
    """One checkout and the interpreter that runs it."""

    checkout: Path
    python: str

    def run(self, arguments: list[str], threads: int, folder: str | Path) -> str:
        """Runs the interpreter in an empty folder with this checkout's packages; returns what it printed.

        Raises:
            SystemExit: The process failed; its last error lines are printed.
        """
        return run_python(self.python, arguments, packages=packages_of(self.checkout), threads=threads, folder=folder)

    def probe(self, name: str, threads: int) -> dict[str, Any]:
        """Runs one probe of this script in a fresh process."""
        arguments = [str(Path(__file__).resolve()), "--probe", name]
        return probe(self.python, arguments, packages=packages_of(self.checkout), threads=threads)

    def describe(self) -> dict[str, str]:
        """The commit of the checkout.

        Raises:
            SystemExit: The interpreter imports `mome` from elsewhere.
        """
        imported = self.run(["-c", "import mome; print(mome.__file__)"], 1, tempfile.gettempdir()).strip()
        if not Path(imported).is_relative_to(self.checkout):
            raise SystemExit(f"{self.python} imports {imported}, not the package in {self.checkout}")
        return {"commit": commit_of(self.checkout)}


# -- probes: run in a fresh process of either checkout, so they use only what both have ------------------------------


def inputs(model: Any, prompts: int, batch: int = 1) -> tuple[Any, Any]:
    """A patch (B, 1, D, H, W) from the middle of a phantom, in [0, 1], and random text rows (P, T)."""
    import numpy as np
    import torch

    from mome.data.phantom import phantom

    hu = phantom(1).array
    starts = [(n - side) // 2 for n, side in zip(hu.shape, model.config.patch_size, strict=True)]
    patch = hu[tuple(slice(s, s + side) for s, side in zip(starts, model.config.patch_size, strict=True))]
    volume = torch.from_numpy(np.clip((patch + 160) / 400, 0, 1).astype(np.float32))[None, None]
    generator = torch.Generator().manual_seed(0)
    return volume.repeat(batch, 1, 1, 1, 1), torch.randn(prompts, model.config.text_dim, generator=generator)


def load_model() -> Any:
    """The bundled checkpoint in eval mode."""
    from mome import MoME

    return MoME.from_pretrained(CHECKPOINT).eval()


def probe_logits() -> dict[str, Any]:
    """SHA-256 of the logits of the bundled checkpoint."""
    import torch

    model = load_model()
    volume, text_PT = inputs(model, PROMPTS)
    with torch.inference_mode():
        logits = model.decode(model.encode(volume), text_PT)
    return {"shape": list(logits.shape), "sha256": hashlib.sha256(logits.contiguous().numpy().tobytes()).hexdigest()}


def timed_call(name: str) -> Callable[[], Any]:
    """The call whose time and memory are measured."""
    import torch

    model = load_model()
    if name == "train_step":
        volume, text_PT = inputs(model.train(), prompts=7, batch=2)
        targets = (torch.rand(2, 7, *volume.shape[2:], generator=torch.Generator().manual_seed(1)) > 0.9).float()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

        def train_step() -> None:
            model(volume=volume, text_PT=text_PT, targets=targets).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return train_step
    volume, text_PT = inputs(model, PROMPTS)
    if name == "encode":
        return torch.inference_mode()(lambda: model.encode(volume))
    if name == "encoder":
        from mome.map_context import DEFAULT_CONTEXT

        return torch.inference_mode()(lambda: model.encoder(volume, DEFAULT_CONTEXT))
    with torch.inference_mode():
        features = model.encode(volume)
    return torch.inference_mode()(lambda: model.decode(features, text_PT))


def probe_timing(name: str, repetitions: int = 5) -> dict[str, Any]:
    """Median milliseconds of a call, and the peak resident memory of this process in MiB."""
    call = timed_call(name)
    call()
    times = [timed(call) for _ in range(repetitions)]
    return {"ms": statistics.median(times), "mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def timed(call: Callable[[], Any]) -> float:
    """Milliseconds of one call."""
    began = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - began)


def probe_share(repetitions: int = 25) -> dict[str, Any]:
    """Median milliseconds of `encode` and of the encoder alone, timed in turn in one process, and their ratio."""
    encode, encoder = timed_call("encode"), timed_call("encoder")
    encode(), encoder()
    times = [(timed(encode), timed(encoder)) for _ in range(repetitions)]
    medians = [statistics.median(column) for column in zip(*times, strict=True)]
    return {"encode_ms": medians[0], "encoder_ms": medians[1], "ratio": medians[0] / medians[1]}


# -- equality --------------------------------------------------------------------------------------------------------


def training_losses(side: Side) -> dict[str, Any]:
    """The losses of ten steps of `mome train` on phantoms."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        recipe = Path(folder) / "run.yaml"
        recipe.write_text(RECIPE.replace("CACHE", f"{folder}/cache").replace("OUT", str(out)))
        side.run(["-m", "mome.cli.main", "train", "--config", str(recipe)], 1, folder)
        entries = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return {str(entry["step"]): [entry["loss"], entry["segmentation_loss"], entry["aux_loss"]] for entry in entries}


def demo_masks(side: Side) -> dict[str, Any]:
    """SHA-256 of the decompressed masks of `mome demo`."""
    with tempfile.TemporaryDirectory() as folder:
        side.run(["-m", "mome.cli.main", "demo", "-o", f"{folder}/demo"], 1, folder)
        masks = sorted(Path(folder, "demo").glob("*.nii.gz"))
        return {path.name: hashlib.sha256(gzip.decompress(path.read_bytes())).hexdigest() for path in masks}


def check_equality(before: Side, after: Side) -> dict[str, Any]:
    """What both sides compute, and whether it is equal."""
    checks: dict[str, Callable[[Side], dict[str, Any]]] = {
        "logits": lambda side: side.probe("logits", 1),
        "training losses": training_losses,
        "demo masks": demo_masks,
    }
    report = {}
    for name, compute in checks.items():
        results = {"before": compute(before), "after": compute(after)}
        equal = bool(results["before"]) and results["before"] == results["after"]
        report[name] = {"equal": equal, **results}
        print(f"{name:<18}{'equal' if equal else 'DIFFERENT'}", flush=True)
    return report


# -- speed and memory ------------------------------------------------------------------------------------------------


def compare_timing(before: Side, after: Side, pairs: int, threads: int) -> dict[str, Any]:
    """Times and memory of every probe, and the median over pairs of the ratio after / before."""
    report = {}
    print(f"{'':<12}{'before ms':>11}{'after ms':>11}{'ratio':>8}{'before MiB':>12}{'after MiB':>11}{'ratio':>8}")
    for name in TIMED:
        calls = {"before": partial(before.probe, name, threads), "after": partial(after.probe, name, threads)}
        results = in_turns(calls, pairs)
        row: dict[str, Any] = {"pairs": results}
        line = f"{name:<12}"
        for unit, width in (("ms", 11), ("mib", 12)):
            values = {label: [entry[unit] for entry in entries] for label, entries in results.items()}
            ratios = [b / a for a, b in zip(values["before"], values["after"], strict=True)]
            medians = {label: statistics.median(numbers) for label, numbers in values.items()}
            row[unit] = {**medians, "ratio": statistics.median(ratios)}
            line += f"{medians['before']:>{width}.1f}{medians['after']:>11.1f}{row[unit]['ratio']:>8.3f}"
        report[name] = row
        print(line, flush=True)
    return report


def compare_shares(before: Side, after: Side, pairs: int, threads: int) -> dict[str, Any]:
    """How much longer `encode` takes than its encoder alone, on both sides; the ratios are medians over the pairs."""
    calls = {"before": partial(before.probe, "share", threads), "after": partial(after.probe, "share", threads)}
    results = in_turns(calls, pairs)
    report: dict[str, Any] = {label: medians(entries) for label, entries in results.items()}
    for label, row in report.items():
        print(
            f"{label:<8}encode {row['encode_ms']:.1f} ms, encoder {row['encoder_ms']:.1f} ms, ratio {row['ratio']:.3f}"
        )
    return {**report, "pairs": results}


def main() -> int:
    """Runs the command line; returns 1 if a result differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", nargs="?", type=Path, help="checkout of the earlier commit")
    parser.add_argument("after", nargs="?", type=Path, help="checkout of the later commit")
    parser.add_argument("--before-python", default=sys.executable, help="interpreter for `before`")
    parser.add_argument("--after-python", default=sys.executable, help="interpreter for `after`")
    parser.add_argument("--pairs", type=int, default=7, help="pairs of timed runs; 0 checks equality only")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of timed runs")
    parser.add_argument("--out", type=Path, help="write all results to this JSON file")
    parser.add_argument("--probe", choices=("logits", "share", *TIMED), help=argparse.SUPPRESS)
    parser.add_argument("--share", action="store_true", help="only compare the times of encode and of its encoder")
    args = parser.parse_args()
    if args.probe:
        probes = {"logits": probe_logits, "share": probe_share}
        print(json.dumps(probes[args.probe]() if args.probe in probes else probe_timing(args.probe)))
        return 0
    if args.before is None or args.after is None:
        parser.error("two checkouts are needed")
    before = Side(args.before.resolve(), args.before_python)
    after = Side(args.after.resolve(), args.after_python)
    report: dict[str, Any] = {
        "before": before.describe(),
        "after": after.describe(),
        "processor": platform.processor() or platform.machine(),
        "threads": args.threads,
    }
    if args.share:
        report["share"] = compare_shares(before, after, args.pairs, args.threads)
    else:
        report["equality"] = check_equality(before, after)
    if args.pairs and not args.share:
        report["timing"] = compare_timing(before, after, args.pairs, args.threads)
    write_results(args.out, report)
    return 0 if all(check["equal"] for check in report.get("equality", {}).values()) else 1


if __name__ == "__main__":
    sys.exit(main())
