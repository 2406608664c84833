"""Trains MONAI's SegResNet(init_filters=16) on the samples that `mome_ct_tiny` is trained on.

This is the baseline of benchmarks/RESULTS.md. It uses the same cache, the same patches in the same order, the same
number of steps, and the same optimiser and schedule. It has its own learning rate. Loss, precision and the moving
average of the weights come from the configuration and its overrides.

    python benchmarks/train_segresnet.py --config examples/configs/mome_ct_tiny.yaml --out runs/segresnet
    python benchmarks/train_segresnet.py --predict FOLDER --out runs/segresnet --masks runs/segresnet/val
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from monai.inferers import sliding_window_inference
from monai.networks.nets import SegResNet
from rich.progress import track
from safetensors.torch import load_file, save_file

from mome.data.case_folder import CaseFolder
from mome.errors import InputError
from mome.processing import MoMEProcessor
from mome.registry import LOSSES
from mome.training.checkpoint import TrainingState, latest_checkpoint, load_checkpoint, save_checkpoint
from mome.training.config import RunConfig
from mome.training.config_file import load_run_config
from mome.training.optimizer import build_optimizer, learning_rate, set_learning_rate
from mome.training.sources import open_source, patch_dataset
from mome.training.weight_average import start_average
from mome.volumes import read_volume, resample, write_mask
from mome.zoo import preset, preset_processor


def build(run: RunConfig) -> SegResNet:
    """The baseline network, with one output channel per label."""
    return SegResNet(spatial_dims=3, init_filters=16, in_channels=1, out_channels=len(run.labels))


def autocast(run: RunConfig) -> torch.autocast:
    """The precision that the run's configuration asks for."""
    return torch.autocast("cpu", torch.bfloat16, enabled=run.train.mixed_precision == "bf16")


def fit(run: RunConfig, out: Path, peak: float) -> None:
    """Trains and saves the network; continues from the newest checkpoint in `out`, if there is one.

    Args:
        run: Settings of the run.
        out: Folder of checkpoints and results.
        peak: Largest learning rate.
    """
    train = run.train
    if train.gradient_accumulation != 1:
        raise InputError("this script takes one batch per step", hint="train.gradient_accumulation=1")
    torch.manual_seed(train.seed)
    processor = preset_processor(run.preset, **run.processor)
    caches = [open_source(source, run, processor, lambda items: track(items, "caching")) for source in run.sources]
    patch = run.model.get("patch_size", preset(run.preset)["model"]["patch_size"])
    steps = train.steps or train.samples // train.batch_size
    dataset = patch_dataset(run, caches, patch, processor, steps * train.batch_size)
    loss_function = LOSSES.build(run.loss)
    model = build(run).train()
    optimizer = build_optimizer(model, dataclasses.replace(train, learning_rate=peak))
    accelerator = Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(model, optimizer)
    average = start_average(model, train.ema, accelerator.device)
    state = TrainingState(accelerator, model, optimizer, average, train.batch_size)
    newest = latest_checkpoint(out / "checkpoints")
    start = 0
    if newest is not None:
        load_checkpoint(state, newest[0])
        start = newest[1]
    out.mkdir(parents=True, exist_ok=True)
    began, recent = time.perf_counter(), []
    for step in range(start, steps):
        set_learning_rate(optimizer, learning_rate(step, steps, peak, train.warmup))
        samples = [dataset[step * train.batch_size + i] for i in range(train.batch_size)]
        batch = {key: torch.stack([sample[key] for sample in samples]) for key in samples[0]}
        with autocast(run):
            logits = model(batch["volume"])
            loss = loss_function(logits, batch["targets"], batch["supervised"])
        loss.backward()
        if train.clip_norm:
            torch.nn.utils.clip_grad_norm_(model.parameters(), train.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        if average is not None:
            average.update_parameters(model)
        recent.append(loss.item())
        if step + 1 == steps or train.checkpoint_every and (step + 1) % train.checkpoint_every == 0:
            print(
                f"step {step + 1}/{steps} loss {np.mean(recent[-50:]):.4f} {time.perf_counter() - began:.0f} s",
                flush=True,
            )
            save_checkpoint(state, out / "checkpoints", step + 1, train.keep_checkpoints)
    final = model if average is None else average.module
    weights = {key: value.contiguous() for key, value in final.state_dict().items()}
    save_file(weights, out / "model.safetensors")
    settings = {"labels": list(run.labels), "patch": list(patch), "processor": processor.settings()}
    (out / "settings.json").write_text(json.dumps(settings, indent=2))


@torch.inference_mode()
def predict(out: Path, folder: Path, masks: Path) -> None:
    """Segments cases with MONAI's sliding window and mome's resampling; writes one mask per structure and case.

    Args:
        out: Folder of the trained network.
        folder: Folder of cases, see `mome.data.case_folder`.
        masks: Folder for the masks; existing masks are kept.
    """
    settings = json.loads((out / "settings.json").read_text())
    processor = MoMEProcessor(**settings["processor"])
    model = SegResNet(spatial_dims=3, init_filters=16, in_channels=1, out_channels=len(settings["labels"]))
    model.load_state_dict(load_file(out / "model.safetensors"))
    model.eval()
    masks.mkdir(parents=True, exist_ok=True)
    for case in track(list(CaseFolder(folder, "openkbp")), "segmenting"):
        if all((masks / f"{case.name}_{name}.nii.gz").is_file() for name in settings["labels"]):
            continue  # written by an earlier call that was interrupted
        volume = read_volume(case.image)
        x, grid = processor.to_network(volume)
        logits = sliding_window_inference(x, settings["patch"], 2, model, overlap=0.5, mode="gaussian")[0]
        for name, logit in zip(settings["labels"], logits, strict=True):
            back = resample(logit, grid, volume.grid, fill=-20.0) > 0
            write_mask(
                masks / f"{case.name}_{name}.nii.gz",
                back.numpy().astype(np.uint8),
                volume.grid,
                volume.header,
            )


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--predict", type=Path, help="folder of cases to segment")
    parser.add_argument("--masks", type=Path)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.predict:
        predict(args.out, args.predict, args.masks or args.out / "masks")
    else:
        fit(load_run_config(args.config, args.overrides), args.out, args.learning_rate)


if __name__ == "__main__":
    main()
