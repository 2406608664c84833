"""Step times of the arms of `benchmarks/zoo_runs.py`, all in turns, so that a busy machine slows all."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from zoo_arms import BASE, held_out_batches, recipe

from mome import MoME
from mome.map_context import MapContext
from mome.registry import LOSSES
from mome.training.optimizer import build_optimizer
from mome.training.setup import build_model
from mome.training.text_rows import TextRows

WARM_UP = 2  # rounds that are not counted


def training_step(arm: str, args: argparse.Namespace) -> tuple[MoME, Callable[[], None], dict[str, torch.Tensor]]:
    """A new model, a function that makes one optimiser step with it, and the batch that each step takes."""
    run = recipe(arm, args)
    model, _ = build_model(run)
    text_PT = TextRows(model, list(run.labels), 0.0, 0).at(0)
    model.to(memory_format=torch.channels_last_3d)
    batch = held_out_batches(run, args.out / "held_out", model)[0]
    optimizer, loss_function = build_optimizer(model.train(), run.train), LOSSES.build(run.loss)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=run.train.mixed_precision == "bf16"):
            output = model(volume=batch["volume"], text_PT=text_PT, origin_B3=batch["origin"])
            loss = loss_function(output.logits, batch["targets"], batch["supervised"]) + output.aux_loss
        loss.backward()
        optimizer.step()
        model.after_step()
        optimizer.zero_grad()

    return model, step, batch


def time_arms(arms: list[str], args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Step times in milliseconds, medians over rounds; in each round every arm and the base make one step.

    Returns:
        For every arm `arm_ms`, `base_ms`, `encoder_ms` (forward and backward of the encoder alone, which all arms
        share) and `step_ratio`, the median over the rounds of its time divided by that of the base in the same round.
    """
    made = {arm: training_step(arm, args) for arm in dict.fromkeys([BASE, *arms])}
    model, _, batch = made[BASE]

    def encoder_alone() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=args.precision == "bf16"):
            pyramid = model.encoder(batch["volume"], MapContext(batch["origin"]))
        sum(values.float().mean() for values in pyramid.maps).backward()
        model.zero_grad()

    calls = {"encoder alone": encoder_alone, **{arm: step for arm, (_, step, _) in made.items()}}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(WARM_UP + args.rounds):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            if round_ >= WARM_UP:
                times[name].append(1e3 * (time.perf_counter() - began))
    median = {name: statistics.median(values) for name, values in times.items()}
    return {
        arm: {
            "arm_ms": median[arm],
            "base_ms": median[BASE],
            "encoder_ms": median["encoder alone"],
            "step_ratio": statistics.median(own / base for own, base in zip(times[arm], times[BASE], strict=True)),
        }
        for arm in arms
    }
