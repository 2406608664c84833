"""A model on disk and on the Hub: loading with overrides, saving with all that a loader needs."""

from __future__ import annotations

import copy
import math
import os
import secrets
from pathlib import Path
from typing import Any, Self

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from mome.atomic import check_output_folder, output_errors
from mome.changed_files import refuse_changes
from mome.configuration import MoMEConfig
from mome.errors import InputError
from mome.expert_parallel import (
    checked_distributed_config,
    finish_distributed,
    refuse_new_weights,
    wait_for_all,
    writes_files,
)
from mome.hub import locate
from mome.hub_connection import DOWNLOAD_KEYS, download_options
from mome.layers.text_bank import TextBank
from mome.loaded_weights import refuse_damage, unknown_label_notes, unused_note
from mome.loading import (
    errors_for_people,
    floating_type,
    promised_tensors,
    refuse_adapter,
    saved_or_none,
    stored_or_none,
    with_overrides,
)
from mome.model_card import CARD_FILE, model_card, own_card, sections_of_loaded, write_card
from mome.model_size import check_memory
from mome.processing import MoMEProcessor
from mome.processor_settings import PROCESSOR_FILE
from mome.remote_code import AUTO_MAP
from mome.saved_files import move_files, save_files
from mome.upcycling import upcycle as upcycled
from mome.weights_file import check_tensors, find_file, shapes_on_meta

logger = logging.get_logger(__name__)


