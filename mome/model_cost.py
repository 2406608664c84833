"""What a model costs: its parameters, those that a voxel uses, and the operations of one forward pass.

The forward pass runs on fake tensors, which have shapes but no values.
"""

from __future__ import annotations

import copy
from typing import NamedTuple, cast

import mome_kernels  # noqa: F401 - registers the formulas of its ops with torch.utils.flop_counter
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mome.experts.base import TokenExperts
from mome.layers.moe import MixtureOfExperts
from mome.modeling import MoME
from mome.routers.routing import Assignments, Routing, TokenChoice


class Cost(NamedTuple):
    """The cost of a model for one patch (batch 1), and all its labels as prompts.

    Operations are those of products, convolutions, attention and the ops of `mome_kernels`; a multiplication and an
    addition count as two. Norms, activations, softmaxes and interpolations are not counted.

    Attributes:
        parameters: Numbers that training changes.
        active_parameters: The same without the experts that a voxel does not take. Experts that read whole maps all
            run, so all of theirs count.
        encoder_parameters: Those of the vision encoder.
        flops: Operations of `encode` once and `decode` for all labels.
        prompt_flops: Operations of `decode` for one prompt more.
    """

    parameters: int
    active_parameters: int
    encoder_parameters: int
    flops: int
    prompt_flops: int


def measure(model: MoME) -> Cost:
    """Measures a model at its own patch size; the model itself is left as it is.

    Raises:
        NotImplementedError: A router's number of assignments depends on the values of the tokens.
    """
    config = model.config
    network = copy.deepcopy(model).eval().requires_grad_(False)
    nn.Module.to(network, torch.device("meta"))
    # The network moves to fake tensors of the CPU, because autocast does not know the meta device.
    with FakeTensorMode(allow_non_fake_inputs=True), sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        network.to_empty(device="cpu")
        volume = torch.empty(1, config.in_channels, *config.patch_size)
        one, all_prompts = (torch.empty(n, cast("int", config.text_dim)) for n in (1, max(1, len(config.labels))))
        with FlopCounterMode(display=False) as encoding:
            features = network.encode(volume)
        with FlopCounterMode(display=False) as decoding:
            network.decode(features, all_prompts)
        with FlopCounterMode(display=False) as decoding_one:
            network.decode(features, one)
    count = sum(parameter.numel() for parameter in network.parameters())
    return Cost(
        parameters=count,
        active_parameters=count - _idle(network, features.routings),
        encoder_parameters=sum(parameter.numel() for parameter in network.encoder.parameters()),
        flops=encoding.get_total_flops() + decoding.get_total_flops(),
        prompt_flops=decoding_one.get_total_flops(),
    )


def _idle(network: nn.Module, routings: tuple[Routing | None, ...]) -> int:
    """Parameters of the experts that a token does not take, summed over the layers."""
    by_router = {id(routing.router): routing for routing in routings if routing is not None}
    idle = 0
    for layer in network.modules():
        if isinstance(layer, MixtureOfExperts) and isinstance(layer.experts, TokenExperts):
            routing = by_router.get(id(layer.router))
            if routing is not None:
                number = layer.experts.num_experts
                stacked = sum(p.numel() for p in layer.experts.parameters() if p.shape[:1] == (number,))
                idle += round(stacked * (1 - min(number, _per_token(routing, number)) / number))
    return idle


def _per_token(routing: Routing, experts: int) -> float:
    """Experts per token: those that a token chose, or their mean; all of them where slots mix the tokens."""
    if isinstance(routing, TokenChoice):
        return routing.ids_TK.shape[1]
    if isinstance(routing, Assignments):
        return routing.tokens_N.shape[0] / routing.tokens
    return experts
