"""The settings of a training run, as dataclasses. `mome.training.config_file` reads them from YAML."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field, fields
from typing import Any

from mome.data.augmentation import AugmentationConfig
from mome.data.sampling_config import SamplingConfig
from mome.errors import InputError
from mome.labels.own import read_own_structures
from mome.threads import check_threads
from mome.training.trackers import NONE, TRACKERS
from mome.typed import check_range

_LARGEST_RATE = 1e30  # far beyond sense; float32 must hold it after AdamW's corrections
# Kind of a source → the settings that it reads.
_READ_BY = {
    "cases": ("folder", "layout", "dataset", "part", "held_out", "weight", "count"),
    "cached": ("folder", "weight"),
    "phantom": ("count", "seed", "weight"),
    "synthetic": ("label_map", "dataset", "image", "unknown", "real", "count", "seed", "weight"),
}


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One source of training cases. A setting that its kind does not read is refused.

    Args:
        kind: `cases` (a folder of cases, see `mome.data.layouts`), `cached` (a cache of cases that another run has
            built, for a machine without the scans), `phantom` (drawn shapes) or `synthetic` (CT made from a label map,
            see `mome.data.synthetic`).
        folder: The folder of a `cases` or `cached` source; `${NAME}` and `~` are expanded.
        layout: How the folder of a `cases` source is laid out, a name of `mome.data.layouts`, as in `nnunet`.
        dataset: The data set of a `cases` source, whose label numbers its label maps use, as in `openkbp`, or a YAML
            file of one's own (see `mome.labels.dataset_file`). It may be left out where the folder itself names them.
        part: `all`, `train` or `val`: the part of a `cases` source that is used.
        held_out: Share of the patients of a `cases` source that are its part `val`, chosen by the hash of their names.
        weight: How often this source is drawn, relative to the other sources.
        label_map: The label map of a `synthetic` source; `${NAME}` and `~` are expanded.
        image: The CT of that label map, if there is one.
        unknown: Structures of the data set that are not annotated in that label map.
        real: Share of the synthetic scans whose HU come from `image`.
        count: Number of phantoms or synthetic scans. For `cases`, only the first `count` cases are used; 0 uses all.
        seed: Seed of the first phantom or synthetic scan; each further one adds one.

    Raises:
        InputError: A number is negative or too large, or the kind does not read a setting.
    """

    kind: str = "cases"
    folder: str | None = None
    layout: str | dict[str, Any] = "cases"
    dataset: str | None = None
    label_map: str | None = None
    image: str | None = None
    unknown: tuple[str, ...] = ()
    real: float = 0.5
    part: str = "all"
    held_out: float = 0.2
    weight: float = 1.0
    count: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        check_range("a source", 0, 1, real=self.real)
        check_range("a source", 0, 2**31, count=self.count, seed=self.seed, weight=self.weight)
        check_range("a source", 0, 1, held_out=self.held_out)
        if self.part not in ("all", "train", "val"):
            raise InputError(f"a source's part is all, train or val, got {self.part!r:.60}", hint="part: train")
        self._check_read()

    def _check_read(self) -> None:
        """Checks that the kind reads every setting that is given; `open_source` refuses unknown kinds.

        Raises:
            InputError: It does not.
        """
        given = [one.name for one in fields(self) if one.name != "kind" and getattr(self, one.name) != one.default]
        read = _READ_BY.get(self.kind, tuple(given))
        unread = [name for name in given if name not in read]
        if unread:
            raise InputError(
                f"a source of kind {self.kind!r} does not read {unread[0]!r}, which would have no effect",
                hint=f"it reads: {', '.join(read)}",
            )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of the training loop.

    Args:
        samples: Training length in patches, whatever the batch size and the number of processes.
        steps: Training length in optimiser steps; replaces `samples` if it is given.
        batch_size: Patches per process and forward pass.
        gradient_accumulation: Forward and backward passes per optimiser step. Their losses count equally, whatever is
            annotated in them, and Dice is pooled over the patches of one pass, so that a larger `batch_size` or more
            processes give other gradients with as many patches.
        learning_rate: Peak learning rate of AdamW.
        weight_decay: Weight decay of AdamW; biases and norms are not decayed.
        layer_decay: The learning rate of each layer of the encoder is that of the layer after it times this number; 1
            gives all layers one rate. See `mome.training.optimizer`.
        warmup: Share of the steps with a linear warm-up; after it, a cosine decays to zero.
        clip_norm: Largest gradient norm; 0 turns clipping off.
        mixed_precision: `no`, `bf16` or `fp16`.
        channels_last: Keeps 5-D tensors in channels-last memory format, which is faster on GPUs in half precision.
        gradient_checkpointing: Recomputes the encoder and the experts in the backward pass to save memory.
        ema: Decay of an exponential moving average of the weights, below 1, which short runs approach step by step; if
            it is not 0, the average is saved as the model.
        seed: Seed of initialisation, sampling and augmentation.
        checkpoint_every: Optimiser steps between training states; 0 saves only at the end.
        keep_checkpoints: How many training states stay on disk, the newest ones.
        validate_every: Optimiser steps between validations; 0 never validates. The model of the best one is kept in
            `best` beside `model`, the last one.
        patience: Validations without a better mean Dice after which the training ends; 0 never ends it early. It needs
            `validate_every`.
        validate_cases: Number of cases per validation source; 0 uses all.
        log_every: Optimiser steps between printed losses; 0 prints none.
        workers: Processes that load patches; 0 loads them in the main process.
        threads: CPU threads of torch; 0 keeps torch's own choice, within the quota of a container.
        out: Folder of the run; `${NAME}` and `~` are expanded.
        synonyms: Probability that a prompt's text is drawn from all words for the label, its name and its synonyms,
            each equally often; else it is the name.
        tracker: `tensorboard`, `wandb`, `mlflow`, `trackio` or `none`; see `mome.training.trackers`.
        cpu: Computes on the CPU where there is a GPU, too.

    Raises:
        InputError: A value is outside its range.
    """

    samples: int = 4000
    steps: int | None = None
    batch_size: int = 2
    gradient_accumulation: int = 1
    learning_rate: float = 1e-3
    weight_decay: float = 1e-4
    layer_decay: float = 1.0
    warmup: float = 0.05
    clip_norm: float = 1.0
    mixed_precision: str = "no"
    channels_last: bool = False
    gradient_checkpointing: bool = False
    ema: float = 0.0
    seed: int = 0
    checkpoint_every: int = 100
    keep_checkpoints: int = 2
    validate_every: int = 0
    patience: int = 0
    validate_cases: int = 0
    log_every: int = 10
    workers: int = 0
    threads: int = 0
    out: str = "runs/mome"
    synonyms: float = 0.0
    tracker: str = "tensorboard"
    cpu: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "out", _expanded(self.out))
        for name in ("samples", "steps", "batch_size", "gradient_accumulation", "keep_checkpoints"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise InputError(f"train.{name} is at least 1, got {getattr(self, name)}")
        counts_from_zero = (
            "checkpoint_every", "validate_every", "validate_cases", "patience", "log_every", "workers", "threads",
        )  # fmt: skip
        for name in counts_from_zero:
            if (getattr(self, name) or 0) < 0:
                raise InputError(f"train.{name} is at least 0, got {getattr(self, name)}")
        if not 0 < self.layer_decay <= 1:
            raise InputError(f"train.layer_decay is above 0 and at most 1, got {self.layer_decay}")
        if not 0 <= self.ema < 1:  # 1 would keep the weights of the first step
            raise InputError(f"train.ema is from 0 to 1, without 1 itself, got {self.ema}", hint="train.ema=0.995")
        for name, top in (("warmup", 1), ("synonyms", 1), ("weight_decay", _LARGEST_RATE)):
            if not 0 <= getattr(self, name) <= top:
                raise InputError(f"train.{name} is from 0 to {top}, got {getattr(self, name)}")
        if self.patience and not self.validate_every:
            raise InputError(
                f"train.patience counts validations, and train.validate_every is 0: got {self.patience}",
                hint="train.validate_every=500, or train.patience=0",
            )
        check_range("train", 0, 2**31, seed=self.seed, samples=self.samples, steps=self.steps or 1)
        check_range("train", 1, 2**16, batch_size=self.batch_size, gradient_accumulation=self.gradient_accumulation)
        check_threads(self.threads, "train.threads")
        check_threads(self.workers, "train.workers")
        if not 0 < self.learning_rate <= _LARGEST_RATE:
            raise InputError(f"train.learning_rate is above 0 and at most {_LARGEST_RATE:g}, got {self.learning_rate}")
        if not 0 <= self.clip_norm < math.inf:
            raise InputError(f"train.clip_norm is at least 0, got {self.clip_norm}")
        for name, choices in (("mixed_precision", ("no", "bf16", "fp16")), ("tracker", (*TRACKERS, NONE))):
            if getattr(self, name) not in choices:
                raise InputError(f"train.{name} is one of {', '.join(choices)}, got {getattr(self, name)!r}")


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """Fine-tuning by low-rank adapters on the matrices of experts; see `mome.training.adapters`.

    Args:
        rank: Rank of the adapter of every expert; 0 trains all weights and adds no adapter.
        alpha: Adapters are scaled by alpha / rank.
        also_train: Modules that are trained beside the adapters; all others are frozen.

    Raises:
        InputError: A value is outside its range.
    """

    rank: int = 0
    alpha: float = 16.0
    also_train: tuple[str, ...] = ("fusion", "head")

    def __post_init__(self) -> None:
        check_range("lora", 0, 2**12, rank=self.rank)
        if not 0 < self.alpha < math.inf:
            raise InputError(f"lora.alpha is above 0, got {self.alpha}")


@dataclass(frozen=True, kw_only=True)
class DistributedSettings:
    """How the model is spread over the processes of a run, as in transformers' `DistributedConfig`; see
    `mome.expert_parallel`. By default every process holds the whole model.

    Args:
        fsdp_size: Processes among which FSDP2 shards the parameters and the optimiser's moments.
        ep_size: Processes among which the experts of every layer are divided; a divisor of `fsdp_size`.
        dp_replicate_size: Groups of `fsdp_size` processes that each hold all parameters, such as the machines. The run
            has `fsdp_size` × `dp_replicate_size` processes.

    Raises:
        InputError: A size is outside its range.
    """

    fsdp_size: int = 1
    ep_size: int = 1
    dp_replicate_size: int = 1

    def __post_init__(self) -> None:
        check_range("distributed", 1, 2**16, **self.arguments())
        if self.fsdp_size % self.ep_size:
            raise InputError(
                f"distributed.ep_size={self.ep_size} is no divisor of distributed.fsdp_size={self.fsdp_size}",
                hint=f"distributed.fsdp_size={self.ep_size}, or a multiple of it",
            )
        if self.dp_replicate_size > 1 and self.fsdp_size == 1:
            raise InputError(
                f"distributed.dp_replicate_size={self.dp_replicate_size} copies a model that is not sharded, as every "
                "run does",
                hint="leave it out, or distributed.fsdp_size=2",
            )

    @property
    def spreads(self) -> bool:
        """Whether a process holds only a part of the model."""
        return self.fsdp_size > 1

    def arguments(self) -> dict[str, int]:
        """The sizes as arguments of `DistributedConfig`."""
        return {"fsdp_size": self.fsdp_size, "ep_size": self.ep_size, "dp_replicate_size": self.dp_replicate_size}


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """All settings of a run: the model, its processor, the data, the loss and the loop.

    Args:
        preset: Name of the model preset to start from.
        init: Weights to start from (a folder, a bundled name or a Hub id); None starts from random weights.
        text_rows: `kept` or `new`. `kept` leaves the text rows of `init`, their mean and their scale as they are, so
            that its logits are unchanged at first; `new` embeds all labels again and centres them on the trained ones.
        lora: Adapters that are trained in the place of the experts' weights.
        model: Replaces parts and sizes of the preset, as in `{experts: swiglu(n=8), dim: 32}`.
        processor: Replaces settings of the processor, as in `{spacing: [2, 2, 2]}` (mm), which is that of `init`, else
            the preset's. `overlap`, `extend_mm` and the rules of post-processing are not those of `init`, because they
            were chosen for other weights.
        structures: Structures of one's own, which the class table does not have, as in `{thymus: [thymic gland]}`: a
            name in snake_case and a list of other words for it, which may be empty. Names that differ by left and right
            are two sides of one structure.
        labels: Names of the structures to train, of the class table or of `structures`.
        bank: Whose text embeddings the checkpoint stores: `table` (every label of the class table, so that each can be
            prompted without the text tower) or `trained` (only `labels`).
        sources: Where training cases come from.
        validation: Where validation cases come from.
        cache: Folder for cases on the network grid; `${NAME}` and `~` are expanded.
        cache_format: `plain` (memory-mapped arrays) or `blosc2` (compressed chunks, with `mome[cache]`).
        sampling: How patches are drawn from the cases.
        augmentation: How patches are augmented.
        loss: Spec of the segmentation loss.
        train: Settings of the loop.
        distributed: How the model is spread over processes.
    """

    preset: str = "mome_ct_tiny"
    init: str | None = None
    text_rows: str = "kept"
    lora: LoraSettings = field(default_factory=LoraSettings)
    model: dict[str, Any] = field(default_factory=dict)
    processor: dict[str, Any] = field(default_factory=dict)
    structures: dict[str, Any] = field(default_factory=dict)
    labels: tuple[str, ...] = ()
    bank: str = "table"
    sources: tuple[SourceConfig, ...] = ()
    validation: tuple[SourceConfig, ...] = ()
    cache: str = "cache"
    cache_format: str = "plain"
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    loss: str | dict[str, Any] = "bce_dice"
    train: TrainConfig = field(default_factory=TrainConfig)
    distributed: DistributedSettings = field(default_factory=DistributedSettings)

    def __post_init__(self) -> None:
        object.__setattr__(self, "cache", _expanded(self.cache))
        read_own_structures(self.structures)
        if self.text_rows not in ("kept", "new"):
            raise InputError(f"text_rows is 'kept' or 'new', got {self.text_rows!r:.60}")
        for name, folder in (("cache", self.cache), ("train.out", self.train.out)):
            if not folder.strip():
                raise InputError(f"{name} is the path of a folder, got an empty text", hint=f"{name}=runs/a")

    @property
    def own_structures(self) -> dict[str, tuple[str, ...]]:
        """Structure of one's own → other words for it."""
        return read_own_structures(self.structures)


def _expanded(folder: str) -> str:
    """Returns a path with its variables expanded, as those of sources are; else a folder named `~` would be made."""
    return os.path.expanduser(os.path.expandvars(folder))
