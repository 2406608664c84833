"""One training loop for a MoME and for a plain network, on the CPU or a GPU, resumable and stoppable."""

from __future__ import annotations

import copy
import json
import math
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from stored_patches import StoredPatches, drawn_batch, unpack
from torch import Tensor, nn

from mome import MoME
from mome.atomic import atomic_write
from mome.data.sampling import PatchDataset
from mome.processing import MoMEProcessor
from mome.registry import LOSSES
from mome.training.checkpoint import TrainingState, latest_checkpoint, load_checkpoint, save_checkpoint
from mome.training.config import RunConfig, TrainConfig
from mome.training.optimizer import build_optimizer, learning_rate, set_learning_rate
from mome.training.setup import build_processor
from mome.training.sources import open_source, patch_dataset
from mome.training.text_rows import TextRows
from mome.training.weight_average import start_average

HOLD = 100  # steps before the number of steps is chosen: those of the warm-up, whose rates do not depend on it


@dataclass
class Limits:
    """When a training ends.

    Attributes:
        steps_file: A file that gives the number of steps once it exists; until then, the training pauses before step
            `HOLD`.
        deadline: Unix time at which the state and the model are saved, whatever the step.
        by_time: The learning rate and the end follow the time to the deadline instead of the steps.
        save_every: Seconds between the models that are saved on the way.
    """

    steps_file: Path | None = None
    deadline: float = math.inf
    by_time: bool = False
    save_every: float = math.inf


def use_torch_ops() -> Callable[[], None]:
    """Makes the ops of mome run their torch code on GPUs too, the head in one tile; returns what undoes it."""
    from mome_kernels import dispatch
    from mome_kernels.torch_impl import head

    kept = dispatch.wants_kernels, head._TILE_BYTES

    def undo() -> None:
        dispatch.wants_kernels, head._TILE_BYTES = kept

    dispatch.wants_kernels = lambda x: False
    if torch.cuda.is_available():
        head._TILE_BYTES = 1 << 29
    return undo


def rate_at(step: int, steps: int | None, config: TrainConfig) -> float:
    """Returns the learning rate of a step: linear warm-up, constant, and in the second half a cosine to zero.

    The first steps of it do not depend on the number of steps, which is chosen while they run. Our choice.

    Args:
        step: Number of the step, from 0.
        steps: Steps of the whole training; None while they are not known.
        config: Its `warmup` is the share of the recipe's steps.
    """
    warm = max(1, round((config.steps or 1) * config.warmup))
    if step < warm:
        return config.learning_rate * (step + 1) / warm
    if steps is None or step < steps / 2:
        return config.learning_rate
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * (2 * step / steps - 1)))


def open_dataset(run: RunConfig, patch: list[int]) -> tuple[PatchDataset, MoMEProcessor]:
    """Returns the training patches of a run and its processor."""
    processor = build_processor(run, MoMEProcessor.from_pretrained(run.init) if run.init else None)
    caches = [open_source(source, run, processor) for source in run.sources]
    steps = run.train.steps or math.ceil(run.train.samples / run.train.batch_size)
    return patch_dataset(run, caches, patch, processor, steps * run.train.batch_size), processor