class SavedModel(PreTrainedModel):
    """Loading and saving: what `MoME` adds to transformers. The subclass has a `text_bank` and `relabel`."""

    config: MoMEConfig
    text_bank: TextBank
    processor: MoMEProcessor | None
    loaded_processor: MoMEProcessor | None
    load_notes: tuple[str, ...] = ()
    """What is odd about the checkpoint, one sentence each; results of segmentation repeat it."""
    card_sections: tuple[str, ...] = ()
    """What the saved README.md says of where the weights come from; see `mome.model_card`."""
    _card_to_upload: bytes | None = None

    def relabel(self, labels: list[str], trained_labels: list[str] | None = None) -> list[str]:
        """Changes the list of labels; see `MoME.relabel`."""
        raise NotImplementedError

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        name: str | Path | None,
        *args: Any,
        allow_missing: bool = False,
        allow_damaged: bool = False,
        upcycle: bool = False,
        **kwargs: Any,
    ) -> Self:
        """Loads a model from a folder, by the name of a bundled checkpoint, or from the Hub.

        Args:
            name: As in "runs/a/model", "mome-ct-tiny", "org/mome-ct", "hf-hub:org/mome-ct@v1" or "local-dir:a/model".
                None takes the weights from `state_dict` and the architecture from `config`.
            allow_missing: Whether the checkpoint may lack tensors; they are then initialised, and a warning names them.
            allow_damaged: Whether tensors may hold NaN, infinite numbers, or zeros where a new model has none, whether
                files may differ from their checksums, and whether a preprocessor_config.json that cannot be used is
                left out.
            upcycle: Whether the saved model is dense, and experts that the overrides add start as its dense layers; see
                `mome.upcycling.upcycle`.
            kwargs: Values of the config override the saved ones, as in `experts="swiglu(n=8)"`: weights whose
                name and shape still fit are kept, the rest are new, and a report says which. With `labels` the
                bank's rows follow their names. Everything else goes to `PreTrainedModel.from_pretrained`
                (`revision`, `dtype`, `device_map`, …; for `distributed_config` see `mome.expert_parallel`). Weights are
                loaded in float32 unless `dtype` says otherwise, however they are stored. Only safetensors files are
                read.

        Raises:
            InputError: Not a MoME checkpoint, one of another architecture, a damaged one, one that lacks tensors or
                holds integers, NaN or only zeros as weights, one that was changed after it was saved, one beyond the
                limits of `mome.model_size`, or a Hub id that cannot be reached.
        """
        fields = set(MoMEConfig.__dataclass_fields__) - {"dtype"}
        overrides = {key: kwargs.pop(key) for key in list(kwargs) if key in fields}
        if upcycle:
            if kwargs.get("distributed_config") is not None:
                raise InputError(
                    "upcycle=True makes new weights, which a model that is spread over processes does not",
                    hint="save the upcycled model from one process first, then load it with distributed_config=",
                )
            if kwargs.get("output_loading_info"):
                raise InputError("upcycle=True has no loading info", hint="mome.upcycle(dense_model, encoder=…)")
            dense = cls.from_pretrained(name, *args, allow_missing=allow_missing, allow_damaged=allow_damaged, **kwargs)
            return upcycled(dense, **overrides)
        report, config = kwargs.pop("output_loading_info", False), kwargs.pop("config", None)
        if config is not None and overrides:
            raise InputError(f"both config= and {', '.join(overrides)}= were given", hint="change the config instead")
        if isinstance(config, str | Path):
            config = MoMEConfig.from_pretrained(config)
        reads_config, overridden = config is None, set(overrides)
        ignore_mismatched = kwargs.pop("ignore_mismatched_sizes", False)
        kwargs["dtype"] = floating_type(kwargs.pop("dtype", None), kwargs.pop("torch_dtype", None))
        kwargs.setdefault("use_safetensors", True)
        place, revision, hub = _source(name, kwargs)
        labels: dict[str, Any] = {}
        new_text = False
        notes: list[str] = []
        with errors_for_people(name, kwargs):
            saved = None if place is None else saved_or_none(str(name), place, hub, needed=config is None)
            changed = bool(overrides) or config is not None
            if saved is not None and config is None:
                config, labels, new_text = with_overrides(saved, overrides)
            if not isinstance(config, MoMEConfig):
                raise InputError("without a name, config= is a MoMEConfig", hint="config=MoMEConfig(…), state_dict=…")
            refuse_adapter(place, hub)
            if kwargs.get("distributed_config") is not None:
                architecture = config
                kwargs["distributed_config"] = checked_distributed_config(
                    kwargs["distributed_config"], kwargs["dtype"], lambda: cls(copy.deepcopy(architecture))
                )
            stored = stored_or_none(place, hub, kwargs)
            if stored is not None:
                expected = shapes_on_meta(cls, config)
                promised = promised_tensors(cls, saved) if changed and saved is not None else expected
                check_tensors(
                    stored,
                    expected,
                    promised,
                    where=str(name),
                    allow_missing=allow_missing,
                    allow_mismatched=ignore_mismatched,
                )
                if kwargs.get("distributed_config") is not None:
                    absent = [name for name, tensor in expected.items() if stored.get(name) != tensor]
                    refuse_new_weights(absent, str(name))
                if kwargs.get("device_map") is None and kwargs.get("distributed_config") is None:
                    check_memory(sum(math.prod(tensor.shape) for tensor in expected.values()))
            loaded: Any = super().from_pretrained(
                place,
                *args,
                config=config,
                ignore_mismatched_sizes=ignore_mismatched or bool(overrides),
                output_loading_info=True,
                **kwargs,
            )
        model, info = loaded
        if kwargs.get("distributed_config") is not None:
            finish_distributed(model)
        if place is not None:
            processor = None
            try:
                processor = MoMEProcessor.from_pretrained(place, **hub)
            except InputError:
                # A model may be saved without a processor. One that is there and cannot be used is damaged.
                if not allow_damaged and find_file(place, PROCESSOR_FILE, hub) is not None:
                    raise
            model.loaded_processor = processor
        if revision is not None:  # a processor that is loaded later must be of the same revision
            model.config.name_or_path = f"hf-hub:{place}@{revision}"
        model.card_sections = _sections_of_card(name, place)
        _copy_mapped_tensors(model)
        new = {*info["missing_keys"], *(entry[0] for entry in info["mismatched_keys"])}
        if stored is not None:
            if promised:  # empty where the saved config cannot be built
                notes += unused_note(stored, {**promised, **expected, **model.state_dict()})
            if not allow_damaged:
                refuse_damage(model, set(stored) - new, lambda: cls(copy.deepcopy(model.config)), str(name))
        if saved is not None and place is not None and not allow_damaged:
            # Whoever allows missing tensors knows that the weights are not those that were saved.
            whole = stored is not None and not allow_missing and not ignore_mismatched
            with errors_for_people(name):
                refuse_changes(str(name), place, hub, ignore=overridden, uses_config=reads_config, uses_weights=whole)
        total = len(model.state_dict())
        if stored is None and new and not (overrides or allow_missing or ignore_mismatched):
            raise InputError(f"{len(new)} of {total} tensors are not in the checkpoint", where=str(name))
        if new_text:
            model.text_bank.reset()
            new.add("text_bank.rows_LT")
        if new:
            shown = ", ".join(sorted(new)[:4]) + (", …" if len(new) > 4 else "")
            logger.warning(f"{len(new)} of {total} tensors are new and untrained: {shown}")
            if "trained_labels" not in labels:  # no structure may be called trained with weights that are not
                model.config.trained_labels = []
        if labels:
            _relabel(model, **labels)
        model.load_notes = (*notes, *unknown_label_notes(model.config.trained_labels))
        for note in model.load_notes:
            logger.warning(note)
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
        """Writes safetensors, `config.json`, the label table, a stub for remote code, the processor and a model card.

        The model's `processor` is written where it is set. Otherwise the processor that was loaded with the weights is
        written, unless the folder has one already. All files are written beside the folder's own and then replace
        them, so that a failed write leaves the old model as it was. A model that is spread over processes is saved by a
        call on every process; one of them writes.

        Raises:
            InputError: The folder is a file, or may not be written.
            OutputError: The disk is full, or the like.
        """
        folder = Path(save_directory)
        check_output_folder(folder)
        self.config.auto_map = dict(AUTO_MAP)
        if kwargs.get("push_to_hub"):  # transformers uploads the folder that it writes to
            self._card_to_upload = own_card(folder)
            super().save_pretrained(folder, *args, **kwargs)
            if writes_files(self):
                self._save_extras(folder)
            return
        is_main = (args[0] if args else kwargs.get("is_main_process", True)) and writes_files(self)
        part = folder / f".{secrets.token_hex(8)}.part"
        with output_errors(folder, "the model", part):
            part.mkdir(parents=True)
            super().save_pretrained(part, *args, **kwargs)
            if is_main:
                self._save_extras(part, keep=folder)
            move_files(part, folder)
        wait_for_all(self)

    def _upload_modified_files(self, working_dir: Any, *args: Any, **kwargs: Any) -> Any:
        # With `push_to_hub=True` transformers uploads before its own `save_pretrained` returns.
        if self._card_to_upload is not None:  # transformers has replaced it by that of the Hub, or by an empty one
            (Path(working_dir) / CARD_FILE).write_bytes(self._card_to_upload)
            self._card_to_upload = None
        self._save_extras(working_dir)
        return super()._upload_modified_files(working_dir, *args, **kwargs)

    def _save_extras(self, folder: str | Path, keep: Path | None = None) -> None:
        """Writes what transformers does not; a processor that `keep` holds is not replaced by the loaded one."""
        folder = Path(folder)
        processor = self.processor
        if processor is None and not ((keep or folder) / "preprocessor_config.json").exists():
            processor = self.loaded_processor
        if processor is not None:
            processor.save_pretrained(folder)
        save_files(folder, self.config, keep or folder)
        count = sum(parameter.numel() for parameter in self.parameters())
        card = model_card(self.config, processor or self.loaded_processor, count, self.card_sections)
        write_card(folder, keep or folder, card)


