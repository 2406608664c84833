"""A model on disk and on the Hub: loading with overrides, saving with all that a loader needs."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel
from transformers.utils import logging

from mome.configuration import MoMEConfig
from mome.errors import InputError
from mome.hub import AUTO_MAP, STUB, STUB_NAME, locate
from mome.labels import load_table
from mome.processing import MoMEProcessor
from mome.registry import TEXT_ENCODERS

logger = logging.get_logger(__name__)
_HUB_ARGUMENTS = ("revision", "cache_dir", "token", "local_files_only", "force_download", "subfolder")


class SavedModel(PreTrainedModel):
    """What `MoME` adds to transformers' loading and saving. The subclass has `relabel` and `reset_bank`."""

    processor: MoMEProcessor | None
    loaded_processor: MoMEProcessor | None

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
        config = kwargs.pop("config", None)
        labels: dict[str, Any] = {}
        new_text = False
        try:
            if config is None:
                raw, _ = MoMEConfig.get_config_dict(place, **hub)
                if raw.get("model_type") != "mome":
                    raise InputError(
                        f"this is a checkpoint of '{raw.get('model_type', 'an unknown architecture')}', not of mome",
                        where=str(name),
                        hint="a folder that MoME.save_pretrained or mome train wrote, or a name of mome list models",
                    )
                config, labels, new_text = _with_overrides(raw, overrides)
            model, info = super().from_pretrained(
                place,
                *args,
                config=config,
                ignore_mismatched_sizes=bool(overrides) or kwargs.pop("ignore_mismatched_sizes", False),
                output_loading_info=True,
                **kwargs,
            )
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
        with contextlib.suppress(InputError):  # a model that was saved without one
            model.loaded_processor = MoMEProcessor.from_pretrained(place, **hub)
        if revision is not None:  # so that what is loaded later from the same place is of the same revision
            model.config.name_or_path = f"hf-hub:{place}@{revision}"
        # Weights leave the mapped file: saving over it must not change them, and the aligned copies make the same
        # sums, bit for bit, as the model that was saved.
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.device.type == "cpu":
                tensor.data = tensor.data.clone()
        new = {*info["missing_keys"], *(entry[0] for entry in info["mismatched_keys"])}
        total = len(model.state_dict())
        if not overrides and len(new) > total // 2:
            raise InputError(
                f"{len(new)} of {total} weights are not in the checkpoint: it is of another architecture",
                where=str(name),
            )
        if new_text:
            model.reset_bank()
            new.add("text_bank")
        if new:
            shown = ", ".join(sorted(new)[:4]) + (", …" if len(new) > 4 else "")
            logger.warning(f"{len(new)} of {total} tensors are new and untrained: {shown}")
        if labels:
            _relabel(model, **labels)
        return (model, info) if report else model

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        """Writes safetensors, `config.json`, the label table, the stub that remote-code loading needs, the processor.

        The last is what the model carries as `processor`, else the one it was loaded with, which replaces none that
        lies in the folder.
        """
        self.config.auto_map = dict(AUTO_MAP)
        super().save_pretrained(save_directory, *args, **kwargs)
        self._save_extras(save_directory)

    def _upload_modified_files(self, working_dir: Any, *args: Any, **kwargs: Any) -> Any:
        # With `push_to_hub=True` transformers uploads before its `save_pretrained` returns.
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


def _with_overrides(raw: dict[str, Any], overrides: dict[str, Any]) -> tuple[MoMEConfig, dict[str, Any], bool]:
    """The config to load with, the labels to change to afterwards, and whether the text rows are of another kind.

    Rows of the bank go by the saved labels, so the saved labels are loaded first. `overrides` loses its labels.
    """
    labels = {key: overrides.pop(key) for key in ("labels", "trained_labels") if key in overrides}
    if "text_encoder" in overrides:
        wanted = TEXT_ENCODERS.canonical(overrides["text_encoder"])
        if wanted != MoMEConfig(**raw).text_encoder:  # the saved rows and their width mean nothing to it
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
    """`labels.json`: the entries of the class table that a checkpoint's bank holds."""
    table = load_table()
    entries = {entry["name"]: entry for entry in table.to_json()["labels"]}
    return {
        "version": table.version,
        "trained": list(config.trained_labels),
        "labels": [entries.get(name, {"name": name}) for name in config.labels],
    }
