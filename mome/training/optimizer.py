"""AdamW for a model, and its learning rate at every step."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mome.training.config import TrainConfig


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """Returns AdamW with weight decay for matrices and convolution kernels; other parameters do not decay.

    Biases that are stacked by expert, (E, D), have two dimensions and are no matrices: their names tell them apart.
    Parameters without gradients are left out. Parameters with another `rate_factor`, which scales the learning rate,
    have groups of their own; see `part_factors` and, for a `layer_decay` below 1, `layer_factors`.
    """
    factors = layer_factors(model, config.layer_decay)
    for parameter, factor in part_factors(model).items():
        factors[parameter] = factors.get(parameter, 1.0) * factor
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = []
    for factor in dict.fromkeys([1.0, *factors.values()]):
        members = [(name, parameter) for name, parameter in named if factors.get(parameter, 1.0) == factor]
        for matrices, decay in ((True, config.weight_decay), (False, 0.0)):
            chosen = [parameter for name, parameter in members if _is_matrix(name, parameter) == matrices]
            groups.append({"params": chosen, "weight_decay": decay, "rate_factor": factor})
    # Of a spread model, experts and the other parameters lie on different groups of processes, which the batched
    # operations of `foreach` cannot mix.
    foreach = False if any(isinstance(parameter, DTensor) for parameter in model.parameters()) else None
    return torch.optim.AdamW(groups, lr=config.learning_rate, foreach=foreach)


def _is_matrix(name: str, parameter: Tensor) -> bool:
    """Says whether a parameter is a matrix or a kernel, or a stack of them."""
    return parameter.ndim >= 2 and "bias" not in name.rpartition(".")[2]


def part_factors(model: nn.Module) -> dict[Tensor, float]:
    """Returns the factors of the learning rate that the parts of a model ask for.

    A part has a method `rate_factors`, which returns them for its parameters.
    """
    factors: dict[Tensor, float] = {}
    for module in model.modules():
        asked = getattr(module, "rate_factors", None)
        if callable(asked):
            factors |= asked()
    return factors


def layer_factors(model: nn.Module, decay: float) -> dict[Tensor, float]:
    """Returns the factor of the learning rate of every parameter of the encoder: decay^(L − l) in layer l of L.

    Layer-wise decay of BEiT (Bao et al. 2022, arXiv 2106.08254, appendix) and ELECTRA, here for any encoder. Its
    layers are its modules in the order in which they are registered, lists and sequences counted by their members (our
    choice); l counts from 0, so that the layers behind the encoder, whose factor is 1, would be layer L.

    Args:
        model: A model; one without an encoder has no factors.
        decay: From 0 to 1; 1 gives no factors.
    """
    encoder = getattr(model, "encoder", None)
    if encoder is None or decay == 1:
        return {}
    layers = list(_layers(encoder))
    factors: dict[Tensor, float] = dict.fromkeys(encoder.parameters(), decay ** len(layers))
    for number, layer in enumerate(layers):
        factors |= dict.fromkeys(layer.parameters(), decay ** (len(layers) - number))
    return factors


def _layers(module: nn.Module) -> Iterator[nn.Module]:
    """Yields the layers of an encoder that hold parameters, in the order in which they are registered.

    Lists and sequences are looked into, and so is a module that wraps a single other one.
    """
    holders = [child for child in module.children() if any(True for _ in child.parameters())]
    for child in holders:
        is_list = isinstance(child, nn.ModuleList | nn.ModuleDict | nn.Sequential)
        if (is_list or len(holders) == 1) and any(True for _ in child.children()):
            yield from _layers(child)
        else:
            yield child


def learning_rate(step: int, steps: int, peak: float, warmup: float) -> float:
    """Returns the learning rate of one step: a linear warm-up, then a cosine to zero.

    It depends on the step alone, so a resumed run needs no scheduler state.

    Args:
        step: Number of the step, from 0.
        steps: Steps of the whole run.
        peak: Largest learning rate.
        warmup: Share of the steps that warm up.
    """
    warm = max(1, round(steps * warmup))
    if step < warm:
        return peak * (step + 1) / warm
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Sets the learning rate of every parameter group, scaled by its factor."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["rate_factor"]
