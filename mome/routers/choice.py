"""Which experts of a token have the highest scores, the same on every device."""

from __future__ import annotations

import torch
from torch import Tensor


def ids_of_best(scores_TE: Tensor, k: int) -> Tensor:
    """The k experts of highest score of every token, best first; of equal scores the lower numbers first.

    `torch.topk` does not say which of equal scores it takes: a CPU takes others than a GPU does. All experts of a token
    of zeros have the same score, so that masks would depend on the device. For the one or two experts of most routers,
    maxima one after the other take no longer.

    Args:
        scores_TE: Scores (…, E). NaN stands above all others. At least k of a token are above −∞, or NaN.
        k: From 1 to E.

    Returns:
        int64, (…, k).
    """
    scores_TE = scores_TE.detach()
    best = [scores_TE.max(dim=-1, keepdim=True).indices]  # the first of several maxima, as torch promises
    while len(best) < k:
        scores_TE = scores_TE.scatter(-1, best[-1], -torch.inf)
        best.append(scores_TE.max(dim=-1, keepdim=True).indices)
    return torch.cat(best, dim=-1)
