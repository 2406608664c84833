"""What whole-model experts add to a model: rows of prompts that hold class numbers, more scales, and a checked grid."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from mome.layers.extra_scale import WholeModelScale
from mome.processing import MoMEProcessor


class WithExtraExperts:
    """The part of `MoME` that joins whole-model experts.

    Attributes:
        extra_experts: A `WholeModelScale` for each whole-model expert; the subclass sets it.
    """

    extra_experts: nn.ModuleList
    _processor: MoMEProcessor | None = None
    _loaded_processor: MoMEProcessor | None = None

    @property
    def processor(self) -> MoMEProcessor | None:
        """The settings of the network grid, where they are known. They are no part of the weights."""
        return self._processor

    @processor.setter
    def processor(self, processor: MoMEProcessor | None) -> None:
        self.check_processor(processor)
        self._processor = processor

    @property
    def loaded_processor(self) -> MoMEProcessor | None:
        """The processor saved with the checkpoint; `processor` takes precedence."""
        return self._loaded_processor

    @loaded_processor.setter
    def loaded_processor(self, processor: MoMEProcessor | None) -> None:
        self.check_processor(processor)
        self._loaded_processor = processor

    def check_processor(self, processor: MoMEProcessor | None) -> None:
        """Checks that a processor makes the grid that the whole-model experts were trained on.

        Raises:
            InputError: The spacing, the orientation or the HU window of an expert differs.
        """
        if processor is not None:
            for scale in self._extra_scales():
                scale.expert.check_grid(processor)

    def prompt_rows(self, text_PT: Tensor, names: Sequence[str]) -> Tensor:
        """What `decode` and `forward` take as `text_PT`: text rows, and what the whole-model experts know of them.

        Args:
            text_PT: Text rows of the prompts.
            names: The names of the same prompts: labels, or free text.

        Returns:
            The rows as they are where there are no whole-model experts. Else (P, T + E): behind each row stands for
            each of the E experts the number of the prompt's class, or 0 where it has none.
        """
        if not len(self.extra_experts):
            return text_PT
        columns = [scale.numbers_of(names) for scale in self._extra_scales()]
        return torch.cat([text_PT, torch.tensor(columns).T.to(text_PT)], dim=1)

    def with_extra_scales(
        self, scales_BSCDHW: Tensor, extra_maps: Sequence[Tensor], numbers_1E: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Appends the features of whole-model experts for one prompt to the scales.

        Args:
            scales_BSCDHW: The model's own scales.
            extra_maps: Logits (B, N, D, H, W) of every expert.
            numbers_1E: The number of the prompt's class for every expert, 0 for none.

        Returns:
            (B, S + E, C, D, H, W), and bool (1, S + E), the scales that the prompt has; None where there are no
            whole-model experts.
        """
        if not len(self.extra_experts):
            return scales_BSCDHW, None
        size, extra = scales_BSCDHW.shape[3:], list[Tensor]()
        for scale, maps, number in zip(self._extra_scales(), extra_maps, numbers_1E[0], strict=True):
            extra.append(scale.feature(maps, number.reshape(1), size).to(scales_BSCDHW.dtype))
        own_1S = torch.ones(1, scales_BSCDHW.shape[1], dtype=torch.bool, device=numbers_1E.device)
        present_1S = torch.cat([own_1S, numbers_1E > 0], dim=1).to(scales_BSCDHW.device)
        return torch.cat([scales_BSCDHW, torch.stack(extra, dim=1)], dim=1), present_1S

    def _extra_scales(self) -> list[WholeModelScale]:
        return cast("list[WholeModelScale]", list(self.extra_experts))
