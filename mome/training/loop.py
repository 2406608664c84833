"""The training loop, on Accelerate.

Everything a step sees (samples, augmentation, wordings of the prompts) depends on the seed and the step alone. A run
that was killed therefore continues from its newest checkpoint with the same losses, bit for bit on the CPU.
"""

from __future__ import annotations

import contextlib
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from torch import nn

from mome.activation_checkpointing import checkpoint_activations
from mome.atomic import check_output_folder, output_errors
from mome.data.cache import CaseCache
from mome.data.sampling import PatchDataset
from mome.errors import InputError
from mome.folder_lock import folder_lock
from mome.printable import printable
from mome.processing import MoMEProcessor
from mome.temporary_names import remove_stale_parts
from mome.training.adapters import Adapters
from mome.training.batches import batches_from, samples_per_step
from mome.training.checkpoint import (
    TrainingState,
    latest_checkpoint,
    load_checkpoint,
    remove_partial_states,
    save_checkpoint,
)
from mome.training.config import RunConfig
from mome.training.launch import build_accelerator, describe_processes, other_processes_live
from mome.training.optimizer import build_optimizer, learning_rate, set_learning_rate
from mome.training.out_of_memory import says_that_validation_is_too_large, says_what_to_lower
from mome.training.profiling import StepProfiler
from mome.training.progress import StepReporter
from mome.training.router_statistics import RouterStatistics
from mome.training.run_card import run_section
from mome.training.run_settings import (
    check_same_cases,
    check_same_run,
    remove_run_settings,
    save_run_settings,
    tracker_settings,
)
from mome.training.setup import build_model_of_init
from mome.training.sources import annotated_labels, contents_of, drawn, names_of_cases, open_all_sources, patch_dataset
from mome.training.spread import check_spread, is_spread, own_part, spread_models
from mome.training.step import optimizer_step
from mome.training.text_rows import TextRows, text_rows
from mome.training.trackers import missing_note, start_tracker, tracker_errors
from mome.training.validation import validate
from mome.training.validation_history import ValidationHistory
from mome.training.weight_average import averaged_model, save_model, start_average

if TYPE_CHECKING:
    from mome.modeling import MoME

_DIVERGED = "a lower train.learning_rate, and train.mixed_precision=no if it is fp16"


class LossNotFinite(InputError, FloatingPointError):
    """The loss or a weight became NaN or infinite: the training diverged."""


def train(run: RunConfig, *, resume: bool = True, profile: int = 0) -> Path:
    """Trains a model and saves it.

    Args:
        run: The settings, see `mome.training.config`.
        resume: Continues from the newest checkpoint in `run.train.out`, if there is one. False removes the checkpoints
            of an earlier run in that folder.
        profile: Steps of this call that the main process records, see `mome.training.profiling`; 0 records none.

    Returns:
        The folder of the saved model, `<out>/model`.

    Raises:
        InputError: The configuration, the data or the training state cannot be used, or another process trains in
            this folder.
        LossNotFinite: The loss or a weight is NaN or infinite; an `InputError` and a `FloatingPointError`.
        OutputError: A checkpoint or the model cannot be written.
    """
    config, out = run.train, Path(run.train.out)
    check_output_folder(out)
    if resume:
        check_same_run(out, run)
    elif (out / "checkpoints").exists() and not (out / "run.json").exists():  # another program's, which restart removes
        raise InputError(
            "the folder holds checkpoints and no run.json, so they are not a run's",
            where=str(out),
            hint="another train.out=…, or move them away",
        )
    accelerator = build_accelerator(config)
    accelerator.print(f"training with {describe_processes(accelerator)}")
    with other_processes_live(accelerator, out):
        return _train(run, accelerator, resume, profile)