def fit(
    run: RunConfig,
    model: nn.Module,
    dataset: PatchDataset,
    processor: MoMEProcessor,
    *,
    patches: Path | None = None,
    limits: Limits | None = None,
    slots: int | None = None,
    kernels_file: Path | None = None,
) -> None:
    """Trains a network, or what is left of the training, and saves the average of its weights in `run.train.out`.

    SIGTERM saves the state and the model, and ends the training after the current step.

    Args:
        run: The settings.
        model: A MoME, or a network from volumes to one logit per label.
        dataset: The patches.
        processor: Saved with a MoME.
        patches: Folder of `StoredPatches` that other processes fill; without it, patches are drawn here.
        limits: When to end before the recipe's last step.
        slots: See `StoredPatches`.
        kernels_file: Torch code runs in place of mome's GPU kernels until this file exists; None uses the kernels.
    """
    limits, config, out = limits or Limits(), run.train, Path(run.train.out)
    out.mkdir(parents=True, exist_ok=True)
    stopped = False

    def stop(*_: object) -> None:
        nonlocal stopped
        stopped = True

    signal.signal(signal.SIGTERM, stop)
    stored = StoredPatches(patches, dataset, slots) if patches else None
    text = TextRows(model, list(run.labels), config.synonyms, config.seed) if isinstance(model, MoME) else None
    use_kernels = use_torch_ops() if kernels_file is not None else None
    channels_last = config.channels_last
    torch.backends.cudnn.benchmark = True
    accelerator = Accelerator(mixed_precision=config.mixed_precision)
    device = accelerator.device
    if channels_last:
        model.to(memory_format=torch.channels_last_3d)
    model.train().to(device)
    optimizer = build_optimizer(model, config)
    average = start_average(model, config.ema, accelerator.device)
    model, optimizer = accelerator.prepare(model, optimizer)
    bare = accelerator.unwrap_model(model)
    state = TrainingState(accelerator, model, optimizer, average, config.batch_size)
    loss_function = LOSSES.build(run.loss)
    torch.manual_seed(config.seed)
    newest = latest_checkpoint(out / "checkpoints")
    step = 0
    if newest is not None:
        load_checkpoint(state, newest[0])
        step = newest[1]
    steps: int | None = None if limits.steps_file else len(dataset) // config.batch_size
    began, last_time, last_saved, pending = time.time(), time.time(), time.time(), list[tuple[int, Tensor]]()

    def save(step: int) -> None:
        trained = copy.deepcopy(bare if average is None else average.module)
        _save(trained, processor, run, out, {"step": step, "steps": steps, "patch": list(dataset.patch)})

    with (out / "losses.jsonl").open("a" if newest else "w") as log:

        def write_losses() -> None:
            nonlocal last_time
            if not pending:
                return
            losses = torch.stack([loss for _, loss in pending])
            if device.type == "cuda":  # waiting inside CUDA would keep a core busy that other trainings need
                event = torch.cuda.Event()
                event.record()
                while not event.query():
                    time.sleep(0.0005)
            values = losses.tolist()
            now = time.time()
            seconds = (now - last_time) / len(pending)
            memory = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
            entry = {"step": pending[-1][0], "loss": sum(values) / len(values), "seconds_per_step": seconds}
            log.write(json.dumps({**entry, "time": now, "memory_bytes": memory}) + "\n")
            log.flush()
            last_time = now
            pending.clear()
            if not math.isfinite(sum(values)):
                raise FloatingPointError(f"the loss is not finite before step {entry['step']}")

        while not stopped:
            if steps is None and limits.steps_file is not None and limits.steps_file.exists():
                steps = min(len(dataset) // config.batch_size, int(limits.steps_file.read_text()))
            if (steps is not None and step >= steps) or time.time() >= limits.deadline:
                break
            if steps is None and step >= min(HOLD, len(dataset) // config.batch_size):
                write_losses()
                time.sleep(0.1)
                continue
            if limits.by_time:
                if step <= 3:  # the first steps load libraries and tune convolutions; the warm-up starts after them
                    began = time.time()
                share = (time.time() - began) / max(limits.deadline - began, 1)
                rate = learning_rate(round(10_000 * min(share, 1)), 10_000, config.learning_rate, config.warmup)
            else:
                rate = rate_at(step, steps, config)
            set_learning_rate(optimizer, rate)
            first = step * config.batch_size
            packed = (
                stored.batch(first, config.batch_size) if stored else drawn_batch(dataset, first, config.batch_size)
            )
            batch = unpack(packed, device)
            volume = batch["volume"]
            if channels_last:
                volume = volume.contiguous(memory_format=torch.channels_last_3d)
            if text is None:
                logits, aux_loss = model(volume), volume.new_zeros(())
            else:
                output = model(volume=volume, text_PT=text.at(step).to(device), origin_B3=batch["origin"])
                logits, aux_loss = output.logits, output.aux_loss
            loss = loss_function(logits, batch["targets"], batch["supervised"]) + aux_loss
            accelerator.backward(loss)
            if config.clip_norm:
                torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
            optimizer.step()
            if text is not None:
                bare.after_step()
            optimizer.zero_grad()
            if average is not None:
                average.update_parameters(bare)
            step += 1
            pending.append((step, loss.detach().float()))
            if step <= 3 or step % 10 == 0:
                write_losses()
                if use_kernels is not None and kernels_file is not None and kernels_file.exists():
                    use_kernels()
                    use_kernels = None
                    print(f"mome's kernels from step {step}", flush=True)
                if time.time() - last_saved > limits.save_every:
                    last_saved = time.time()
                    save(step)
            if config.checkpoint_every and step % config.checkpoint_every == 0:
                save_checkpoint(state, out / "checkpoints", step, 1)
        write_losses()
    save(step)
    if config.checkpoint_every:
        save_checkpoint(state, out / "checkpoints", step, 1)


def _save(model: nn.Module, processor: MoMEProcessor, run: RunConfig, out: Path, numbers: dict[str, Any]) -> None:
    """Saves weights in float16, and what the training was. `training.json` is written last."""
    model.to("cpu").to(torch.float16).to(memory_format=torch.contiguous_format)
    with atomic_write(out / "model", "the model") as part:
        if isinstance(model, MoME):
            model.save_pretrained(part)
            processor.save_pretrained(part)
        else:
            part.mkdir(parents=True, exist_ok=True)
            save_file(
                {name: values.contiguous() for name, values in model.state_dict().items()}, part / "model.safetensors"
            )
            kept = {"labels": list(run.labels), "patch": numbers["patch"], "processor": processor.settings()}
            (part / "settings.json").write_text(json.dumps(kept, indent=2))
    numbers = {**numbers, "parameters": sum(p.numel() for p in model.parameters())}
    with atomic_write(out / "training.json", "the numbers of a training") as part:
        part.write_text(json.dumps(numbers, indent=1) + "\n")
