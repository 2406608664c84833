"""What the tile loop asks of a network: encode a tile once, then decode it for any prompts.

The loop in `mome.inference.stream` calls a `Predictor`, never the model. `ModelPredictor` is the one for a MoME. A
predictor that changes the tiles or the logits, such as test-time flips, wraps another predictor.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from mome.inference.bfloat16_encoder import with_bfloat16_encoder
from mome.inference.onednn_convolutions import OneDnnConvolutions

if TYPE_CHECKING:
    from mome.modeling import MoME


class Predictor(Protocol):
    """Logits of one tile.

    Attributes:
        patch_size: Voxels (D, H, W) of a tile.
        device: Where tiles and text go before the predictor gets them, and where logits are accumulated.
    """

    @property
    def patch_size(self) -> tuple[int, int, int]: ...

    @property
    def device(self) -> torch.device: ...

    def encode(self, tile_B1DHW: Tensor, origin: tuple[int, int, int]) -> Any:
        """Computes what all prompts share.

        Args:
            tile_B1DHW: One tile, (1, 1, D, H, W), windowed HU in [0, 1].
            origin: The tile's first voxel (d, h, w) on the network grid.

        Returns:
            Features, which only `decode` reads.
        """
        ...

    def decode(self, features: Any, text_PT: Tensor) -> Tensor:
        """Returns float32 logits (1, P, D, H, W) of a tile.

        Args:
            features: What `encode` returned.
            text_PT: One row per prompt. The tile loop only slices the first axis, so a row may have any shape.
        """
        ...


class ModelPredictor:
    """A MoME as a `Predictor`.

    Args:
        model: A MoME in eval mode.
        autocast: Lower precision inside the network, as in `torch.bfloat16`; None for the model's own. On the CPU it
            is that of the encoder; see `mome.inference.bfloat16_encoder`.
    """

    def __init__(self, model: MoME, autocast: torch.dtype | None = None) -> None:
        self.model, self.autocast = model, autocast

    @property
    def patch_size(self) -> tuple[int, int, int]:
        """The patch size of the model's config."""
        depth, height, width = self.model.config.patch_size
        return depth, height, width

    @property
    def device(self) -> torch.device:
        """The device that the model computes on; parameters of an offloaded model are elsewhere."""
        for module in self.model.modules():
            device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
            if device is not None:
                return torch.device(device)
        return next(self.model.parameters()).device

    def encode(self, tile_B1DHW: Tensor, origin: tuple[int, int, int]) -> Any:
        """Returns the model's features of a tile; see `Predictor.encode`."""
        # On the CPU: a copy to a GPU would wait for it at every tile, and few routers read the place.
        origin_B3 = torch.tensor([origin] * tile_B1DHW.shape[0])
        lowers_the_encoder = self._lowers_the_encoder(tile_B1DHW.device)
        model = with_bfloat16_encoder(self.model) if lowers_the_encoder else self.model
        with self._precision(tile_B1DHW.device), self._convolutions():
            return model.encode(tile_B1DHW, origin_B3)

    def decode(self, features: Any, text_PT: Tensor) -> Tensor:
        """Returns the model's logits of a tile in float32; see `Predictor.decode`."""
        with self._precision(text_PT.device):
            return self.model.decode(features, text_PT).float()

    def _precision(self, device: torch.device) -> AbstractContextManager[None]:
        if self.autocast is None or self._lowers_the_encoder(device):
            return nullcontext()
        return torch.autocast(device.type, self.autocast)

    def _lowers_the_encoder(self, device: torch.device) -> bool:
        """Whether the lower precision is that of the encoder alone, as it is on the CPU.

        A method `encode` that was set on the model itself knows only the model's own encoder.
        """
        has_encoder = "encoder" in self.model._modules and "encode" not in vars(self.model)
        return self.autocast is torch.bfloat16 and device.type == "cpu" and has_encoder

    def _convolutions(self) -> AbstractContextManager[Any]:
        return OneDnnConvolutions()