def _train(run: RunConfig, accelerator: Accelerator, resume: bool, profile: int) -> Path:
    """Trains in this process, which is one of the accelerator's; see `train`."""
    config, out = run.train, Path(run.train.out)
    model, processor, known = build_model_of_init(run)
    check_spread(run, model, accelerator)
    text = text_rows(model, run)
    adapters = Adapters(model, run.lora) if run.lora.rank else None
    # Patches have one shape, so that cuDNN may try its algorithms once and keep the fastest, as nnU-Net lets it.
    torch.backends.cudnn.benchmark = True

    caches, validation = open_all_sources(run, processor, accelerator)
    contents = contents_of(caches)
    # A mask of a label that no case annotates is said to be of an untrained one.
    learned = annotated_labels(drawn(caches, run)) | known
    model.config.trained_labels = [name for name in run.labels if name in learned]
    per_step = samples_per_step(config, accelerator)
    steps = config.steps if config.steps is not None else math.ceil(config.samples / per_step)
    dataset = patch_dataset(run, caches, model.config.patch_size, processor, steps * per_step, per_step)
    model.card_sections = (run_section(run, caches, steps, per_step), *model.card_sections)
    frozen = f"without init, lora.rank={run.lora.rank} freezes weights that were never trained on CT"
    frozen_notes = (frozen,) if run.lora.rank and run.init is None else ()
    for note in (*frozen_notes, *text.notes, *(dataset.augmentation.notes if dataset.augmentation else ())):
        accelerator.print(f"note: {note}")
    # Only now the folder becomes this run's: bad settings and bad data have raised their errors above.
    with _own_folder(accelerator, out):
        if not resume:
            _remove_earlier_run(accelerator, out)
        else:  # the folder may have become another run's while the data was read
            check_same_run(out, run)
            if latest_checkpoint(out / "checkpoints") is not None:
                check_same_cases(out, contents)
        state = _first_state(run, accelerator, model, adapters, per_step)
        loss_function = accelerator.unwrap_model(state.model).segmentation_loss
        start = _load_newest(state, out, steps)
        if accelerator.is_main_process:
            save_run_settings(out, run, contents)
        profiled = profile if accelerator.is_main_process else 0
        profiler = StepProfiler(out / "profile", profiled, accelerator.device)
        _run_steps(state, run, processor, loss_function, text, dataset, validation, start, steps, profiler)
        trained = averaged_model(accelerator, state.model, state.average)
        save_model(accelerator, trained, processor, out / "model", adapters)
        with tracker_errors(out):
            accelerator.end_training()
    return out / "model"


def _first_state(
    run: RunConfig, accelerator: Accelerator, model: MoME, adapters: Adapters | None, per_step: int
) -> TrainingState:
    """Returns the state before the first step, with the model and the optimiser as the accelerator prepares them."""
    config, second = run.train, None
    if run.distributed.spreads:
        model, *others = spread_models(model, run, accelerator, count=2 if config.ema else 1)
        second = others[0] if others else None
    if config.gradient_checkpointing:
        checkpoint_activations(model)
    if config.channels_last:
        model.to(memory_format=torch.channels_last_3d)  # type: ignore[call-arg]  # transformers wraps Module.to
    optimizer = build_optimizer(model, config)
    average = start_average(model, config.ema, accelerator.device, second)
    # FSDP2 takes the place of DDP, which Accelerate leaves out in this mode.
    prepared = accelerator.prepare_model(model, evaluation_mode=run.distributed.spreads)
    # Every process draws its own router noise; all else depends on the seed and the step.
    set_seed(config.seed + accelerator.process_index)
    return TrainingState(accelerator, prepared, accelerator.prepare(optimizer), average, per_step, adapters)


def _run_steps(
    state: TrainingState,
    run: RunConfig,
    processor: MoMEProcessor,
    loss_function: nn.Module,
    text: TextRows,
    dataset: PatchDataset,
    validation: list[CaseCache],
    start: int,
    steps: int,
    profiler: StepProfiler,
) -> None:
    """Trains from step `start` to `steps`, with checkpoints and validations on the way, and saves the last state.

    Raises:
        LossNotFinite: The loss or a weight is NaN or infinite.
        OutputError: A checkpoint cannot be written.
    """
    config, out = run.train, Path(run.train.out)
    checkpoints = out / "checkpoints"
    accelerator, model, optimizer, average = state.accelerator, state.model, state.optimizer, state.average
    reporter = StepReporter(accelerator, out, start, steps, config.log_every)
    cases = names_of_cases(validation, config.validate_cases) if validation else ""
    history = ValidationHistory(accelerator, out, start, cases)
    statistics = RouterStatistics(accelerator.unwrap_model(model), run.labels)
    start_tracker(accelerator, config.tracker, out, tracker_settings(run))
    if (note := missing_note(config.tracker)) is not None:
        accelerator.print(f"note: {note}")
    if run.validation and not config.validate_every:
        accelerator.print("validation cases are not used: train.validate_every is 0")

    batches = batches_from(start, steps, dataset, config, accelerator)
    model.train()
    done = start
    with reporter, profiler, says_what_to_lower(config, dataset.patch, accelerator.device):
        for step in range(start, steps):
            if _ends_early(history, run, accelerator):
                break
            rate = learning_rate(step, steps, config.learning_rate, config.warmup)
            set_learning_rate(optimizer, rate)
            asked = dataset.prompts_at(step)
            text_PT = text.at(step, asked)
            with statistics.collecting(asked) if reporter.is_logged(step + 1) else contextlib.nullcontext():
                losses = optimizer_step(accelerator, model, optimizer, loss_function, batches, text_PT, config)
            if not math.isfinite(losses["loss"]):
                raise LossNotFinite(
                    f"the loss is {losses['loss']} at step {step + 1}: the training diverged; the step's cases are "
                    + printable(", ".join(dataset.cases_at(step)[:4])),
                    where=str(out),
                    hint=_DIVERGED,
                )
            if average is not None:
                average.update_parameters(accelerator.unwrap_model(model))
            profiler.step()
            done = step + 1
            reporter.step(done, losses, rate, statistics.read(accelerator) if reporter.is_logged(done) else None)
            validates = bool(config.validate_every) and (done % config.validate_every == 0 or done == steps)
            saves = done == steps or bool(config.checkpoint_every and done % config.checkpoint_every == 0)
            if validates or saves:
                _check_weights(state, dataset, done, out)
            # A validation comes before the checkpoint of its step, so that a resumed run makes up for a lost one.
            if validates:
                scored = averaged_model(accelerator, model, average)
                with says_that_validation_is_too_large(accelerator.device):
                    scores = validate(scored, run, validation, accelerator)
                model.train()
                if history.is_improvement(scores):
                    record = history.record(done, scores)
                    save_model(accelerator, scored, processor, out / "best", state.adapters, record)
                history.add(done, scores)
                reporter.validation(done, scores)
            if saves and done < steps:
                save_checkpoint(state, checkpoints, done, config.keep_checkpoints)
    if profiler.steps:
        accelerator.print(profiler.table or "the run was too short to be profiled: two steps come first")
    if done > start:
        save_checkpoint(state, checkpoints, done, config.keep_checkpoints)
    if history.best is not None:
        step, score = history.best
        accelerator.print(f"the best validation, mean Dice {score:.3f} after {step} steps, is {out / 'best'}")