def _source(name: str | Path | None, kwargs: dict[str, Any]) -> tuple[str | None, str | None, dict[str, Any]]:
    """The place and revision that a name means, and the arguments for downloads, which stay in `kwargs` too."""
    if name is None:
        return None, None, {}
    place, revision = locate(name, kwargs.pop("revision", None), kwargs.get("subfolder"))
    if os.path.isdir(place):
        kwargs.pop("subfolder", None)  # it is part of the place now
    if revision is not None:
        kwargs["revision"] = revision
    kwargs.update(download_options(place, {key: kwargs[key] for key in DOWNLOAD_KEYS if key in kwargs}))
    return place, revision, {key: kwargs[key] for key in DOWNLOAD_KEYS if key in kwargs}


def _sections_of_card(name: str | Path | None, place: str | None) -> tuple[str, ...]:
    """What a card says of loaded weights; a folder of one's own is not named."""
    if place is None:
        return ()
    if not os.path.isdir(place):
        return sections_of_loaded(place, None)
    is_own = os.path.isdir(str(name).removeprefix("local-dir:"))
    return sections_of_loaded(None if is_own else str(name), Path(place))


def _copy_mapped_tensors(model: PreTrainedModel) -> None:
    """Copies tensors that are views of the mapped file, so that saving over the file does not change the model.

    The copies are aligned in memory; results are then equal, bit for bit, to those of the model that was saved.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu" and type(tensor.data) is torch.Tensor:  # quantised tensors are new already
            tensor.data = tensor.data.clone()


def _relabel(model: Any, labels: list[str] | None = None, trained_labels: list[str] | None = None) -> None:
    new = model.relabel(model.config.labels if labels is None else labels, trained_labels)
    if new:
        shown = ", ".join(new[:4]) + (", …" if len(new) > 4 else "")
        logger.warning(f"{len(new)} labels have no row in the checkpoint's bank: {shown}")
