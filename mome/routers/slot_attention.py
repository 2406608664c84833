"""Attention between many tokens and few slots without the matrix of their logits. Shapes: groups G, tokens M, slots S.

torch's attention op has both directions. It is used from slots to tokens, where the tokens are its queries. From tokens
to slots it has few queries, which it spreads over too few cores on CPUs and GPUs; there the sums run in pieces.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import gcd
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

# Elements of the logits of one piece of tokens; 8 MB in float32.
_PIECE_ELEMENTS = 2**21


def slots_of_tokens(queries_SC: Tensor, keys_GMC: Tensor, x_GMC: Tensor) -> Tensor:
    """softmax over M (queries · keysᵀ) · x: (G, S, C), all in one type."""
    with torch.autocast(x_GMC.device.type, enabled=False):
        slots_GSC, _ = _SlotsOfTokens.apply(queries_SC, keys_GMC, x_GMC)
    return slots_GSC


def tokens_of_slots(queries_SC: Tensor, keys_GMC: Tensor, y_GSC: Tensor) -> Tensor:
    """softmax over S (keys · queriesᵀ) · y: (G, M, C), all in one type."""
    groups, tokens, width = keys_GMC.shape
    # Tokens do not depend on each other here. On CPUs the op runs on as many cores as it has pieces.
    pieces = gcd(tokens, 64)
    keys_NMC = keys_GMC.reshape(groups * pieces, tokens // pieces, width)
    queries_NSC = queries_SC.expand(groups * pieces, -1, -1)
    y_NSC = y_GSC[:, None].expand(-1, pieces, -1, -1).flatten(0, 1)
    with torch.autocast(y_GSC.device.type, enabled=False):  # the op wants a second axis, for heads
        result_N1MC = F.scaled_dot_product_attention(keys_NMC[:, None], queries_NSC[:, None], y_NSC[:, None], scale=1.0)
    return result_N1MC.reshape(groups, tokens, -1)


class _SlotsOfTokens(torch.autograd.Function):
    """`slots_of_tokens` and the logarithm of its denominators; the backward pass computes the logits again."""

    @staticmethod
    def forward(queries_SC: Tensor, keys_GMC: Tensor, x_GMC: Tensor) -> tuple[Tensor, Tensor]:
        sums = [_logits(queries_SC, keys_GMC[:, at]).logsumexp(dim=2) for at in token_pieces(queries_SC, keys_GMC)]
        log_sum_GS1 = torch.stack(sums).logsumexp(dim=0)[..., None]
        slots_GSC = x_GMC.new_zeros(x_GMC.shape[0], queries_SC.shape[0], x_GMC.shape[2])
        for at in token_pieces(queries_SC, keys_GMC):
            slots_GSC += (_logits(queries_SC, keys_GMC[:, at]) - log_sum_GS1).exp() @ x_GMC[:, at]
        return slots_GSC, log_sum_GS1

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*inputs, *output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_GSC: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        queries_SC, keys_GMC, x_GMC, slots_GSC, log_sum_GS1 = ctx.saved_tensors
        grad_queries, grad_keys, grad_x = (torch.zeros_like(given) for given in (queries_SC, keys_GMC, x_GMC))
        mean_GS1 = (grad_GSC * slots_GSC).sum(dim=2, keepdim=True)
        with torch.autocast(x_GMC.device.type, enabled=False):  # backward may be called inside autocast
            for at in token_pieces(queries_SC, keys_GMC):
                weights_GSN = (_logits(queries_SC, keys_GMC[:, at]) - log_sum_GS1).exp()
                grad_x[:, at] = weights_GSN.transpose(1, 2) @ grad_GSC
                grad_logits_GSN = weights_GSN.mul_(grad_GSC @ x_GMC[:, at].transpose(1, 2) - mean_GS1)
                grad_keys[:, at] = grad_logits_GSN.transpose(1, 2) @ queries_SC
                grad_queries += (grad_logits_GSN @ keys_GMC[:, at]).sum(dim=0)
        return grad_queries, grad_keys, grad_x


def token_pieces(queries_SC: Tensor, keys_GMC: Tensor) -> Iterator[slice]:
    """Returns slices of the tokens of every group, so that the logits of one take 8 MB in float32.

    Args:
        queries_SC: The queries of the slots.
        keys_GMC: The keys of the tokens.
    """
    groups, tokens = keys_GMC.shape[:2]
    size = max(1, _PIECE_ELEMENTS // (groups * queries_SC.shape[0]))
    return (slice(start, min(start + size, tokens)) for start in range(0, tokens, size))


def _logits(queries_SC: Tensor, keys_GNC: Tensor) -> Tensor:
    return queries_SC @ keys_GNC.transpose(1, 2)
