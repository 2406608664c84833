"""Everything a run needs before its first step: model, processor, label bank, text rows, cached data."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from mome.data.cache import CaseCache, build_cache, cache_case_folder
from mome.data.case_folder import CaseFolder
from mome.errors import InputError
from mome.labels import load_table
from mome.presets import preset
from mome.processing import MoMEProcessor
from mome.registry import TEXT_ENCODERS
from mome.training.config import RunConfig, SourceConfig
from mome.zoo import create_model, preset_processor

if TYPE_CHECKING:
    from mome.modeling import MoME

Progress = Callable[[Iterable[Any]], Iterable[Any]]


def build_model(run: RunConfig) -> tuple[MoME, MoMEProcessor]:
    """The preset with its overrides, its bank filled, and the processor that goes with it."""
    preset(run.preset)  # a typo in its name is said first
    if not run.labels:
        raise InputError("the configuration names no labels to train on", hint="labels: [liver, spleen]")
    torch.manual_seed(run.train.seed)
    table = load_table()
    for name in run.labels:
        if name not in table:
            raise InputError(f"{name!r} is not a label of the class table", hint="mome list labels")
    if run.bank not in ("table", "trained"):
        raise InputError(f"bank is 'table' or 'trained', got {run.bank!r}")
    trained = list(run.labels)
    if run.init is None:
        spec = run.model.get("text_encoder", preset(run.preset)["model"]["text_encoder"])
        labels = _bank_labels(run, spec, stored=[])
        model = create_model(run.preset, labels=labels, trained_labels=trained, **run.model)
    else:
        from mome.modeling import MoME

        model = MoME.from_pretrained(run.init, **run.model)
        model.relabel(_bank_labels(run, model.config.text_encoder, model.config.labels), trained)
    model.processor = preset_processor(run.preset, **run.processor)
    return model, model.processor


def _bank_labels(run: RunConfig, text_encoder: str | dict[str, Any], stored: list[str]) -> list[str]:
    """The trained labels, then what else the bank holds: the whole table with a tower, else what it `stored` before."""
    if run.bank == "trained":
        return list(run.labels)
    others = load_table().names() if TEXT_ENCODERS.build(text_encoder).needs_tower else stored
    return list(run.labels) + [name for name in others if name not in run.labels]


class TextRows:
    """Text rows (P, T) of the trained labels, with synonyms mixed in as a pure function of (seed, step).

    Making them fills the model's bank from its tower. Without a tower the bank's own rows are used; where it has none
    yet, the labels get one-hot rows.

    Trained on one wording only, a label's mask depends on that wording; synonyms in training are what makes
    them agree. Our choice.

    Raises:
        InputError: A stored bank without one of the labels, or too narrow for one-hot rows.
    """

    def __init__(self, model: MoME, names: list[str], synonyms: float, seed: int) -> None:
        encoder = TEXT_ENCODERS.build(model.config.text_encoder)
        self.probability, self.seed = (synonyms if encoder.needs_tower else 0.0), seed
        table = load_table()
        texts = [[name.replace("_", " "), *table[name].synonyms] for name in names]
        if encoder.needs_tower:
            flat = encoder.encode([text for group in texts for text in group])
            self.variants = list(flat.split([len(group) for group in texts]))
        else:
            self.variants = list(_rows_without_tower(model, names).split(1))
        self.names_PT = torch.cat([rows[:1] for rows in self.variants])
        if encoder.needs_tower:
            self._fill_bank(model, encoder, names)

    def _fill_bank(self, model: MoME, encoder: Any, names: list[str]) -> None:
        others = [label.replace("_", " ") for label in model.config.labels[len(names) :]]
        bank = torch.cat([self.names_PT, encoder.encode(others)]) if others else self.names_PT
        model.text_bank.set(bank, centre_on=self.names_PT)

    def at(self, step: int) -> Tensor:
        """Rows for one step."""
        if self.probability == 0:
            return self.names_PT
        rng = np.random.default_rng([self.seed, 7919, step])
        picks = [int(rng.integers(len(rows))) if rng.random() < self.probability else 0 for rows in self.variants]
        return torch.stack([rows[i] for rows, i in zip(self.variants, picks, strict=True)])


def _rows_without_tower(model: MoME, names: list[str]) -> Tensor:
    if model.text_bank.is_empty:
        labels, width = model.text_bank.rows_LT.shape
        if labels > width:
            raise InputError(
                f"{labels} labels do not fit one-hot rows of width {width}", hint=f"text_encoder='bank(width={labels})'"
            )
        model.text_bank.set(torch.eye(labels, width))
    return model.text_bank.rows(names).detach().float().cpu()


def open_source(source: SourceConfig, run: RunConfig, processor: MoMEProcessor, progress: Progress) -> CaseCache:
    """The cached cases of one source, built on first use."""
    names = list(run.labels)
    if source.kind == "phantom":
        return _phantom_cache(source, run, processor, names, progress)
    if source.kind != "cases":
        raise InputError(f"unknown kind of source {source.kind!r}", hint="kind: cases, or kind: phantom")
    if not source.folder or not source.dataset:
        raise InputError("a source of kind 'cases' needs a folder and a dataset", hint="dataset: openkbp")
    folder = Path(os.path.expandvars(source.folder)).expanduser()
    if not folder.is_dir():
        raise InputError("no such folder of training cases", where=str(folder))
    cases = CaseFolder(folder, source.dataset)
    if source.count:
        cases.cases = cases.cases[: source.count]
    tag = "".join(c if c.isalnum() else "-" for c in f"{source.dataset}-{folder.name}")
    return cache_case_folder(run.cache, cases, tag, names, processor, progress)


def _phantom_cache(
    source: SourceConfig, run: RunConfig, processor: MoMEProcessor, names: list[str], progress: Progress
) -> CaseCache:
    from mome.data.phantom import phantom
    from mome.volumes import Grid

    def loader(seed: int) -> Callable[[], tuple[np.ndarray, Grid, dict[str, np.ndarray]]]:
        def load() -> tuple[np.ndarray, Grid, dict[str, np.ndarray]]:
            made = phantom(seed)
            masks = {name: made.masks[name] for name in names if name in made.masks}
            return made.array, Grid(made.array.shape, made.affine), masks

        return load

    if source.count < 1:
        raise InputError("a source of kind 'phantom' needs a count of at least 1", hint="count: 32")
    pairs = [(f"phantom_{source.seed + i}", loader(source.seed + i)) for i in range(source.count)]
    import mome.data.phantom as module

    version = getattr(module, "PHANTOM_VERSION", 1)
    fingerprint = json.dumps([source.seed, source.count, version])
    return build_cache(run.cache, "phantom", names, processor, pairs, fingerprint, progress)
