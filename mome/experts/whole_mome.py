"""Another MoME as a whole-model expert."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from mome.errors import InputError
from mome.experts.whole_model import WholeModel


def whole_mome(model: Any, labels: Sequence[str] | None = None, *, frozen: bool = True) -> WholeModel:
    """Another MoME as a whole-model expert.

    Args:
        model: The MoME, with its processor.
        labels: The labels that it is asked for; those that it was trained on where None.
        frozen: Whether it stays as it is.

    Raises:
        InputError: The model was trained on no label, its bank lacks one, or it has no processor.
    """
    names = list(model.config.trained_labels if labels is None else labels)
    processor = model.processor or model.loaded_processor
    if not names:
        raise InputError("this MoME was trained on no label", hint="whole_mome(model, labels=[…])")
    if processor is None:
        raise InputError(
            "this MoME has no processor, so its grid is not known", hint="model.processor = MoMEProcessor(…)"
        )
    return WholeModel(
        _PromptedMoME(model, names),
        names,
        spacing=processor.spacing,
        orientation=processor.orientation,
        hu_window=processor.hu_window,
        activation="sigmoid",
        frozen=frozen,
        kind="mome",
    )


class _PromptedMoME(nn.Module):
    """A MoME that is asked for the same labels every time."""

    def __init__(self, model: Any, labels: list[str]) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("text_PT", model.prompt_rows(model.text_bank.rows(labels), labels).detach().clone())

    def forward(self, volume_BCDHW: Tensor) -> Tensor:
        return self.model.decode(self.model.encode(volume_BCDHW), self.text_PT)
