"""Compiles the encoder and the fusion head of a network, which then takes less time for every tile."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from mome_kernels.dispatch import compiled_head
from torch import Tensor, nn

from mome.errors import InputError
from mome.inference.predictor import ModelPredictor

BACKEND = "inductor"


class CompiledPredictor(ModelPredictor):
    """A `ModelPredictor` whose encoder and whose fusion head on the CPU went through `torch.compile`.

    Compilation takes a minute or two. That of the encoder happens here, with a tile of zeros; that of the head with the
    first tile. Inductor keeps what it compiled on this machine, so that the next process is faster. Sums are rounded in
    another order than without compilation. `mome_kernels.torch_impl.head_compiled` says which heads are compiled. An
    encoder in bfloat16 on the CPU is not compiled: `mome.inference.bfloat16_encoder` is faster.

    Args:
        model, autocast: As for `ModelPredictor`. The model itself is not changed.

    Raises:
        InputError: The model has no encoder, or this machine cannot compile it.
    """

    def __init__(self, model: Any, autocast: torch.dtype | None = None) -> None:
        super().__init__(model, autocast)
        if not self.compiles_encoder:
            return
        self.model = _with_compiled_encoder(model)
        tile = torch.zeros(1, model.config.in_channels, *self.patch_size, device=self.device)
        with torch.inference_mode(), _refused("encoder"):
            self.encode(tile, (0, 0, 0))

    @property
    def compiles_encoder(self) -> bool:
        """Whether the encoder is compiled, not the head alone."""
        return not self._lowers_the_encoder(self.device)

    def encode(self, tile_B1DHW: Tensor, origin: tuple[int, int, int]) -> Any:
        """Returns the model's features of a tile; see `Predictor.encode`."""
        # A tile is a view of the scan's planes. Its strides differ from scan to scan, and each would be compiled anew.
        return super().encode(tile_B1DHW.clone(memory_format=torch.contiguous_format), origin)

    def decode(self, features: Any, text_PT: Tensor) -> Tensor:
        """Returns the model's logits of a tile in float32; see `Predictor.decode`.

        Raises:
            InputError: This machine cannot compile the head.
        """
        with compiled_head(), _refused("head"):
            return super().decode(features, text_PT)

    def _convolutions(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()  # the compiler cannot read oneDNN's convolution


@contextlib.contextmanager
def _refused(part: str) -> Iterator[None]:
    """Turns a failed compilation into an `InputError`."""
    try:
        yield
    except (torch._dynamo.exc.TorchDynamoException, torch._inductor.exc.InductorError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        what = " ".join(lines[:2]) or type(error).__name__
        raise InputError(
            f"the {part} cannot be compiled here: {what:.200}",
            hint="install a C++ compiler such as g++, or leave out --compile",
        ) from error


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
