"""Fills the experts of a sparse layer with the weights of the dense layer that it replaces (sparse upcycling).

Each expert starts as a copy of the dense layer (Komatsuzaki et al. 2022, arXiv 2212.05055). Where the router's weights
sum to one for every token, the outputs are those of the dense layer.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from mome.errors import InputError
from mome.experts.mlp import FeedForwardExperts
from mome.layers.feed_forward import FeedForward
from mome.layers.moe import MixtureOfExperts
from mome.map_context import MapContext

# Largest difference between the sparse and the dense layer, as a share of the largest output.
_TOLERANCE = 1e-4


class DenseWeights(NamedTuple):
    """A feed-forward layer: y = W₂ act(W₁ x + b₁) + b₂, where gated with the rows of the gate before the values.

    Attributes:
        up_FD, up_bias_F: The first layer, of 2F rows where gated; the bias may be None.
        down_DF, down_bias_D: The second layer.
        activation: A name of the experts' activations.
        gated: Whether the hidden layer is gated.
    """

    up_FD: Tensor
    up_bias_F: Tensor | None
    down_DF: Tensor
    down_bias_D: Tensor | None
    activation: str
    gated: bool


def dense_weights(module: nn.Module, where: str) -> DenseWeights:
    """Reads the weights of a dense feed-forward layer.

    Args:
        module: A `FeedForward`, MONAI's `MLPBlock` with GELU, or a mixture of one expert.
        where: The module's name, for the message.

    Raises:
        InputError: The module is none of these.
    """
    if isinstance(module, FeedForward):
        up, down = module.up, module.down
        return DenseWeights(up.weight, up.bias, down.weight, down.bias, module.activation, module.gated)
    if isinstance(module, MixtureOfExperts) and isinstance(module.experts, FeedForwardExperts):
        if module.experts.num_experts == 1:
            e = module.experts
            up_bias, down_bias = (None if bias is None else bias[0] for bias in (e.up_bias, e.down_bias))
            return DenseWeights(e.up_weight[0], up_bias, e.down_proj[0], down_bias, e.activation, e.gated)
    first, second = getattr(module, "linear1", None), getattr(module, "linear2", None)
    activation = getattr(module, "fn", None)
    if (
        isinstance(first, nn.Linear)
        and isinstance(second, nn.Linear)
        and isinstance(activation, nn.GELU)
        and activation.approximate == "none"
        and first.out_features == second.in_features
    ):
        return DenseWeights(first.weight, first.bias, second.weight, second.bias, "gelu", False)
    raise InputError(
        f"{type(module).__name__} is no dense feed-forward layer that experts could start from",
        where=where,
        hint="upcycle a model whose layer of this name is dense",
    )


@torch.no_grad()
def fill_experts(mixture: nn.Module, dense: DenseWeights, where: str) -> None:
    """Copies a dense layer into each expert.

    Args:
        mixture: A mixture of `mlp`, `swiglu` or `geglu` experts.
        dense: The layer.
        where: The mixture's name, for messages.

    Raises:
        InputError: The experts have another form, activation or width than the dense layer.
    """
    is_moe = isinstance(mixture, MixtureOfExperts)  # that of a scale has no feed_forward argument around it
    if not is_moe or not isinstance(mixture.experts, FeedForwardExperts):
        raise InputError(
            "only experts mlp, swiglu and geglu of a moe layer can start from a dense layer",
            where=where,
            hint=f"experts={_form(dense)}" if is_moe else f"feed_forward=moe(experts={_form(dense)})",
        )
    experts = mixture.experts
    wanted = {
        "gate": (experts.gated, dense.gated),
        "activation": (experts.activation, dense.activation),
        "shape of the first layer": (tuple(experts.up_weight.shape[1:]), tuple(dense.up_FD.shape)),
        "shape of the second layer": (tuple(experts.down_proj.shape[1:]), tuple(dense.down_DF.shape)),
        "bias": (experts.up_bias is not None, dense.up_bias_F is not None),
    }
    for what, (own, given) in wanted.items():
        if own != given:
            raise InputError(
                f"the experts cannot start from the dense layer: {what} is {own} in the experts, {given} in the layer",
                where=where,
                hint=f"experts={_form(dense)}",
            )
    experts.up_weight.copy_(dense.up_FD.expand_as(experts.up_weight))
    experts.down_proj.copy_(dense.down_DF.expand_as(experts.down_proj))
    if experts.up_bias is not None and experts.down_bias is not None:
        assert dense.up_bias_F is not None and dense.down_bias_D is not None
        experts.up_bias.copy_(dense.up_bias_F.expand_as(experts.up_bias))
        experts.down_bias.copy_(dense.down_bias_D.expand_as(experts.down_bias))


@torch.no_grad()
def check_same_outputs(mixture: MixtureOfExperts, dense: nn.Module, where: str, context: MapContext) -> None:
    """Checks on 64 random tokens that a filled mixture gives the outputs of the dense layer.

    Args:
        mixture: The mixture, in eval.
        dense: The dense layer, in eval; a mixture of one expert, or a module that maps tokens to tokens.
        where: The mixture's name, for the message.
        context: A prompt, for a router that reads prompts.

    Raises:
        InputError: They differ, because the router's weights do not sum to one for every token.
    """
    weight = next(dense.parameters())
    width = next(m for m in mixture.modules() if isinstance(m, FeedForwardExperts)).down_proj.shape[1]
    generator = torch.Generator().manual_seed(0)
    x_BDHWC = torch.randn(1, 4, 4, 4, width, generator=generator).to(weight.device, weight.dtype)
    got, _ = mixture(x_BDHWC, context)
    want = dense(x_BDHWC, context)[0] if isinstance(dense, MixtureOfExperts) else dense(x_BDHWC)
    tolerance = max(_TOLERANCE, 4 * torch.finfo(weight.dtype).eps) * want.abs().max().clamp(min=1e-6)
    if (got - want).abs().max() > tolerance:
        raise InputError(
            "the layer does not start with the outputs of the dense layer: its router's weights do not sum to one",
            where=where,
            hint="router=topk(k=2), whose weights are normalised",
        )


def _form(dense: DenseWeights) -> str:
    """Experts that can start from the layer, as a config string."""
    hidden, bias = dense.down_DF.shape[1], dense.up_bias_F is not None
    if not dense.gated:
        name, usual_activation, usual_bias = "mlp", "gelu", True
    else:
        name, usual_bias = ("geglu" if dense.activation == "gelu" else "swiglu"), False
        usual_activation = "gelu" if name == "geglu" else "silu"
    extra = f", activation='{dense.activation}'" if dense.activation != usual_activation else ""
    extra += f", bias={bias}" if bias != usual_bias else ""
    return f"{name}(n=8, hidden={hidden}{extra})"
