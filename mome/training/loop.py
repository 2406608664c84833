"""The training loop: Accelerate, masked loss, checkpoints from which a killed run goes on bit for bit.

What a step sees is a pure function of (seed, step): samples, augmentation and prompts' wordings. A resumed run
therefore skips nothing and repeats nothing.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, set_seed
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn, track
from torch import Tensor, nn
from torch.utils.data import DataLoader

from mome.atomic import atomic_write
from mome.data.augmentation import Augmentation
from mome.data.sampling import PatchDataset
from mome.errors import InputError
from mome.registry import LOSSES
from mome.training.checkpoint import StepLog, check_same_run, latest_checkpoint, note_run, save_checkpoint
from mome.training.config import RunConfig
from mome.training.setup import TextRows, build_model, open_source


def learning_rate(step: int, steps: int, peak: float, warmup: float) -> float:
    """Linear warm-up, then a cosine to zero; a function of the step alone."""
    warm = max(1, round(steps * warmup))
    if step < warm:
        return peak * (step + 1) / warm
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices and kernels decay; biases, norms and other vectors do not."""
    decay = [p for p in model.parameters() if p.requires_grad and p.ndim >= 2]
    rest = [p for p in model.parameters() if p.requires_grad and p.ndim < 2]
    return [{"params": decay, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]


def train(run: RunConfig, *, resume: bool = True) -> Path:
    """Trains and saves a model.

    Args:
        run: See `mome.training.config`.
        resume: Go on from the newest checkpoint of `run.train.out`, where there is one; without it, the run's
            earlier checkpoints are removed.

    Returns:
        The folder of the saved model, `<out>/model`.

    Raises:
        InputError: The configuration or the data cannot be used.
        FloatingPointError: The loss is no longer finite.
    """
    config = run.train
    if config.threads:
        torch.set_num_threads(config.threads)
    out = Path(config.out)
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        gradient_accumulation_steps=config.gradient_accumulation,
        log_with="tensorboard" if config.tracker == "tensorboard" else None,
        project_config=ProjectConfiguration(project_dir=str(out), logging_dir=str(out / "tensorboard")),
    )
    model, processor = build_model(run)
    if accelerator.is_main_process:
        if not resume:
            shutil.rmtree(out / "checkpoints", ignore_errors=True)
            (out / "run.json").unlink(missing_ok=True)
        check_same_run(out, run)
    accelerator.wait_for_everyone()
    loss_function = LOSSES.build(run.loss)
    text = TextRows(model, list(run.labels), config.synonyms, config.seed)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    if config.channels_last:
        model = model.to(memory_format=torch.channels_last_3d)

    with accelerator.main_process_first():
        caches = [
            open_source(source, run, processor, lambda items: track(items, "caching", transient=True))
            for source in run.sources
        ]
        for source in run.validation if config.validate_every else ():
            open_source(source, run, processor, lambda items: track(items, "caching", transient=True))
    per_step = config.batch_size * config.gradient_accumulation * accelerator.num_processes
    steps = config.steps if config.steps is not None else math.ceil(config.samples / per_step)
    dataset = PatchDataset(
        caches,
        [source.weight for source in run.sources],
        list(run.labels),
        model.config.patch_size,
        steps * per_step,
        config.seed,
        run.sampling,
        Augmentation(run.augmentation, run.labels, left_right_axis(processor.orientation)),
    )
    optimizer = torch.optim.AdamW(parameter_groups(model, config.weight_decay), lr=config.learning_rate)
    average = None
    if config.ema:
        average = torch.optim.swa_utils.AveragedModel(
            model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(config.ema), use_buffers=False
        ).to(accelerator.device)
        accelerator.register_for_checkpointing(average)
    model, optimizer = accelerator.prepare(model, optimizer)

    # Ranks draw their own router noise; everything else is a function of the step.
    set_seed(config.seed + accelerator.process_index)
    start, checkpoints = 0, out / "checkpoints"
    newest = latest_checkpoint(checkpoints) if resume else None
    if newest is not None:
        accelerator.load_state(str(newest[0]))
        start = newest[1]
        accelerator.print(f"resuming from step {start} of {steps}")
    if start > steps:
        raise InputError(f"{out} holds a run of {start} steps, more than the {steps} asked for", hint="train.out=…")
    log = None
    if accelerator.is_main_process:  # from here on the folder holds a run: bad settings have been found out by now
        note_run(out, run)
        log = StepLog(out / "log.jsonl", start)
    if config.tracker == "tensorboard":
        accelerator.init_trackers("mome", config=flat_settings(run))

    batches = _batches(dataset, start, steps, accelerator, config.workers, config.batch_size)
    if run.validation and not config.validate_every:
        accelerator.print("no validation on the way: train.validate_every is 0")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=not accelerator.is_main_process) as bar:
        task = bar.add_task("training", total=steps, completed=start)
        model.train()
        began = time.perf_counter()
        for step in range(start, steps):
            rate = learning_rate(step, steps, config.learning_rate, config.warmup)
            for group in optimizer.param_groups:
                group["lr"] = rate
            totals = torch.zeros(3, device=accelerator.device)
            for _ in range(config.gradient_accumulation):
                batch = {key: value.to(accelerator.device) for key, value in next(batches).items()}
                with accelerator.accumulate(model):
                    losses = _step_loss(model, loss_function, batch, text.at(step), config.channels_last)
                    accelerator.backward(losses[0])
                    if accelerator.sync_gradients and config.clip_norm:
                        accelerator.clip_grad_norm_(model.parameters(), config.clip_norm)
                    optimizer.step()
                    optimizer.zero_grad()
                totals += torch.stack([value.detach().float() for value in losses])
            accelerator.unwrap_model(model).after_step()
            totals = accelerator.reduce(totals, reduction="mean") / config.gradient_accumulation
            loss, segmentation, aux = totals.tolist()
            if not math.isfinite(loss):
                raise FloatingPointError(f"the loss is {loss} at step {step + 1}; try a lower learning rate")
            if average is not None:
                average.update_parameters(accelerator.unwrap_model(model))
            done = step + 1
            if log is not None:
                seconds = round(time.perf_counter() - began, 3)
                log.write(
                    step=done,
                    loss=loss,
                    segmentation_loss=segmentation,
                    aux_loss=aux,
                    lr=rate,
                    seconds=seconds,
                )
            bar.update(task, description=f"training  loss {loss:.4f}")
            if config.log_every and done % config.log_every == 0:
                if not bar.console.is_terminal:
                    accelerator.print(f"step {done}/{steps}: loss {loss:.4f}", flush=True)
                accelerator.log({"loss": loss, "aux_loss": aux, "learning_rate": rate}, step=done)
            bar.update(task, completed=done)
            if config.checkpoint_every and done % config.checkpoint_every == 0 and done < steps:
                save_checkpoint(accelerator, checkpoints, done, config.keep_checkpoints)
            if config.validate_every and (done % config.validate_every == 0 or done == steps):
                scores = _validate(accelerator, average, model, run, processor)
                accelerator.log(scores, step=done)
                bar.console.print(f"step {done}: " + "  ".join(f"{k} {v:.3f}" for k, v in scores.items()))
    if steps > start:
        save_checkpoint(accelerator, checkpoints, steps, config.keep_checkpoints)
    folder = _save_model(accelerator, average, model, processor, out)
    accelerator.end_training()
    return folder


