"""Compiles the encoder of a network, which then takes less time for every tile."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from mome.errors import InputError
from mome.inference.predictor import ModelPredictor

BACKEND = "inductor"


class CompiledPredictor(ModelPredictor):
    """A `ModelPredictor` whose encoder went through `torch.compile`.

    Compilation takes a minute or two and happens here, with a tile of zeros. Inductor keeps what it compiled on this
    machine, so that the next process is faster. Sums are rounded in another order than without compilation.

    Args:
        model, autocast: As for `ModelPredictor`. The model itself is not changed.

    Raises:
        InputError: The model has no encoder, or this machine cannot compile it.
    """

    def __init__(self, model: Any, autocast: torch.dtype | None = None) -> None:
        super().__init__(_with_compiled_encoder(model), autocast)
        tile = torch.zeros(1, model.config.in_channels, *self.patch_size, device=self.device)
        try:
            with torch.inference_mode():
                self.encode(tile, (0, 0, 0))
        except (torch._dynamo.exc.TorchDynamoException, torch._inductor.exc.InductorError) as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            what = " ".join(lines[:2]) or type(error).__name__
            raise InputError(
                f"the encoder cannot be compiled here: {what:.200}",
                hint="install a C++ compiler such as g++, or leave out --compile",
            ) from error

    def encode(self, tile_B1DHW: Tensor, origin: tuple[int, int, int]) -> Any:
        """Returns the model's features of a tile; see `Predictor.encode`."""
        # A tile is a view of the scan's planes. Its strides differ from scan to scan, and each would be compiled anew.
        return super().encode(tile_B1DHW.clone(memory_format=torch.contiguous_format), origin)


def _with_compiled_encoder(model: Any) -> Any:
    """Returns a model with the same weights whose encoder is compiled when it is first called."""
    encoder = getattr(model, "encoder", None)
    if not isinstance(encoder, nn.Module):
        raise InputError("this model has no encoder that could be compiled", hint="leave out --compile")
    compiled = copy.copy(encoder)
    compiled.compile(dynamic=False, backend=BACKEND)
    network = copy.copy(model)
    network._modules = {**model._modules, "encoder": compiled}
    return network
