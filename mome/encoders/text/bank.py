"""Text rows that were made elsewhere: in the checkpoint alone, or read from a file or another checkpoint."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from mome.encoders.text.bank_file import BankFile, read_bank_file
from mome.encoders.text.base import check_width
from mome.encoders.text.stored import StoredText
from mome.errors import InputError, did_you_mean
from mome.registry import at_least


class BankText(StoredText):
    """Embeddings that were made elsewhere; only labels of the model's bank can be prompted.

    The rows of a file fill the bank in training and are saved with the model, whose prompts never read the file. Our
    choice.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Settings of `bank`.

        Args:
            width: Width T of the stored rows.
            file: A file that `mome embed --bank` wrote, or the folder of a checkpoint. Its rows fill the empty bank of
                a model in training; without it, the model's own bank holds all rows.
        """

        width: int = 512
        file: str = ""

    def __init__(self, config: Config) -> None:
        at_least(1, "bank", width=config.width)
        self.config = config

    def width(self, num_labels: int) -> int:
        return self.config.width

    def stored_labels(self) -> list[str]:
        """Returns the labels of the file.

        Raises:
            InputError: The file cannot be read, or its rows have another width.
        """
        return list(self._file.labels) if self.config.file else []

    def encode(self, texts: list[str]) -> Tensor:
        """Returns the file's rows (P, T) of labels.

        Raises:
            InputError: There is no file, it cannot be read, its rows have another width, or it lacks a label.
        """
        if not self.config.file:
            return super().encode(texts)
        rows = [self._file.row(text) for text in texts]
        missing = [text for text, row in zip(texts, rows, strict=True) if row is None]
        if missing:
            raise InputError(
                f"the text bank has no row of {missing[0]!r:.60}{did_you_mean(missing[0][:60], self._file.labels)}",
                where=self.config.file,
                hint="mome embed --bank writes a bank of more labels",
            )
        found = [row for row in rows if row is not None]
        return torch.stack(found) if found else torch.empty(0, self.config.width)

    @functools.cached_property
    def _file(self) -> BankFile:
        bank = read_bank_file(self.config.file)
        check_width(bank.rows_LT, self.config.width, f"text bank {self.config.file}")
        return bank
