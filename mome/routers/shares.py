"""How a routing divides every token among the experts: the common ground of statistics and pictures.

Shapes: T tokens, E experts; G groups, M tokens of a group, S slots.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mome.routers.routing import Assignments, Routing, Slots, TokenChoice
from mome.routers.slot_attention import token_pieces

_TINY = 1e-20


@torch.no_grad()
def shares_of_tokens(routing: Routing) -> Tensor:
    """The share (T, E) of each expert in a token, float32; rows sum to one, or are zero where a token has no expert.

    It is the router's score where the router has one, else the size of the weight, each divided by the sum over the
    experts. In slots it is the weight with which the token reads the results of an expert's slots.
    """
    if isinstance(routing, Slots):
        return slot_masses(routing)[1]
    given_TE = routing.scores_TE if routing.scores_TE is not None else routing.gates_TE()
    size_TE = given_TE.detach().float().abs()
    return size_TE / size_TE.sum(dim=1, keepdim=True).clamp(min=_TINY)


@torch.no_grad()
def chosen_experts(routing: Routing) -> Tensor:
    """Which experts each token goes to, bool (T, E); every expert in slots, which mix all tokens of a group."""
    tokens, experts = number_of_tokens(routing), routing.counts_E.shape[0]
    chosen_TE = torch.zeros(tokens, experts, dtype=torch.bool, device=routing.counts_E.device)
    match routing:
        case TokenChoice():
            return chosen_TE.scatter_(1, routing.ids_TK, True)
        case Assignments():
            chosen_TE[routing.tokens_N, routing.experts_N] = True
            return chosen_TE
        case Slots():
            return ~chosen_TE
    raise TypeError(f"a routing is a TokenChoice, Assignments or Slots, not a {type(routing).__name__}")


def number_of_tokens(routing: Routing) -> int:
    """T."""
    match routing:
        case TokenChoice():
            return routing.ids_TK.shape[0]
        case Assignments():
            return routing.tokens
        case Slots():
            return routing.keys_GMC.shape[0] * routing.keys_GMC.shape[1]
    raise TypeError(f"a routing is a TokenChoice, Assignments or Slots, not a {type(routing).__name__}")


@torch.no_grad()
def winners(routing: Routing) -> Tensor:
    """The expert that weighs most at each token, int64 (T,); −1 where a token has no expert.

    The weight is that of the routing, and in slots the mass that an expert's slots take from the token. Of equal
    weights the first expert wins.
    """
    if isinstance(routing, Slots):
        return slot_masses(routing)[0].argmax(dim=1)
    chosen_TE = chosen_experts(routing)
    gates_TE = routing.gates_TE().detach().float().masked_fill(~chosen_TE, float("-inf"))
    return gates_TE.argmax(dim=1).masked_fill(~chosen_TE.any(dim=1), -1)


def wins(weights_SV: Tensor) -> Tensor:
    """1 for the row that is largest in each column, else 0: (S, V) float32; rows that are equally large share the 1."""
    is_largest_SV = (weights_SV == weights_SV.amax(dim=0)).float()
    return is_largest_SV / is_largest_SV.sum(dim=0)


@torch.no_grad()
def slot_masses(routing: Slots) -> tuple[Tensor, Tensor]:
    """The masses (T, E), float32, that experts take from tokens and give to them, computed in pieces.

    Returns:
        Dispatch: the mean over an expert's slots of the softmax over a group's tokens; a column sums to the number of
        groups. Combine: the sum over an expert's slots of the softmax over all slots; a row sums to one.
    """
    keys_GMC, queries_SC = routing.keys_GMC.detach(), routing.queries_SC.detach()
    experts = routing.counts_E.shape[0]
    sums = [(keys_GMC[:, at] @ queries_SC.T).logsumexp(dim=1) for at in token_pieces(queries_SC, keys_GMC)]
    log_sum_G1S = torch.stack(sums).logsumexp(dim=0)[:, None]
    dispatch, combine = [], []
    for at in token_pieces(queries_SC, keys_GMC):
        logits_GNS = keys_GMC[:, at] @ queries_SC.T
        dispatch.append((logits_GNS - log_sum_G1S).exp().unflatten(2, (experts, -1)).mean(dim=3))
        combine.append(logits_GNS.softmax(dim=2).unflatten(2, (experts, -1)).sum(dim=3))
    join = routing.groups.join
    return join(torch.cat(dispatch, dim=1)).float(), join(torch.cat(combine, dim=1)).float()
