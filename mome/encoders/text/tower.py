"""What all text towers share: templates, ensembles of them, the width of their rows, and their identity."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from mome.encoders.text.base import TextEncoder, check_width
from mome.encoders.text.templates import TEMPLATE, read_templates
from mome.errors import InputError
from mome.registry import at_least

__all__ = ["TEMPLATE", "TextTower"]

# Two prompts that every tower must tell apart.
_PROBE = ("liver", "spleen")


class TextTower(TextEncoder):
    """A text model that is loaded at the first `encode` and is no part of a MoME model.

    A prompt p becomes the sentences s_k = instruction + template_k(p) and the row
    r = e(s_1) for one template, r = 1/K Σ_k e(s_k) / ‖e(s_k)‖ for K > 1 (the prompt ensembling of CLIP, Radford et al.
    2021, §3.1.4). With `normalize` the row is r / ‖r‖.

    Args:
        model: Hub id or a folder.
        normalize: Whether rows are scaled to unit length.
        template: Sentence around a prompt, or its name; `{}` is the prompt.
        templates: An ensemble of templates, which replaces `template`.
        instruction: Text that stands before every sentence as it is.
        width: Width T of the rows; 0 reads it from the tower's config.
    """

    needs_tower = True

    def __init__(
        self,
        *,
        model: str,
        normalize: bool,
        template: str,
        templates: Sequence[str] = (),
        instruction: str = "",
        width: int,
    ) -> None:
        at_least(0, "a text tower", width=width)
        self.model_id, self.normalize, self.instruction, self.known_width = model, normalize, instruction, width
        self.templates = read_templates(template, templates, self._where())
        self._is_checked = False

    def width(self, num_labels: int) -> int:
        """Returns the width T of the rows; the Hub is asked only where the config does not say."""
        return self.known_width or self._read_width()

    @torch.no_grad()
    def encode(self, texts: list[str]) -> Tensor:
        """Embeds texts as rows (P, T), float32 on the CPU.

        Raises:
            InputError: The tower cannot be loaded, its rows have another width than the config says or do not differ
                between prompts, or a sentence is too long for it.
        """
        if not texts:
            return torch.empty(0, self.width(0))
        if not self._is_checked:
            self._check_rows(self._rows(list(_PROBE)))
            self._is_checked = True
        return self._rows(texts)

    def fingerprint(self) -> str:
        """Returns the SHA-256 of the tower: the names, types, shapes and values of its tensors, and its vocabulary."""
        tensors, vocabulary = self._identity()
        digest = hashlib.sha256(json.dumps(sorted(vocabulary.items())).encode())
        for name in sorted(tensors):
            values = tensors[name].detach().cpu().contiguous()
            digest.update(f"{name} {values.dtype} {tuple(values.shape)}\n".encode())
            digest.update(values.reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def _rows(self, texts: list[str]) -> Tensor:
        rows_KPT = [self._embed([self.instruction + sentence.format(t) for t in texts]) for sentence in self.templates]
        if len(rows_KPT) == 1:
            rows_PT = rows_KPT[0]
        else:
            rows_PT = torch.stack([F.normalize(rows, dim=-1) for rows in rows_KPT]).mean(0)
        return F.normalize(rows_PT, dim=-1) if self.normalize else rows_PT

    def _check_rows(self, rows_PT: Tensor) -> None:
        """Checks the rows of two different prompts."""
        if self.known_width:
            check_width(rows_PT, self.known_width, self._where())
        if not torch.isfinite(rows_PT).all():
            raise InputError("the text tower gives rows that are not finite", where=self._where())
        if torch.equal(rows_PT[0], rows_PT[1]):
            raise InputError(
                f"the text tower gives {_PROBE[0]!r} and {_PROBE[1]!r} the same row",
                where=self._where(),
                hint="choose the pooling of the model's card; language models have pooling='last_token'",
            )

    def _where(self) -> str:
        return f"text tower {self.model_id}"

    def _read_width(self) -> int:
        """Reads the width of the rows from the tower's own config."""
        raise NotImplementedError

    def _embed(self, sentences: list[str]) -> Tensor:
        """Runs the tower: N sentences → float32 rows (N, T) on the CPU."""
        raise NotImplementedError

    def _identity(self) -> tuple[Mapping[str, Tensor], Mapping[str, int]]:
        """Returns the tower's tensors by name, and the number of every word of its vocabulary."""
        raise NotImplementedError
