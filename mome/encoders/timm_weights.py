"""Loads weights of timm into a `timm` encoder: the user makes timm's network, and so sees any download."""

from __future__ import annotations

import torch
from torch import nn

from mome.encoders.inflate import inflated_kernels
from mome.encoders.timm import Timm
from mome.errors import InputError


def load_timm_weights(encoder: nn.Module, source: nn.Module) -> list[str]:
    """Copies the weights of a timm network into the encoder; kernels are inflated where its mode says so.

    ```python
    model = create_model("mome_ct_tiny", encoder="timm(model='resnet18')")
    source = timm.create_model("resnet18", pretrained=True, features_only=True, in_chans=1)  # downloads from the Hub
    load_timm_weights(model.encoder, source)
    ```

    Args:
        encoder: `model.encoder` of a model with a `timm` encoder.
        source: timm's network of the same name, made with `features_only=True` and as many `in_chans` as
            `encoder.network_channels`; timm adapts its first layer to them.

    Returns:
        The names of the tensors that were copied, those of `encoder.network`.

    Raises:
        InputError: The encoder is another one, or a tensor has no counterpart of its name and shape. Nothing is copied
            then.
    """
    if not isinstance(encoder, Timm):
        raise InputError(
            f"weights of timm fit a timm encoder, not {type(encoder).__name__}",
            hint="encoder=\"timm(model='resnet18')\"",
        )
    inflated = encoder.config.mode == "inflate"
    given = dict(inflated_kernels(source, encoder.config.slice_axis)) if inflated else source.state_dict()
    own = encoder.network.state_dict()
    wrong = sorted(key for key in own if key not in given or given[key].shape != own[key].shape)
    if wrong:
        key = wrong[0]
        found = tuple(given[key].shape) if key in given else "none"
        raise InputError(
            f"{len(wrong)} of {len(own)} tensors do not fit: '{key}' is {tuple(own[key].shape)}, in the source {found}",
            hint=f"timm.create_model('{encoder.config.model}', pretrained=True, features_only=True, "
            f"in_chans={encoder.network_channels})",
        )
    with torch.no_grad():
        for key, tensor in own.items():
            tensor.copy_(given[key])
    return list(own)