def left_right_axis(orientation: str) -> int:
    """The axis of the network grid along which left and right lie."""
    return next(axis for axis, letter in enumerate(orientation.upper()) if letter in "LR")


def flat_settings(run: RunConfig) -> dict[str, Any]:
    """Settings as flat scalars, which is what trackers take."""
    flat = {f"model.{key}": str(value) for key, value in run.model.items()}
    flat |= {f"train.{key}": value for key, value in vars(run.train).items() if isinstance(value, int | float | str)}
    return {"preset": run.preset, **flat}


def _batches(
    dataset: PatchDataset, start: int, steps: int, accelerator: Accelerator, workers: int, size: int
) -> Iterator[dict[str, Tensor]]:
    """Batches of this process from step `start` on; which sample goes where is fixed by its number."""
    micro = len(dataset) // (steps * size * accelerator.num_processes) if steps else 1
    numbers = [
        [
            ((step * micro + part) * accelerator.num_processes + accelerator.process_index) * size + i
            for i in range(size)
        ]
        for step in range(start, steps)
        for part in range(micro)
    ]
    # A generator of its own: an iterator draws a seed when it starts, and a resumed run starts one more of them.
    return iter(DataLoader(dataset, batch_sampler=numbers, num_workers=workers, generator=torch.Generator()))


def _step_loss(
    model: nn.Module, loss_function: nn.Module, batch: dict[str, Tensor], text_PT: Tensor, channels_last: bool
) -> tuple[Tensor, Tensor, Tensor]:
    volume = batch["volume"]
    if channels_last:
        volume = volume.contiguous(memory_format=torch.channels_last_3d)
    output = model(volume=volume, text_PT=text_PT.to(volume.device))
    segmentation = loss_function(output.logits, batch["targets"], batch["supervised"])
    aux = output.aux_loss
    return segmentation + aux, segmentation, aux


def _validate(
    accelerator: Accelerator, average: nn.Module | None, model: nn.Module, run: RunConfig, processor: Any
) -> dict[str, float]:
    from mome.training.validation import validate

    plain = accelerator.unwrap_model(model) if average is None else average.module
    scores = validate(plain, run, processor, accelerator)
    model.train()
    return scores


def _save_model(
    accelerator: Accelerator, average: nn.Module | None, model: nn.Module, processor: Any, out: Path
) -> Path:
    """`<out>/model`, complete or absent."""
    folder = out / "model"
    plain = accelerator.unwrap_model(model)
    if average is not None:
        plain.load_state_dict(average.module.state_dict())
    if accelerator.is_main_process:
        with atomic_write(folder, "the model") as part:
            plain.to(memory_format=torch.contiguous_format).save_pretrained(part)
            processor.save_pretrained(part)
    accelerator.wait_for_everyone()
    return folder
