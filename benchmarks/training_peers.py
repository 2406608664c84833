"""Steps per second and memory of `mome train` beside the same network in a plain MONAI loop.

    MOME_TEST_DATA=… python benchmarks/training_peers.py --out benchmarks/results/training_peers.json   # 6 minutes

Both sides train on the same patients of OpenKBP, with the same network, batch, patch, precision (float32) and threads,
in processes of their own. The peer is what MONAI's tutorials write: `CacheDataset` holds the resampled patients in
memory, dictionary transforms crop and augment (centres by class, with the indices computed once), and the loss is
MONAI's `DiceLoss` with a binary cross entropy. Ours is the command line as users run it, with its log and progress.

Two settings: in `network`, the shipped network `mome_ct_tiny` takes nearly all of the time; in `data`, a network of a
few channels leaves it to reading, cropping and augmenting. Ours has the memory format that is faster for the network of
the setting: channels-last for the small one, whose backward pass takes a third of the CPU time then, and the usual one
for `mome_ct_tiny`, where channels-last takes 3 % more (one thread, torch 2.14). `monai_channels_last` tells what of the
difference is the memory format. Steps after the warm-up count. Preparing the data is
reported apart: ours is built once and stays on disk, MONAI's cache is built by every process.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from peak_memory import peak_mib
from processes import commit_of, in_turns, machine, medians, packages_of, probe, ratios, write_results

HERE = Path(__file__).resolve().parent
LABELS = ["spinal_cord", "brainstem", "esophagus", "parotid_gland_left", "parotid_gland_right", "mandible", "larynx"]
# Setting → parts of the model, patch in voxels, steps, and steps of the warm-up.
SETTINGS: dict[str, tuple[dict[str, Any], int, int, int]] = {
    "data": (
        {
            "text_encoder": "learned",
            "encoder": "unet(channels=[2, 4])",
            "head": "plain",
            "experts": "linear",
            "fusion": "last",
            "dim": 2,
        },
        64,
        60,
        10,
    ),
    "network": ({"text_encoder": "learned"}, 64, 8, 2),
}
BATCH = 2


def configuration(setting: str, folder: Path, cases: int, out: Path, steps: int) -> dict[str, Any]:
    """The training configuration of a setting."""
    parts, patch, _, _ = SETTINGS[setting]
    return {
        "preset": "mome_ct_tiny",
        "model": {**parts, "patch_size": [patch] * 3},
        "labels": LABELS,
        "bank": "trained",
        "cache": str(out / "cache"),
        "sources": [{"kind": "cases", "folder": str(folder), "dataset": "openkbp", "count": cases}],
        "sampling": {"foreground": 0.8, "jitter": 0.25},
        "augmentation": {"mirror": 0.5, "affine": 0.2, "intensity": 0.1, "noise": 0.05},
        "loss": "bce_dice(positive_weight=20)",
        "train": {
            "steps": steps,
            "batch_size": BATCH,
            "channels_last": setting == "data",
            "checkpoint_every": 0,
            "tracker": "none",
            "out": str(out / "run"),
        },
    }


def write_configuration(setting: str, args: argparse.Namespace, out: Path, steps: int) -> Path:
    """Writes the configuration of a setting and returns its path; JSON is YAML, too."""
    path = out / f"{setting}.yaml"
    path.write_text(json.dumps(configuration(setting, args.data, args.cases, out, steps)))
    return path


def summary(seconds: list[float], warm_up: int) -> dict[str, float]:
    """Numbers of the steps after the warm-up, from the seconds at which each step ended."""
    own = [after - before for before, after in zip(seconds[warm_up - 1 :], seconds[warm_up:], strict=False)]
    return {
        "median_step_s": statistics.median(own),
        "steps_per_second": len(own) / sum(own),
        "peak_mib": peak_mib(),
    }


# -- ours ----------------------------------------------------------------------------------------------------


def train_ours(setting: str, args: argparse.Namespace) -> dict[str, float]:
    """Trains by the command line; a first run of one step builds the cache where there is none."""
    from mome.cli.train import main

    _, _, steps, warm_up = SETTINGS[setting]
    with tempfile.TemporaryDirectory(dir=args.work) as out:
        config = write_configuration(setting, args, Path(out), args.steps or steps)
        began = time.perf_counter()
        code = main(["--config", str(config), f"cache={args.work / 'cache'}"])
        assert code == 0, code
        lines = (Path(out) / "run" / "log.jsonl").read_text().splitlines()
        whole = time.perf_counter() - began
    seconds = [json.loads(line)["seconds"] for line in lines]
    return {**summary(seconds, warm_up), "other_s": whole - seconds[-1]}


# -- the peer ------------------------------------------------------------------------------------------------


def train_monai(setting: str, args: argparse.Namespace, *, channels_last: bool) -> dict[str, float]:
    """Trains the same network in a loop of MONAI's parts."""
    import torch
    from monai.losses import DiceLoss
    from monai.utils import set_determinism

    from mome.training.config_file import load_run_config
    from mome.training.setup import build_model
    from mome.training.text_rows import TextRows

    _, _, steps, warm_up = SETTINGS[setting]
    set_determinism(0)
    run = load_run_config(write_configuration(setting, args, args.work, args.steps or steps), [])
    model, processor = build_model(run)
    text_PT = TextRows(model, LABELS, 0.0, 0).at(0)
    if channels_last:
        model.to(memory_format=torch.channels_last_3d)
    model.train()
    began = time.perf_counter()
    batches = monai_batches(args, SETTINGS[setting][1], processor)
    first = next(batches)
    prepared = time.perf_counter() - began
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-4)
    dice = DiceLoss(sigmoid=True, batch=True, squared_pred=False)
    weight = torch.full((1, len(LABELS), 1, 1, 1), 20.0)
    cross_entropy = torch.nn.BCEWithLogitsLoss(pos_weight=weight)
    seconds: list[float] = []
    began = time.perf_counter()
    batch: dict[str, torch.Tensor] | None = first
    for _ in range(args.steps or steps):
        batch = batch or next(batches)
        volume, targets = batch["image"], batch["label"]
        if channels_last:
            volume = volume.contiguous(memory_format=torch.channels_last_3d)
        optimizer.zero_grad()
        logits = model(volume, text_PT).logits
        loss = dice(logits, targets) + cross_entropy(logits, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        loss.item()
        seconds.append(time.perf_counter() - began)
        batch = None
    return {**summary(seconds, warm_up), "other_s": prepared}


def monai_batches(args: argparse.Namespace, patch: int, processor: Any) -> Iterator[dict[str, Any]]:
    """Batches without end of patches that are cropped and augmented by MONAI's transforms."""
    import numpy as np
    import torch
    from monai import transforms as mt
    from monai.data import CacheDataset, DataLoader, list_data_collate

    from mome.labels import load_dataset

    numbers = [load_dataset("openkbp").name_to_id[name] for name in LABELS]
    names = sorted(json.loads((args.data / "cases.json").read_text()))[: args.cases]
    files = [
        {"image": str(args.data / "images" / f"{name}.nii.gz"), "label": str(args.data / "labels" / f"{name}.nii.gz")}
        for name in names
    ]
    both, low, high = ["image", "label"], *processor.hu_window
    sides = [patch] * 3

    class OneHot(mt.MapTransform):
        """The label map as a mask per structure."""

        def __call__(self, data: Any) -> Any:
            label = data["label"][0]
            masks = torch.stack([label == number for number in numbers]).float()
            return {**data, "label": masks}

    class Mirror(mt.RandomizableTransform, mt.MapTransform):
        """Flips left and right, and exchanges the two parotid glands, as our table says."""

        def __init__(self) -> None:
            mt.MapTransform.__init__(self, both)
            mt.RandomizableTransform.__init__(self, 0.5)

        def __call__(self, data: Any) -> Any:
            self.randomize(None)
            if not self._do_transform:
                return data
            image, label = data["image"].flip(1), data["label"].flip(1)
            left, right = label == 4, label == 5
            label = torch.where(left, torch.full_like(label, 5), torch.where(right, torch.full_like(label, 4), label))
            return {**data, "image": image, "label": label}

    angle = np.deg2rad(10)
    transform = mt.Compose([
        mt.LoadImaged(both),
        mt.EnsureChannelFirstd(both),
        mt.Orientationd(both, axcodes="RAS", labels=(("L", "R"), ("P", "A"), ("I", "S"))),
        mt.Spacingd(both, pixdim=processor.spacing, mode=("bilinear", "nearest")),
        mt.ScaleIntensityRanged("image", low, high, 0.0, 1.0, clip=True),
        mt.SpatialPadd(both, sides),
        mt.ClassesToIndicesd("label", num_classes=8, indices_postfix="_places", max_samples_per_class=10_000),
        mt.RandCropByLabelClassesd(
            both, "label", sides, ratios=[0.2] + [0.8 / 7] * 7, num_classes=8, indices_key="label_places"
        ),
        mt.SelectItemsd(both),
        Mirror(),
        mt.RandAffined(
            both, prob=0.2, rotate_range=(angle,) * 3, scale_range=(0.15,) * 3, mode=("bilinear", "nearest"),
            padding_mode="zeros",
        ),
        mt.RandScaleIntensityd("image", factors=0.1, prob=1.0),
        mt.RandShiftIntensityd("image", offsets=0.05, prob=1.0),
        mt.RandGaussianNoised("image", prob=1.0, std=0.025),
        OneHot(["label"]),
    ])  # fmt: skip
    dataset = CacheDataset(files, transform, cache_rate=1.0, num_workers=args.workers or 1, progress=False)
    loader = DataLoader(
        dataset, batch_size=BATCH, shuffle=True, drop_last=True, num_workers=args.workers, collate_fn=list_data_collate
    )
    while True:
        for batch in loader:
            yield {key: batch[key].as_tensor() for key in both}


# -- both ----------------------------------------------------------------------------------------------------

SIDES = {
    "mome": train_ours,
    "monai": lambda setting, args: train_monai(setting, args, channels_last=False),
    "monai_channels_last": lambda setting, args: train_monai(setting, args, channels_last=True),
}


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Runs all sides of the settings in turns; ends before the deadline where it is near."""
    deadline = time.monotonic() + 60 * args.minutes
    report: dict[str, Any] = {
        "command": "python benchmarks/training_peers.py",
        "machine": machine(),
        "commit": commit_of(HERE.parent),
        "cases": args.cases,
        "batch": BATCH,
        "settings": {},
    }
    for setting in args.settings:
        options = ["--cases", str(args.cases), "--steps", str(args.steps), "--work", str(args.work)]
        options += ["--data", str(args.data), "--setting", setting]

        def side(name: str, more: Sequence[str] = (), options: list[str] = options) -> dict[str, Any]:
            if time.monotonic() > deadline:
                return {}
            return probe(
                sys.executable,
                [str(HERE / "training_peers.py"), "--side", name, *options, *more],
                packages=[*packages_of(HERE.parent), HERE],
            )

        if setting == args.settings[0]:
            side(
                "mome", ["--steps", str(SETTINGS[setting][3] + 1)]
            )  # builds the cache, and fills the system's cache of files for both sides
        names = {"mome": args.rounds, "monai": args.rounds, "monai_channels_last": 1}

        def record(runs: dict[str, list[dict[str, Any]]], setting: str = setting) -> None:
            report["settings"][setting] = entry(setting, runs)
            write_results(args.out, report)

        in_turns({name: (lambda name=name: side(name)) for name in names}, names, record)
    return report


def entry(setting: str, runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """The results of one setting; a side that the deadline left out has none."""
    done = {name: [run for run in found if run] for name, found in runs.items()}
    done = {name: found for name, found in done.items() if found}
    result: dict[str, Any] = {
        "patch": [SETTINGS[setting][1]] * 3,
        "sides": {name: medians(found) for name, found in done.items()},
        "runs": done,
    }
    if "mome" in done and "monai" in done:
        for key, number in (("speed_ratio", "steps_per_second"), ("memory_ratio", "peak_mib")):
            result[key] = ratios(*([run[number] for run in done[name]] for name in ("mome", "monai")))
    return result


def table(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    lines = [
        "# Training beside a plain MONAI loop",
        "",
        f"`{report['command']}`, commit {report['commit'][:12]}, {report['machine']['processor']}, "
        f"{report['machine']['cores']} cores, {report['cases']} patients of OpenKBP, {report['batch']} patches a step.",
        "Steps a second and peak memory are medians over the runs of a side; `data` and `network` are explained in the",
        "script.",
        "",
        "| setting | side | median step (s) | steps a second | peak (MiB) | setup (s) |",
        "|---|---|---|---|---|---|",
    ]
    for setting, found in report["settings"].items():
        lines += [
            f"| {setting} | {side} | {one['median_step_s']:.3f} | {one['steps_per_second']:.2f} | "
            f"{one['peak_mib']:.0f} | {one['other_s']:.1f} |"
            for side, one in found["sides"].items()
        ]
    lines.append("")
    for setting, found in report["settings"].items():
        if "speed_ratio" in found:
            speed, memory = found["speed_ratio"], found["memory_ratio"]
            lines.append(
                f"- {setting}: {speed['median']:.2f}× the steps a second ({speed['lowest']:.2f} to "
                f"{speed['highest']:.2f}), {memory['median']:.2f}× the memory."
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = Path(os.environ.get("MOME_TEST_DATA", ".")) / "openkbp" / "train"
    parser.add_argument("--data", type=Path, default=data, help="OpenKBP's folder train")
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--cases", type=int, default=24, help="patients; MONAI holds them in memory")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=0, help="steps of a run; 0 for those of the setting")
    parser.add_argument("--workers", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--minutes", type=float, default=6.0, help="no run starts after this time")
    parser.add_argument("--work", type=Path, help="folder for caches; a temporary one by default")
    parser.add_argument("--out", type=Path, help="write the results to this .json, and a table beside it as .md")
    parser.add_argument("--side", choices=list(SIDES), help=argparse.SUPPRESS)
    parser.add_argument("--setting", choices=list(SETTINGS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print("\n" + json.dumps(SIDES[args.side](args.setting, args)))
        return
    with tempfile.TemporaryDirectory() as folder:
        args.work = args.work or Path(folder)
        args.work.mkdir(parents=True, exist_ok=True)
        report = compare(args)
    if args.out is not None:
        args.out.with_suffix(".md").write_text(table(report))
    print(table(report))


if __name__ == "__main__":
    main()
