"""The contract of a fusion: how the S expert maps become one map per prompt."""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn


class DotProduct(NamedTuple):
    """The arguments of the fused op that a fusion gives.

    weight(p, v, s) = softmax over s of ⟨query_p, f_s(v)⟩ + bias_ps, over the `top_k` best where top_k > 0; the mixture
    is Σ_s weight · f_s(v).

    Attributes:
        query_PC: One query per prompt in the width C of the head; zeros where the weights do not depend on
            the voxel.
        bias_PS: The part of the score that does not depend on the voxel.
        top_k: The number of scales that a voxel keeps; 0 keeps all.
    """

    query_PC: Tensor
    bias_PS: Tensor
    top_k: int = 0


class Fusion(nn.Module):
    """Mixes the scales for every prompt, voxel by voxel.

    A fusion is built with `channels` (C), `text_dim` (T) and `scales` (S). `forward` says what it computes and is the
    reference. A fusion that is a softmax of dot products also returns the arguments of the fused op from `dot_product`.
    `forward` may use the fusion's own parameters; `dot_product` uses only submodules that it calls.

    `predict` splits the voxels into tiles. A fusion that needs the whole map returns from `summarise` what it reads of
    it; `predict` calls this once, before the split, and gives the result to `forward` as `summary`. A tile therefore
    changes no result.

    Attributes:
        finest_only: Whether only the finest scale gets an expert.
        takes_present: Whether `forward` takes `present_PS`, bool, the scales that each prompt has; the others get no
            weight. Whole-model experts need it (see `mome.layers.extra_scale`), except where the fusion returns a
            `dot_product`, whose biases are masked for it.
    """

    finest_only: ClassVar[bool] = False
    takes_present: ClassVar[bool] = False

    def summarise(self, features_BSCV: Tensor) -> Tensor | None:
        """What the fusion reads of the whole map; None, the default, where every voxel is fused by itself."""
        return None

    def forward(self, features_BSCV: Tensor, text_PT: Tensor) -> Tensor:
        """Feature maps and prompts → mixture (B, P, C, V), or (B, 1, C, V) where it is the same for every prompt.

        Args:
            features_BSCV: The scales at V voxels; V may be any part of the volume.
            text_PT: Text rows of the prompts.
        """
        raise NotImplementedError

    def dot_product(self, text_PT: Tensor) -> DotProduct | None:
        """The arguments of the fused op, or None where the fusion has another form."""
        return None

    def weights(self, features_BSCV: Tensor, text_PT: Tensor, present_PS: Tensor | None = None) -> Tensor:
        """The weights (B or 1, P, S, V or 1) of the scales on a whole map, for looking at them.

        Args:
            features_BSCV, text_PT: As for `forward`, V being the whole map.
            present_PS: bool, the scales that each prompt has; None where it has all.

        Raises:
            NotImplementedError: The fusion has neither a `dot_product` nor weights of its own.
        """
        numbers = self.dot_product(text_PT)
        if numbers is None:
            raise NotImplementedError(f"{type(self).__name__} does not say how it weighs the scales")
        return dot_product_weights(features_BSCV, without_absent(numbers, present_PS))


# Added to the score of a scale that a prompt does not have. Its weight is then exactly zero, because the exponential
# underflows. The number is finite, so that no NaN can arise, and fits float16.
ABSENT = -3e4


def without_absent(numbers: DotProduct, present_PS: Tensor | None) -> DotProduct:
    """The same arguments with the biases of absent scales lowered, so that these scales get no weight.

    Args:
        numbers: What `dot_product` returned.
        present_PS: bool, the scales that each prompt has; None where it has all.
    """
    if present_PS is None:
        return numbers
    return numbers._replace(bias_PS=numbers.bias_PS.masked_fill(~present_PS, ABSENT))


def mix_by_dot_product(features_BSCV: Tensor, numbers: DotProduct) -> Tensor:
    """The mixture (B, P, C, V) that a `DotProduct` describes: the plain form of what the fused op computes."""
    return torch.einsum("bpsv,bscv->bpcv", dot_product_weights(features_BSCV, numbers), features_BSCV)


def dot_product_weights(features_BSCV: Tensor, numbers: DotProduct) -> Tensor:
    """The weights (B, P, S, V) of the scales that a `DotProduct` describes."""
    scores_BPSV = torch.einsum("pc,bscv->bpsv", numbers.query_PC.to(features_BSCV), features_BSCV)
    scores_BPSV = scores_BPSV + numbers.bias_PS[..., None]
    if 0 < numbers.top_k < features_BSCV.shape[1]:
        # a stable sort keeps the earlier of equal scores, as the fused op does
        order_BPSV = scores_BPSV.argsort(dim=2, descending=True, stable=True)
        dropped_BPSV = order_BPSV[:, :, numbers.top_k :]
        scores_BPSV = scores_BPSV.scatter(2, dropped_BPSV, float("-inf"))
    return scores_BPSV.softmax(dim=2)
