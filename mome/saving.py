"""A model on disk and on the Hub: loading with overrides, saving with all that a loader needs."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel
from transformers.utils import logging

from mome.configuration import MoMEConfig
from mome.errors import InputError
from mome.hub import locate
from mome.labels import load_table
from mome.layers.text_bank import TextBank
from mome.processing import MoMEProcessor
from mome.registry import TEXT_ENCODERS

logger = logging.get_logger(__name__)
# Written beside every saved model, so that AutoModel(trust_remote_code=True) finds the package or names what to
# install: transformers checks the imports of such a file before it runs it.
STUB_NAME = "modeling_mome.py"
STUB = '"""Needs the package: pip install mome."""\n\nfrom mome.auto import MoME, MoMEConfig\n'
AUTO_MAP = {"AutoConfig": "modeling_mome.MoMEConfig", "AutoModel": "modeling_mome.MoME"}

_HUB_ARGUMENTS = ("revision", "cache_dir", "token", "local_files_only", "force_download", "subfolder")


class SavedModel(PreTrainedModel):
    """Loading and saving: what `MoME` adds to transformers. The subclass has a `text_bank` and `relabel`."""

    config: MoMEConfig
    text_bank: TextBank
    processor: MoMEProcessor | None
    loaded_processor: MoMEProcessor | None

    def relabel(self, labels: list[str], trained_labels: list[str] | None = None) -> list[str]:
        """Changes the list of labels; see `MoME.relabel`."""
        raise NotImplementedError

    @classmethod
    def from_pretrained(cls, name: str | Path, *args: Any, **kwargs: Any) -> Self:  # type: ignore[override]
        """Loads a model from a folder, by the name of a bundled checkpoint, or from the Hub.

        Args:
            name: As in "runs/a/model", "mome-ct-tiny", "org/mome-ct", "hf-hub:org/mome-ct@v1" or "local-dir:a/model".
            kwargs: Values of the config override the saved ones, as in `experts="swiglu(n=8)"`: weights whose
                name and shape still fit are kept, the rest are new, and a report says which. With `labels` the
                bank's rows follow their names. Everything else goes to `PreTrainedModel.from_pretrained`
                (`revision`, `dtype`, `device_map`, …). Weights are loaded in float32 unless `dtype` says otherwise,
                however they are stored.

        Raises:
            InputError: Not a MoME checkpoint, one of another architecture, a damaged one, or a Hub id that cannot be
                reached.
        """
        place, revision = locate(name, kwargs.pop("revision", None))
        if revision is not None:
            kwargs["revision"] = revision
        kwargs.setdefault("dtype", torch.float32)
        fields = set(MoMEConfig.__dataclass_fields__) - {"dtype"}
        overrides = {key: kwargs.pop(key) for key in list(kwargs) if key in fields}
        report = kwargs.pop("output_loading_info", False)
        hub = {key: kwargs[key] for key in _HUB_ARGUMENTS if key in kwargs}
        ignore_mismatched_sizes = kwargs.pop("ignore_mismatched_sizes", False) or bool(overrides)
        config = kwargs.pop("config", None)
        labels: dict[str, Any] = {}
        new_text = False
        with _errors_for_people(name):
            if config is None:
                config, labels, new_text = _with_overrides(_saved_config(name, place, hub), overrides)
            loaded: Any = super().from_pretrained(
                place,
                *args,
                config=config,
                ignore_mismatched_sizes=ignore_mismatched_sizes,
                output_loading_info=True,
                **kwargs,
            )
        model, info = loaded
        with contextlib.suppress(InputError):  # the model was saved without a processor
            model.loaded_processor = MoMEProcessor.from_pretrained(place, **hub)
        if revision is not None:  # a processor that is loaded later must be of the same revision
            model.config.name_or_path = f"hf-hub:{place}@{revision}"
        _copy_mapped_tensors(model)
        new = {*info["missing_keys"], *(entry[0] for entry in info["mismatched_keys"])}
        total = len(model.state_dict())
        if not overrides and len(new) > total // 2:
            raise InputError(
                f"{len(new)} of {total} weights are not in the checkpoint: it is of another architecture",
                where=str(name),
            )
        if new_text:
            model.text_bank.reset()
            new.add("text_bank.rows_LT")
        if new:
            shown = ", ".join(sorted(new)[:4]) + (", …" if len(new) > 4 else "")
            logger.warning(f"{len(new)} of {total} tensors are new and untrained: {shown}")
        if labels:
            _relabel(model, **labels)
        result: Any = (model, info) if report else model
        return result

    @property
    def _tied_weights_keys(self) -> dict[str, str]:  # type: ignore[override]
        """Maps each further name of a shared tensor to its first name; a module object may serve several scales."""
        first: dict[int, str] = {}
        tied = {}
        for named in (self.named_parameters, self.named_buffers):
            for name, tensor in named(remove_duplicate=False):
                if first.setdefault(id(tensor), name) != name:
                    tied[name] = first[id(tensor)]
        return tied

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        """Returns `_tied_weights_keys`, which transformers would read only if `tie_word_embeddings` were set."""
        return self._tied_weights_keys

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        """Writes safetensors, `config.json`, the label table, the stub for remote-code loading and the processor.

        The model's `processor` is written where it is set. Otherwise the processor that was loaded with the weights is
        written, unless the folder has one already.
        """
        self.config.auto_map = dict(AUTO_MAP)
        super().save_pretrained(save_directory, *args, **kwargs)
        self._save_extras(save_directory)

    def _upload_modified_files(self, working_dir: Any, *args: Any, **kwargs: Any) -> Any:
        # With `push_to_hub=True` transformers uploads before its own `save_pretrained` returns.
        self._save_extras(working_dir)
        return super()._upload_modified_files(working_dir, *args, **kwargs)

    def _save_extras(self, folder: str | Path) -> None:
        processor = self.processor
        if processor is None and not (Path(folder) / "preprocessor_config.json").exists():
            processor = self.loaded_processor
        if processor is not None:
            processor.save_pretrained(folder)
        (Path(folder) / STUB_NAME).write_text(STUB)
        (Path(folder) / "labels.json").write_text(json.dumps(stored_labels(self.config), indent=1) + "\n")


@contextlib.contextmanager
def _errors_for_people(name: str | Path) -> Iterator[None]:
    """Turns the errors of transformers' loading into InputErrors that name the model."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"'{name}' cannot be loaded: {str(error).splitlines()[0][:160]}",
            hint="check the id and the network; HF_HUB_OFFLINE=1 reads the local cache only",
        ) from error
    except SafetensorError as error:
        raise InputError(
            f"the weights are damaged or incomplete: {str(error).splitlines()[0][:160]}",
            where=str(name),
            hint="copy or download the checkpoint again",
        ) from error
    except RuntimeError as error:
        if "mismatch" not in str(error):
            raise
        raise InputError(
            "the checkpoint's weights do not fit its config: it is of another architecture",
            where=str(name),
        ) from error


