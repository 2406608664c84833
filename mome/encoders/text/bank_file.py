"""Files of text rows: one safetensors file with a row per label, its names, and the tower that made them.

| entry | content |
|---|---|
| tensor `rows_LT` | float32 (labels, width) |
| metadata `format` | `mome-text-bank-1` |
| metadata `labels` | JSON list of the names, in the order of the rows |
| metadata `text_encoder` | the config string of the text encoder |
| metadata `tower_sha256` | `TextTower.fingerprint()` of the tower that made the rows |
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mome.atomic import atomic_write
from mome.errors import InputError
from mome.git_lfs import refuse_pointer
from mome.json_file import read_json_object

_FORMAT = "mome-text-bank-1"
_MAKE = "mome embed --bank FILE --labels NAME --text-encoder 'hf(...)' writes one"
_ROWS = "text_bank.rows_LT"  # the rows of a checkpoint


@dataclass(frozen=True)
class BankFile:
    """Text rows of labels.

    Attributes:
        labels: Their names.
        rows_LT: One row per label, float32.
        text_encoder: The config string of the text encoder that made the rows; empty where it is not known.
        tower_sha256: The identity of its tower; empty where it is not known.
    """

    labels: tuple[str, ...]
    rows_LT: Tensor
    text_encoder: str = ""
    tower_sha256: str = ""

    def row(self, name: str) -> Tensor | None:
        """Returns the row of a label, written with blanks or underscores; None where there is none."""
        return self._rows.get(_key(name))

    @functools.cached_property
    def _rows(self) -> dict[str, Tensor]:
        return {_key(name): row for name, row in zip(self.labels, self.rows_LT, strict=True)}


def write_bank_file(path: str | Path, bank: BankFile) -> None:
    """Writes a file of text rows, completely or not at all.

    Raises:
        InputError: The rows and names do not fit together, or a row is zero or not finite.
        OutputError: The file cannot be written.
    """
    _check(bank, str(path))
    metadata = {
        "format": _FORMAT,
        "labels": json.dumps(list(bank.labels)),
        "text_encoder": bank.text_encoder,
        "tower_sha256": bank.tower_sha256,
    }
    with atomic_write(path, "the text bank") as temporary:
        save_file({"rows_LT": bank.rows_LT.float().contiguous()}, temporary, metadata=metadata)


def read_bank_file(path: str | Path) -> BankFile:
    """Reads text rows from a file that `write_bank_file` wrote, or from the folder of a checkpoint.

    Raises:
        InputError: There is no such file, it is damaged or no text bank, or the checkpoint has no embeddings.
    """
    path = Path(path)
    if path.is_dir():
        return _of_checkpoint(path)
    if not path.is_file():
        raise InputError("there is no such text bank", where=str(path), hint=_MAKE)
    refuse_pointer(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT or list(file.keys()) != ["rows_LT"]:
                raise InputError("this file is no text bank", where=str(path), hint=_MAKE)
            rows_LT = file.get_tensor("rows_LT")
    except (SafetensorError, OSError) as error:
        raise InputError(f"the text bank cannot be read: {str(error)[:120]}", where=str(path), hint=_MAKE) from error
    bank = BankFile(
        _names(metadata.get("labels", ""), str(path)),
        rows_LT,
        metadata.get("text_encoder", ""),
        metadata.get("tower_sha256", ""),
    )
    _check(bank, str(path))
    return bank


def _of_checkpoint(folder: Path) -> BankFile:
    """The rows that a checkpoint stores for its labels; labels whose row was never set are left out."""
    config = read_json_object(folder / "config.json")
    encoder = config.get("text_encoder")
    encoder = encoder if isinstance(encoder, dict) else {}
    if encoder.get("name") in ("learned", "none"):
        raise InputError(
            "the checkpoint's rows only number its labels; they are no embeddings",
            where=str(folder),
            hint="a checkpoint with a text tower, or a file that mome embed --bank wrote",
        )
    name = "model.safetensors"
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = read_json_object(index).get("weight_map")
        name = Path(str(files.get(_ROWS, name) if isinstance(files, dict) else name)).name
    refuse_pointer(folder / name)
    try:
        with safe_open(folder / name, framework="pt") as file:
            rows_LT = file.get_tensor(_ROWS).float()
    except (SafetensorError, OSError) as error:
        raise InputError(f"the checkpoint's text rows cannot be read: {str(error)[:120]}", where=str(folder)) from error
    labels = _names(json.dumps(config.get("labels")), str(folder))
    if rows_LT.ndim != 2 or rows_LT.shape[0] != len(labels):
        raise InputError(f"{len(labels)} labels have rows of shape {tuple(rows_LT.shape)}", where=str(folder))
    held = rows_LT.any(dim=1)
    bank = BankFile(tuple(name for name, is_set in zip(labels, held, strict=True) if is_set), rows_LT[held])
    _check(bank, str(folder))
    return bank


def _names(text: str, where: str) -> tuple[str, ...]:
    try:
        names = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError("the text bank's list of labels is damaged", where=where) from error
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise InputError("the text bank's list of labels is damaged", where=where)
    return tuple(names)


def _check(bank: BankFile, where: str) -> None:
    rows_LT = bank.rows_LT
    if not bank.labels:
        raise InputError("the text bank holds no label", where=where, hint=_MAKE)
    if rows_LT.ndim != 2 or rows_LT.shape[0] != len(bank.labels) or not rows_LT.is_floating_point():
        raise InputError(f"{len(bank.labels)} labels have rows of shape {tuple(rows_LT.shape)}", where=where)
    if len({_key(name) for name in bank.labels}) != len(bank.labels):
        raise InputError("a label stands twice in the text bank", where=where)
    if not torch.isfinite(rows_LT).all() or not rows_LT.any(dim=1).all():
        raise InputError("a row of the text bank is zero or not finite", where=where)


def _key(name: str) -> str:
    return name.replace("_", " ").lower()
