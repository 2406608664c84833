"""The text rows that a checkpoint stores for its labels, and the scaling that every text row goes through."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from mome.errors import InputError


class TextBank(nn.Module):
    """Embeddings of L labels in width T. Calling it centres and scales text rows before the model reads them.

    The stored rows are read through the call too, so that the bank of an offloaded model can be read. Its tensors stay
    in float32 when a model is cast to half precision: embeddings of prompts differ little from their mean, which is
    subtracted, and rows that were rounded would be saved so.

    Args:
        labels: Names, in the order of the rows.
        width: Width T of the rows.
        one_hot: Whether text rows only number the labels; rows are then made, not embedded.
        learned_width: Width R of the rows that the bank learns for one-hot rows; 0 where it learns none. Row t belongs
            to the label whose one-hot row has its 1 in column t, and follows it when labels change.

    Attributes:
        out_width: Width of the rows that the layers of the model read: R, or T where no rows are learned.
    """

    def __init__(self, labels: Sequence[str], width: int, *, one_hot: bool, learned_width: int = 0) -> None:
        super().__init__()
        self.out_width = learned_width or width
        self.learned_TR = nn.Parameter(torch.empty(width, learned_width)) if learned_width else None
        self.labels, self.one_hot = list(labels), one_hot
        self.register_buffer("rows_LT", torch.empty(len(self.labels), width))
        self.register_buffer("mean_T", torch.empty(width))
        self.register_buffer("scale", torch.empty(()))
        self.rows_LT: Tensor
        self.mean_T: Tensor
        self.scale: Tensor

    def forward(self, text_PT: Tensor | None = None) -> Tensor:
        """Text rows (P, T), of labels or of free text, brought to the mean and scale that the model was trained on.

        Without text it returns the stored rows (L, T) as they are. Where rows are learned, the result is (P, R).
        """
        if text_PT is None:
            return self.rows_LT
        rows_PT = (text_PT.to(self.mean_T) - self.mean_T) * self.scale
        if self.learned_TR is None:
            return rows_PT
        with torch.autocast(rows_PT.device.type, enabled=False):
            return rows_PT @ self.learned_TR

    @property
    def is_empty(self) -> bool:
        """Whether no row was ever set."""
        return not bool(self().any())

    def known(self) -> dict[str, Tensor]:
        """The rows that were set, by label, as float32 on the CPU. A row of zeros was never set."""
        rows_LT = self().detach().float().cpu()
        return {name: row for name, row in zip(self.labels, rows_LT, strict=True) if row.any()}

    def rows(self, names: Sequence[str]) -> Tensor:
        """Stored rows (P, T) of known labels.

        Raises:
            InputError: A name is not in the bank, or its row was never set.
        """
        missing = [name for name in names if name not in self.labels]
        if missing:
            raise InputError(
                f"{missing[0]!r} is not one of the {len(self.labels)} labels this model stores",
                hint="embed it with the model's text tower (mome.prompts.embed_prompts)",
            )
        rows_PT = self()[[self.labels.index(name) for name in names]]
        unset = [name for name, row in zip(names, rows_PT, strict=True) if not row.any()]
        if unset:
            raise InputError(
                f"the bank has no embedding of {unset[0]!r} yet: its row is all zeros",
                hint="fill it with model.text_bank.set(…), or load a trained checkpoint",
            )
        return rows_PT

    @torch.no_grad()
    def nearest(self, text_PT: Tensor) -> Tensor:
        """Returns the label whose stored row is nearest to each text row: (P,) int64, an index into `labels`.

        The distance is Euclidean; it is zero for the rows of known labels. Labels whose row was never set are left out.

        Raises:
            InputError: No row was ever set.
        """
        rows_LT = self()
        set_L = rows_LT.any(dim=1)
        if not torch.compiler.is_exporting() and not set_L.any():
            raise InputError(
                "a router looks for the labels of prompts among the text rows of the model, which has none yet",
                hint="fill them with model.text_bank.set(…), or load a trained checkpoint",
            )
        # The mode without a matrix product gives exactly zero for equal rows.
        distance_PL = torch.cdist(text_PT.to(rows_LT), rows_LT, compute_mode="donot_use_mm_for_euclid_dist")
        return distance_PL.masked_fill(~set_L, torch.inf).argmin(dim=1)

    @torch.no_grad()
    def set(self, rows_LT: Tensor, *, centre_on: Tensor | None = None) -> None:
        """Stores the rows of all labels.

        Args:
            rows_LT: One row per label.
            centre_on: Rows (N, T) whose mean becomes zero and whose scale becomes one; usually those of the trained
                labels. None leaves text rows as they are, which suits one-hot rows. Embeddings of prompts share most
                of their direction, and their differences would be lost without centring. Our choice.

        Raises:
            InputError: The shape is not (labels, width), `centre_on` has another width, or a value is not finite.
        """
        expected = tuple(self.rows_LT.shape)
        if tuple(rows_LT.shape) != expected:
            raise InputError(f"the bank has shape {tuple(rows_LT.shape)}, the config asks for {expected}")
        if centre_on is not None and (centre_on.ndim != 2 or centre_on.shape[1] != expected[1]):
            raise InputError(f"centre_on has shape {tuple(centre_on.shape)}, not (rows, {expected[1]})")
        if not all(torch.isfinite(rows).all() for rows in (rows_LT, centre_on) if rows is not None):
            raise InputError("a text row holds a value that is not finite", hint="check the text tower")
        if centre_on is not None:
            centre_on = centre_on.to(self.mean_T.dtype)
        self.rows_LT.copy_(rows_LT)
        if centre_on is not None and centre_on.shape[0] > 1:
            mean_T = centre_on.mean(0)
            self.mean_T.copy_(mean_T)
            self.scale.copy_(1 / (centre_on - mean_T).square().mean().sqrt().clamp(min=1e-6))

    @torch.no_grad()
    def set_rows(self, names: Sequence[str], rows_PT: Tensor) -> None:
        """Stores the rows of some labels; all other rows, the mean and the scale stay as they are.

        Args:
            names: Labels of the bank.
            rows_PT: One row per name.

        Raises:
            InputError: A name is not in the bank, the shape is another one, or a value is not finite.
        """
        missing = [name for name in names if name not in self.labels]
        if missing:
            raise InputError(f"{missing[0]!r} is not one of the {len(self.labels)} labels this model stores")
        expected = (len(names), self.rows_LT.shape[1])
        if tuple(rows_PT.shape) != expected:
            raise InputError(f"the rows have shape {tuple(rows_PT.shape)}, the bank takes {expected}")
        if not torch.isfinite(rows_PT).all():
            raise InputError("a text row holds a value that is not finite", hint="check the text tower")
        for name, row in zip(names, rows_PT, strict=True):
            self.rows_LT[self.labels.index(name)] = row.to(self.rows_LT)

    @torch.no_grad()
    def reset(self) -> None:
        """Resets the bank to its initial state."""
        self.rows_LT.copy_(self._first_rows())
        self.mean_T.zero_()
        self.scale.fill_(1.0)

    @torch.no_grad()
    def relabel(self, labels: Sequence[str]) -> list[str]:
        """Changes the list of labels; rows follow their names.

        Returns:
            Names that had no row. Theirs are zeros; in a one-hot bank each gets a column that no other label uses, of
            which there are enough (`MoMEConfig.check_labels`).
        """
        new = [name for name in labels if name not in self.labels]
        rows = self.rows_LT.new_zeros(len(labels), self.rows_LT.shape[1])
        for i, name in enumerate(labels):
            if name in self.labels:
                rows[i] = self.rows_LT[self.labels.index(name)]
        if self.one_hot:
            free = [column for column in range(rows.shape[1]) if not rows[:, column].any()]
            for name, column in zip(new, free, strict=False):
                rows[list(labels).index(name), column] = 1
        self.rows_LT, self.labels = rows, list(labels)
        return new

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Moves the tensors as `nn.Module.to` and its relatives do, but to float32 in the place of half precision."""

        def moved(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            is_half = result.dtype in (torch.float16, torch.bfloat16)
            if tensor.is_meta:  # it has no values to keep
                return result.float() if is_half else result
            return tensor.to(result.device, torch.float32) if is_half else result

        return super()._apply(moved, recurse)

    def _first_rows(self) -> Tensor:
        """One-hot rows where text rows only number the labels; else zeros, which stand for "not set yet"."""
        if self.one_hot:
            return torch.eye(*self.rows_LT.shape, dtype=self.rows_LT.dtype, device=self.rows_LT.device)
        return torch.zeros_like(self.rows_LT)

    @torch.no_grad()
    def init_weights_(self, init: ModuleType, std: float) -> None:
        """The bank of a new model; what was loaded is left alone."""
        init.copy_(self.rows_LT, self._first_rows())
        init.zeros_(self.mean_T)
        init.ones_(self.scale)
        if self.learned_TR is not None:  # the size of centred embeddings
            init.normal_(self.learned_TR, mean=0.0, std=1.0)