def _check_weights(state: TrainingState, dataset: PatchDataset, done: int, out: Path) -> None:
    """Checks the weights before they are saved: the loss of a step is that of the weights before it.

    Raises:
        LossNotFinite: A weight is NaN or infinite; what was saved before is whole.
    """
    model = state.accelerator.unwrap_model(state.model)
    found = [name for name, value in model.named_parameters() if not torch.isfinite(own_part(value)).all()]
    if is_spread(model):  # a process knows its own part only
        found = gather_object(found)
    if bad := next(iter(found), None):
        raise LossNotFinite(
            f"the weights are not finite after step {done} ({bad:.80}): the training diverged; the step's cases are "
            + printable(", ".join(dataset.cases_at(done - 1)[:4])),
            where=str(out),
            hint=_DIVERGED,
        )


def _ends_early(history: ValidationHistory, run: RunConfig, accelerator: Accelerator) -> bool:
    """Says whether the last `train.patience` validations brought no improvement, and prints so."""
    patience = run.train.patience
    if not patience or history.best is None or history.without_improvement < patience:
        return False
    accelerator.print(f"training ends: {patience} validations without an improvement (train.patience)")
    return True


@contextlib.contextmanager
def _own_folder(accelerator: Accelerator, out: Path) -> Iterator[None]:
    """Keeps the run's folder to this run, and removes temporary files that a killed run left in it.

    Raises:
        InputError: Another process trains in the folder.
        OutputError: The folder cannot be made.
    """
    with contextlib.ExitStack() as stack:
        if accelerator.is_main_process:
            with output_errors(out, "the run"):
                out.mkdir(parents=True, exist_ok=True)
            if not stack.enter_context(folder_lock(out)):
                raise InputError(
                    "another process trains in this folder", where=str(out), hint="wait for it, or another train.out=…"
                )
            remove_stale_parts(out)
            remove_partial_states(out / "checkpoints")
        accelerator.wait_for_everyone()
        yield


def _remove_earlier_run(accelerator: Accelerator, out: Path) -> None:
    """Removes the training states, the best model and the settings of an earlier run."""
    if accelerator.is_main_process:
        for name in ("checkpoints", "best"):
            shutil.rmtree(out / name, ignore_errors=True)
        remove_run_settings(out)
    accelerator.wait_for_everyone()


def _load_newest(state: TrainingState, out: Path, steps: int) -> int:
    """Loads the newest checkpoint, if there is one; returns the number of steps done.

    Raises:
        InputError: The checkpoint is damaged, or of a longer run.
    """
    newest = latest_checkpoint(out / "checkpoints")
    if newest is None:
        return 0
    folder, start = newest
    if start > steps:
        raise InputError(f"{out} holds a run of {start} steps, more than the {steps} asked for", hint="train.out=…")
    notes = load_checkpoint(state, folder)
    state.accelerator.print(f"resuming from step {start} of {steps}")
    for note in notes:
        state.accelerator.print(f"note: {note}")
    return start