def _saved_config(name: str | Path, place: str, hub: dict[str, Any]) -> dict[str, Any]:
    raw, _ = MoMEConfig.get_config_dict(place, **hub)
    if raw.get("model_type") != "mome":
        raise InputError(
            f"this is a checkpoint of '{raw.get('model_type', 'an unknown architecture')}', not of mome",
            where=str(name),
            hint="a folder that MoME.save_pretrained or mome train wrote, or a name of mome list models",
        )
    return raw


def _copy_mapped_tensors(model: PreTrainedModel) -> None:
    """Copies tensors that are views of the mapped file, so that saving over the file does not change the model.

    The copies are aligned in memory; results are then equal, bit for bit, to those of the model that was saved.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu":
            tensor.data = tensor.data.clone()


def _with_overrides(raw: dict[str, Any], overrides: dict[str, Any]) -> tuple[MoMEConfig, dict[str, Any], bool]:
    """Returns the config to load with, the labels to change to afterwards, and whether the text encoder changed.

    The rows of the bank belong to the saved labels, so the model is loaded with these first. The labels are removed
    from `overrides`.
    """
    if "experts" in overrides:  # whether a residual fits depends on the experts
        raw = {key: value for key, value in raw.items() if key != "residual"}
    labels: dict[str, Any] = {key: overrides.pop(key) for key in ("labels", "trained_labels") if key in overrides}
    if "text_encoder" in overrides:
        wanted = TEXT_ENCODERS.canonical(overrides["text_encoder"])
        if wanted != MoMEConfig(**raw).text_encoder:  # the saved rows come from another tower
            if "labels" in labels and "trained_labels" not in labels:
                labels["trained_labels"] = [name for name in raw.get("trained_labels", ()) if name in labels["labels"]]
            return MoMEConfig(**{**raw, "text_dim": None, **overrides, **labels}), {}, True
    return MoMEConfig(**{**raw, **overrides}), labels, False


def _relabel(model: Any, labels: list[str] | None = None, trained_labels: list[str] | None = None) -> None:
    new = model.relabel(model.config.labels if labels is None else labels, trained_labels)
    if new:
        shown = ", ".join(new[:4]) + (", …" if len(new) > 4 else "")
        logger.warning(f"{len(new)} labels have no row in the checkpoint's bank: {shown}")


def stored_labels(config: MoMEConfig) -> dict[str, Any]:
    """The contents of `labels.json`: the entries of the class table that a checkpoint's bank holds."""
    table = load_table()
    entries = {entry["name"]: entry for entry in table.to_json()["labels"]}
    return {
        "version": table.version,
        "trained": list(config.trained_labels),
        "labels": [entries.get(name, {"name": name}) for name in config.labels],
    }
