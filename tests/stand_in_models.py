"""Models without a network, whose masks are known, with what inference reads of a MoME."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import torch

from mome.layers.text_bank import TextBank


class Settings(SimpleNamespace):
    """The part of a config that inference reads."""

    def to_dict(self) -> dict[str, object]:
        return dict(vars(self))


class StandIn(torch.nn.Module):
    """A bank of one-hot rows, a config, and an `encode` that returns the tile."""

    def __init__(self, labels: Sequence[str], trained: Sequence[str], patch: int) -> None:
        super().__init__()
        self.text_bank = TextBank(labels, len(labels), one_hot=True)
        self.text_bank.reset()
        self.config = Settings(
            labels=list(labels),
            trained_labels=list(trained),
            synonyms={},
            patch_size=[patch] * 3,
            text_encoder={"name": "none"},
        )
        self.encoded = 0

    def prompt_rows(self, text_PT: torch.Tensor, names: Sequence[str]) -> torch.Tensor:
        return text_PT

    def encode(self, volume_B1DHW: torch.Tensor, origin_B3: torch.Tensor | None = None) -> torch.Tensor:
        self.encoded += 1
        return volume_B1DHW


class Contrast(StandIn):
    """Prompt p is where the window is above its threshold."""

    def __init__(
        self, labels: Sequence[str] = ("liver", "spleen"), thresholds: Sequence[float] = (0.4, 0.7), patch: int = 16
    ) -> None:
        super().__init__(labels, labels, patch)
        self.thresholds = torch.nn.Parameter(torch.tensor(thresholds))

    def decode(self, features: torch.Tensor, text_PT: torch.Tensor) -> torch.Tensor:
        level = text_PT.to(self.thresholds) @ self.thresholds
        return (features - level[None, :, None, None, None]) * 20


class Threshold(StandIn):
    """Every prompt is where the window is above one level."""

    def __init__(self, level: float = 0.5, patch: int = 8) -> None:
        super().__init__(["liver", "spleen"], ["liver"], patch)
        self.level = torch.nn.Parameter(torch.tensor(level))

    def decode(self, features: torch.Tensor, text_PT: torch.Tensor) -> torch.Tensor:
        return (features - self.level).expand(-1, text_PT.shape[0], -1, -1, -1) * 20


class LetterTower:
    """A text encoder whose embeddings tell texts apart by their letters, without weights."""

    needs_tower = True

    def width(self, num_labels: int) -> int:
        return 384

    def encode(self, texts: list[str]) -> torch.Tensor:
        return torch.stack([torch.full((384,), float(sum(map(ord, text)))) + torch.arange(384) for text in texts])
