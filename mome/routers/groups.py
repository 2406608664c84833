"""Groups of voxels, for routers whose choice for one voxel depends on others. Shapes: G groups of M tokens each."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from mome.errors import InputError


@dataclass(frozen=True)
class Groups:
    """The division of the voxels of a map into groups of equal size. No group holds voxels of two samples.

    Attributes:
        batch: Number B of samples.
        sides: (D, H, W), the voxels of a sample along each axis.
        window: Side, in voxels of the map, of the cubes that form the groups; 0 makes each sample one group.
    """

    batch: int
    sides: tuple[int, int, int]
    window: int = 0

    def split(self, x_TC: Tensor) -> Tensor:
        """Tokens in the order of the map (T, C) → tokens by group (G, M, C)."""
        if not self.window:
            return rearrange(x_TC, "(b m) c -> b m c", b=self.batch)
        depth, height, width = (side // self.window for side in self.sides)
        return rearrange(
            x_TC,
            "(b d i h j w k) c -> (b d h w) (i j k) c",
            d=depth, h=height, w=width, i=self.window, j=self.window, k=self.window,
        )  # fmt: skip

    def join(self, x_GMC: Tensor) -> Tensor:
        """The inverse of `split`: (G, M, C) → (T, C)."""
        if not self.window:
            return x_GMC.flatten(0, 1)
        depth, height, width = (side // self.window for side in self.sides)
        return rearrange(
            x_GMC,
            "(b d h w) (i j k) c -> (b d i h j w k) c",
            d=depth, h=height, w=width, i=self.window, j=self.window, k=self.window,
        )  # fmt: skip

    def tokens_GM(self, device: torch.device) -> Tensor:
        """The number of each group's tokens in the order of the map, int64."""
        total = self.batch * self.sides[0] * self.sides[1] * self.sides[2]
        return self.split(torch.arange(total, device=device)[:, None])[..., 0]


def check_window(owner: str, window: int, sides: tuple[int, int, int]) -> None:
    """Checks that windows divide a map.

    Raises:
        InputError: A side of the map is not a multiple of the window.
    """
    if window and any(side % window for side in sides):
        raise InputError(
            f"window={window} of router '{owner}' does not divide a map of {'×'.join(map(str, sides))} voxels",
            hint="use a window that divides every side of every scale's map, or window=0 for the whole patch",
        )


def top_tokens(scores_GXM: Tensor, count: int) -> Tensor:
    """The `count` tokens of highest score in each row, in ascending order; of equal scores the earlier tokens.

    `torch.topk` does not say which of equal scores it takes. The threshold is found first, then the tokens above it and
    the first of those that equal it are kept. All shapes are known beforehand, so this compiles and exports.

    Args:
        scores_GXM: Scores of M tokens in any number of rows. NaN stands below all others.
        count: From 1 to M.

    Returns:
        int64, (G, X, count).
    """
    scores_GXM = torch.where(scores_GXM.isnan(), -torch.inf, scores_GXM)
    threshold = scores_GXM.topk(count, dim=-1).values[..., -1:]
    above, equal = scores_GXM > threshold, scores_GXM == threshold
    wanted = count - above.sum(-1, keepdim=True)
    kept = above | (equal & (equal.cumsum(-1) <= wanted))
    place = torch.where(kept, kept.cumsum(-1) - 1, count)  # the column behind the last one takes what is not kept
    tokens = torch.arange(scores_GXM.shape[-1], device=scores_GXM.device).expand(scores_GXM.shape)
    columns = tokens.new_zeros(*scores_GXM.shape[:-1], count + 1)
    return columns.scatter(-1, place, tokens)[..., :count]


def share_of(tokens: int, share: float) -> int:
    """`share` of a number of tokens, rounded; at least one token and at most all of them."""
    return min(tokens, max(1, round(tokens * share)))
