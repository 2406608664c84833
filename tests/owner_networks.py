"""Networks of other projects with random weights, and the maps that their own forward makes."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn


def randomise(network: nn.Module) -> nn.Module:
    """Gives every tensor random values; norms keep positive scales, so that no map vanishes."""
    torch.manual_seed(3)
    for name, tensor in (*network.named_parameters(), *network.named_buffers()):
        if tensor.is_floating_point():
            if name.endswith("running_var"):
                tensor.data.uniform_(0.5, 1.5)
            elif tensor.dim() > 1:
                tensor.data.mul_(1.0 + 0.1 * torch.randn_like(tensor))
            else:
                tensor.data.add_(0.1 * torch.randn_like(tensor))
    return network.eval()


def owner_maps(network: nn.Module, names: list[str], x: Tensor) -> list[Tensor]:
    """What the modules return in the owner's forward; a name that ends in < stands for what the module reads."""
    found: dict[str, Tensor] = {}

    def keep(name: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        found[name] = (inputs[0] if name.endswith("<") else output).clone()

    for name in names:
        network.get_submodule(name.rstrip("<")).register_forward_hook(partial(keep, name))
    with torch.no_grad():
        network(x)
    return [found[name] for name in names]
