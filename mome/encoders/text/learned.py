"""A row that is learned for every label."""

from __future__ import annotations

from dataclasses import dataclass

from mome.encoders.text.stored import StoredText
from mome.registry import at_least


class LearnedText(StoredText):
    """One-hot rows over the labels, which stand for learned rows; free text is refused.

    With `dim=0` each layer that reads text learns a row per label of its own, as the columns of its first matrix. With
    `dim=T` the model's bank learns one row (T,) per label, which all layers share: a parameter of the model, which is
    saved, averaged over the steps and kept by its label as every other weight. Our choice.
    """

    one_hot = True

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Settings of `learned`.

        Args:
            dim: Width of the row that the bank learns for every label; 0 leaves the rows to the layers that read text.
        """

        dim: int = 0

    def __init__(self, config: Config) -> None:
        at_least(0, "learned", dim=config.dim)
        self.config, self.learned_width = config, config.dim

    def width(self, num_labels: int) -> int:
        """Returns one column per label."""
        return num_labels
