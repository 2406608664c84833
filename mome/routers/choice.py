"""Which experts of a token have the highest scores, the same on every device."""

from __future__ import annotations

import torch
from torch import Tensor

_MOST_MAXIMA = 4  # up to so many maxima one after the other take less time than a sort


def chosen_experts(scores_TE: Tensor, k: int) -> Tensor:
    """The k experts of highest score of every token, best first; of equal scores the lower numbers first.

    `torch.topk` does not say which of equal scores it takes: a CPU takes others than a GPU does. All experts of a token
    of zeros have the same score, so that masks would depend on the device.

    Args:
        scores_TE: Scores (…, E). NaN stands above all others. At least k of a token are above −∞, or NaN.
        k: From 1 to E.

    Returns:
        int64, (…, k).
    """
    scores_TE = scores_TE.detach()
    if k > _MOST_MAXIMA:
        return torch.sort(scores_TE, dim=-1, descending=True, stable=True).indices[..., :k]
    chosen = [scores_TE.max(dim=-1, keepdim=True).indices]  # the first of several maxima, as torch promises
    while len(chosen) < k:
        scores_TE = scores_TE.scatter(-1, chosen[-1], -torch.inf)
        chosen.append(scores_TE.max(dim=-1, keepdim=True).indices)
    return torch.cat(chosen, dim=-1)
