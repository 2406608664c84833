"""What a model costs: its parameters, those that a voxel uses, and the operations of one forward pass.

The forward pass runs on fake tensors, which have shapes but no values. Where the number of computed rows depends on
values, the load is assumed to be even; see `_assume_even_load`.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import NamedTuple, cast

import mome_kernels  # noqa: F401 - registers the formulas of its ops with torch.utils.flop_counter
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mome.errors import InputError
from mome.experts.adaptive import AdaptiveExperts
from mome.experts.base import MapExperts, TokenExperts
from mome.layers.moe import MixtureOfExperts
from mome.map_context import MapContext
from mome.modeling import MoME
from mome.routers.base import Router
from mome.routers.linear_router import best_experts
from mome.routers.relu import ReLURouter
from mome.routers.routing import Assignments, Routing, TokenChoice, count_assignments


class Cost(NamedTuple):
    """The cost of a model for one patch (batch 1), and all its labels as prompts.

    Operations are those of products, convolutions, attention and the ops of `mome_kernels`; a multiplication and an
    addition count as two. Norms, activations, softmaxes and interpolations are not counted.

    Attributes:
        parameters: Numbers that training changes.
        active_parameters: The same without the experts that a voxel does not take, where every expert gets the same
            number of voxels. Experts that read whole maps all run, so all of theirs count.
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
        InputError: What a part computes depends on the values of the tokens or the prompts, as under `label_group`.
    """
    try:
        return _measured(model)
    except (DynamicOutputShapeException, DataDependentOutputException) as error:
        raise InputError(
            "the cost of this model cannot be counted: what one of its parts computes depends on values",
            where=f"experts={model.config.experts['name']}, router={model.config.router['name']}",
            hint="count the model with another router, such as topk",
        ) from error


def _measured(model: MoME) -> Cost:
    config = model.config
    network = copy.deepcopy(model).eval().requires_grad_(False)
    _assume_even_load(network)
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
            prompt_routings = network._decode(features, one).routings
    count = sum(parameter.numel() for parameter in network.parameters())
    return Cost(
        parameters=count,
        active_parameters=count - _idle(network, (*features.routings, *prompt_routings)),
        encoder_parameters=sum(parameter.numel() for parameter in network.encoder.parameters()),
        flops=encoding.get_total_flops() + decoding.get_total_flops(),
        prompt_flops=decoding_one.get_total_flops(),
    )


def _assume_even_load(network: nn.Module) -> None:
    """Makes the number of computed rows independent of values.

    A `relu` router gives every token the k experts that it aims at in the mean; `adaptive` experts get an equal share
    of the assignments each; of the experts that read whole maps all run, as in training.
    """
    for module in network.modules():
        if isinstance(module, MixtureOfExperts) and isinstance(module.router, ReLURouter):
            module.router = _AimedRouter(module.router)
        elif isinstance(module, AdaptiveExperts):
            share = module.nested / module.num_experts
            module.nested_assignments = partial(_even_assignments, share=share)  # type: ignore[method-assign]
        elif isinstance(module, MapExperts):
            module.train()


class _AimedRouter(Router):
    """A `relu` router whose tokens all have the number of experts that it aims at."""

    def __init__(self, relu: ReLURouter) -> None:
        super().__init__()
        self.relu, self.num_experts = relu, relu.num_experts

    def forward(self, x_BDHWC: Tensor, context: MapContext) -> TokenChoice:
        weights_TK, ids_TK = best_experts(self.relu.logits(x_BDHWC.flatten(0, 3)), self.relu.k)
        return TokenChoice(count_assignments(ids_TK, self.num_experts), ids_TK=ids_TK, weights_TK=weights_TK)


def _even_assignments(ids_TK: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Tokens (N,) and places (N,) of a share of all assignments; their values are not read."""
    rows_N = ids_TK.new_empty(round(share * ids_TK.numel()))
    return rows_N, rows_N


def _idle(network: nn.Module, routings: tuple[Routing | None, ...]) -> int:
    """Parameters of the experts that a token does not take, summed over the layers."""
    by_router = {id(routing.router): routing for routing in routings if routing is not None}
    idle = 0
    for layer in network.modules():
        if isinstance(layer, MixtureOfExperts) and isinstance(layer.experts, TokenExperts):
            routing = by_router.get(id(layer.router))
            if routing is not None:
                number = layer.experts.num_experts
                share = min(number, _per_token(routing, number)) / number
                idle += round(_routed_parameters(layer.experts) * (1 - share))
    return idle


def _routed_parameters(experts: TokenExperts) -> int:
    """Parameters that differ between experts: those stacked along dimension 0, of nested experts too."""
    always_on = experts.always_on
    every_voxel = set() if always_on is None else set(always_on.modules())
    bodies = [m for m in experts.modules() if isinstance(m, TokenExperts) and m not in every_voxel]
    stacked = {
        parameter: parameter.numel()
        for body in bodies
        if body.num_experts > 1  # one expert inside others is a base that every voxel takes
        for parameter in body.parameters()
        if parameter.shape[:1] == (body.num_experts,)
    }
    for parameter in () if always_on is None else always_on.parameters():
        stacked.pop(parameter, None)
    return sum(stacked.values())


def _per_token(routing: Routing, experts: int) -> float:
    """Experts per token: those that a token chose, or their mean; all of them where slots mix the tokens."""
    if isinstance(routing, TokenChoice):
        return routing.ids_TK.shape[1]
    if isinstance(routing, Assignments):
        return routing.tokens_N.shape[0] / routing.tokens
    return experts
