"""The weights of a fusion for one prompt, for looking at them; some fusions have none to show."""

from __future__ import annotations

from torch import Tensor

from mome.routers.fusion.base import Fusion


def shown_weights(
    fusion: Fusion, features_BSCV: Tensor, text_1T: Tensor, present_1S: Tensor | None = None
) -> Tensor | None:
    """The weights (B, S, V) of the scales for one prompt at every voxel; None where the fusion does not tell them.

    Args:
        fusion: Any fusion. One that has no `dot_product` and does not implement `weights` tells nothing.
        features_BSCV: The scales on a whole map.
        text_1T: The text row of the prompt.
        present_1S: bool, the scales that the prompt has; None where it has all.
    """
    if type(fusion).weights is Fusion.weights and fusion.dot_product(text_1T) is None:
        return None
    weights_B1SV = fusion.weights(features_BSCV, text_1T, present_1S)
    return weights_B1SV.expand(features_BSCV.shape[0], 1, -1, features_BSCV.shape[3])[:, 0]
