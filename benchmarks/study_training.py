"""One training loop for a MoME and for a plain network, on the CPU or a GPU, resumable and stoppable."""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from stored_patches import StoredPatches, drawn_batch, unpack
from torch import Tensor, nn

from mome import MoME
from mome.data.sampling import PatchDataset
from mome.processing import MoMEProcessor
from mome.registry import LOSSES
from mome.training.checkpoint import TrainingState, latest_checkpoint, load_checkpoint, save_checkpoint
from mome.training.config import RunConfig
from mome.training.optimizer import build_optimizer, learning_rate, set_learning_rate
from mome.training.sources import open_source, patch_dataset
from mome.training.text_rows import TextRows
from mome.training.weight_average import start_average
from mome.zoo import preset_processor


@dataclass
class Limits:
    """When a training ends.

    Attributes:
        steps_file: A file that gives the number of steps once it exists; until then it is that of the recipe.
        deadline: Unix time at which the state and the model are saved, whatever the step.
        by_time: The learning rate follows the time to the deadline instead of the steps.
    """

    steps_file: Path | None = None
    deadline: float = math.inf
    by_time: bool = False


def use_torch_ops() -> None:
    """Makes the ops of mome run their torch code on GPUs too."""
    from mome_kernels import dispatch

    dispatch.wants_kernels = lambda x: False


def open_dataset(run: RunConfig, patch: list[int]) -> tuple[PatchDataset, MoMEProcessor]:
    """Returns the training patches of a run and its processor."""
    processor = preset_processor(run.preset, **run.processor)
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
    wait_for: Path | None = None,
    on_step: Callable[[int], None] = lambda step: None,
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
        wait_for: A file whose existence allows the use of the device; the words `torch` (no kernels of mome) and
            `channels_last` in it are what a trial on this device has chosen.
        on_step: Called with the number of steps done.
    """
    limits, config, out = limits or Limits(), run.train, Path(run.train.out)
    out.mkdir(parents=True, exist_ok=True)
    stopped = False

    def stop(*_: object) -> None:
        nonlocal stopped
        stopped = True

    signal.signal(signal.SIGTERM, stop)
    stored = StoredPatches(patches, dataset) if patches else None
    text = TextRows(model, list(run.labels), config.synonyms, config.seed) if isinstance(model, MoME) else None
    while wait_for is not None and not wait_for.exists() and not stopped:
        time.sleep(0.1)
    chosen = wait_for.read_text().split() if wait_for is not None and wait_for.exists() else []
    if "torch" in chosen:
        use_torch_ops()
    channels_last = config.channels_last or "channels_last" in chosen
    torch.backends.cudnn.benchmark = True
    accelerator = Accelerator(mixed_precision=config.mixed_precision)
    device = accelerator.device
    if channels_last:
        model.to(memory_format=torch.channels_last_3d)
    model.train().to(device)
    optimizer = build_optimizer(model, config)
    average = start_average(model, config.ema, accelerator)
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
    steps = len(dataset) // config.batch_size
    began, last_time, pending = time.time(), time.time(), list[tuple[int, Tensor]]()
    with (out / "losses.jsonl").open("a") as log:

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
            if limits.steps_file is not None and limits.steps_file.exists():
                steps = min(len(dataset) // config.batch_size, int(limits.steps_file.read_text()))
            if step >= steps or time.time() >= limits.deadline:
                break
            if limits.by_time:
                share = (time.time() - began) / max(limits.deadline - began, 1)
                rate = learning_rate(round(10_000 * min(share, 1)), 10_000, config.learning_rate, config.warmup)
            else:
                rate = learning_rate(step, steps, config.learning_rate, config.warmup)
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
            on_step(step)
            if config.checkpoint_every and step % config.checkpoint_every == 0:
                save_checkpoint(state, out / "checkpoints", step, 1)
        write_losses()
    save_checkpoint(state, out / "checkpoints", step, 1)
    _save(bare if average is None else average.module, processor, run, out, step, steps, list(dataset.patch))


def _save(
    model: nn.Module, processor: MoMEProcessor, run: RunConfig, out: Path, step: int, steps: int, patch: list[int]
) -> None:
    """Saves weights in float16, and what the training was."""
    model.to("cpu").to(memory_format=torch.contiguous_format)
    numbers = {"step": step, "steps": steps, "parameters": sum(p.numel() for p in model.parameters())}
    if isinstance(model, MoME):
        model.to(torch.float16).save_pretrained(out / "model")
        processor.save_pretrained(out / "model")
    else:
        weights = {name: values.half().contiguous() for name, values in model.state_dict().items()}
        save_file(weights, out / "model.safetensors")
        kept = {"labels": list(run.labels), "patch": patch, "processor": processor.settings()}
        (out / "settings.json").write_text(json.dumps(kept, indent=2))
    (out / "training.json").write_text(json.dumps(numbers, indent=1) + "\n")
