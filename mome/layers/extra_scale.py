"""A whole-model expert as one more scale of the fusion: the map of a prompt's class becomes its feature."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mome import module_objects
from mome.errors import InputError
from mome.experts.whole_model import LOGIT_LIMIT, WholeModel


class _Frozen:
    """Holds a module that is no part of the model's state; copies of the model share it."""

    def __init__(self, module: WholeModel) -> None:
        self.module = module

    def __deepcopy__(self, memo: dict[int, Any]) -> _Frozen:
        return self


class WholeModelScale(nn.Module):
    """feature_p(v) = W [z / 10, tanh(z / 2)] + b, where z is the logit of prompt p's class at voxel v. Our choice.

    tanh(z / 2) is 2 · probability − 1. A prompt for which the expert has no class gets no feature: its number is 0,
    and the fusion gives the scale no weight.

    Args:
        reference: What the config stores for the expert; see `WholeModel.reference`.
        in_channels, patch_size: The input that the network is checked on.
        head_channels: Width C of the features.
        labels: The labels of the model.

    Raises:
        InputError: The object was not passed, its classes are no labels of the model, or its maps have other shapes.
    """

    def __init__(
        self,
        reference: dict[str, Any],
        *,
        in_channels: int,
        patch_size: Sequence[int],
        head_channels: int,
        labels: Sequence[str],
    ) -> None:
        super().__init__()
        whole = module_objects.recall(reference, "whole-model expert", "extra_experts=[…]")
        if not isinstance(whole, WholeModel):
            raise InputError(f"an extra expert is a WholeModel, got {type(whole).__name__}", hint="extra_experts=[…]")
        whole.check_labels(labels)
        whole.check_output(in_channels, patch_size)
        if whole.frozen:
            self.frozen = _Frozen(whole)
        else:
            self.trained = whole
        self.project = nn.Linear(2, head_channels)

    @property
    def expert(self) -> WholeModel:
        """The whole model."""
        return self.frozen.module if "frozen" in self.__dict__ else self.trained

    def numbers_of(self, names: Sequence[str]) -> list[int]:
        """For every prompt the number of its class, from 1; 0 where the expert has none."""
        known = {name: number for number, name in enumerate(self.expert.names, start=1)}
        return [known.get(name, 0) for name in names]

    def forward(self, volume_BCDHW: Tensor) -> Tensor:
        """Volume → logits (B, N, D, H, W) of the expert's N names."""
        return self.expert(volume_BCDHW)

    def feature(self, maps_BNDHW: Tensor, number_1: Tensor, size: Sequence[int]) -> Tensor:
        """The feature (B, C, *size) of one prompt; zeros where the expert has no class for it.

        Args:
            maps_BNDHW: What `forward` returned.
            number_1: The number of the prompt's class, int64 of shape (1,).
            size: Sides of the finest scale.
        """
        map_B1DHW = maps_BNDHW.index_select(1, (number_1 - 1).clamp(min=0))
        if map_B1DHW.shape[2:] != torch.Size(size):
            map_B1DHW = F.interpolate(map_B1DHW, size=list(size), mode="trilinear", align_corners=False)
        values_BDHW2 = torch.cat([map_B1DHW / LOGIT_LIMIT, (map_B1DHW / 2).tanh()], dim=1).movedim(1, -1)
        feature = self.project(values_BDHW2.to(self.project.weight.dtype)).movedim(-1, 1)
        return torch.where(number_1 > 0, feature, 0)  # a product would keep NaN of an expert that failed

    @torch.no_grad()
    def init_weights_(self, init: ModuleType, std: float) -> None:
        """Keeps the variance of the two values."""
        init.trunc_normal_(self.project.weight, std=0.5**0.5)
