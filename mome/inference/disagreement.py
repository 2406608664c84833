"""How much the routers of a model disagree with themselves about which expert should work on a voxel.

For every router, the entropy of its probabilities over the experts is divided by that of equal probabilities: 0 where
one expert has everything, 1 where all are alike. The map is the mean over the routers, on the network grid, and over
the tiles that cover a voxel (our choice). A router without probabilities counts the weights of the chosen experts.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from mome.errors import InputError
from mome.inference.mirror import MirrorPredictor
from mome.inference.predictor import Predictor
from mome.inference.tiles import gaussian_window
from mome.router_names import named_routers
from mome.routers.base import Router
from mome.routers.routing import Routing
from mome.routers.shares import shares_of_tokens
from mome.volumes import Grid, resample

if TYPE_CHECKING:
    from mome.modeling import MoME

# Between the 1st and the 99th percentile, a map with less range than this is called flat (our choice).
_FLAT = 0.05
# Planes of the scan that are resampled at once.
_PLANES_AT_ONCE = 16


def watched_routers(model: nn.Module, predictor: Predictor | None = None) -> dict[str, Router]:
    """Returns the routers whose disagreement can be drawn: those that choose among experts and read no prompt.

    Args:
        model: The model.
        predictor: What computes its tiles; None where nobody has compiled a part of it.

    Raises:
        InputError: There is none, or one is in an encoder that was compiled: its calls cannot be watched.
    """
    routers = named_routers(model)
    if not routers:
        raise InputError(
            "this model has no sparse layer, so no router can disagree",
            hint="leave out disagreement, or choose a model with several experts (`mome info MODEL`)",
        )
    found = {name: router for name, router in routers.items() if not router.reads_prompts and router.num_experts > 1}
    if not found:
        raise InputError(
            "all routers of this model read the prompt, or have one expert: there is no map for all prompts",
            hint="mome inspect shows the experts of every prompt",
        )
    inside = next((name for name in found if name.startswith("encoder.")), None)
    while isinstance(predictor, MirrorPredictor):
        predictor = predictor.inner
    if inside is not None and getattr(predictor, "compiles_encoder", False):
        raise InputError(
            "the encoder is compiled, so what its routers do cannot be seen",
            where=inside,
            hint="leave out compile (--compile) or disagreement",
        )
    return found


class RouterWatch:
    """A predictor that also sums the entropy of the routers, for one volume; logits are those of `inner`.

    Use it as a context manager: inside the block it watches the routers. Of mirrored copies of a tile, the tile itself
    is watched. A tile that is computed again, as where memory was not enough at first, counts once. Other threads may
    run the same model meanwhile: what its routers do there is not watched.

    Args:
        inner: The predictor.
        model: The model whose routers are watched.
        size: Voxels of the volume along each axis.
        origin: The volume's first voxel on the network grid, of which it may be a part.

    Raises:
        InputError: See `watched_routers`.
    """

    def __init__(self, inner: Predictor, model: MoME, size: Sequence[int], origin: Sequence[int] = (0, 0, 0)) -> None:
        self.inner, self._routers, self._origin = inner, watched_routers(model, inner), tuple(origin)
        sides = [max(side, patch) for side, patch in zip(size, inner.patch_size, strict=True)]
        self._size = tuple(size)
        self._sum, self._weight = torch.zeros(sides), torch.zeros(sides)
        self._window = gaussian_window(inner.patch_size)
        self._seen: list[tuple[str, Tensor]] = []
        self._thread: int | None = None  # the one that computes a tile
        self._counted: set[tuple[int, int, int]] = set()  # first voxels of tiles
        self._hooks: list[Any] = []

    @property
    def patch_size(self) -> tuple[int, int, int]:
        """That of the inner predictor."""
        return self.inner.patch_size

    @property
    def device(self) -> torch.device:
        """That of the inner predictor."""
        return self.inner.device

    def __enter__(self) -> RouterWatch:
        for name, router in self._routers.items():
            self._hooks.append(router.register_forward_hook(partial(self._saw, name)))
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def encode(self, tile_B1DHW: Tensor, origin: tuple[int, int, int]) -> Any:
        """Returns the inner features, and adds the entropy of this tile; see `Predictor.encode`."""
        self._seen, self._thread = [], threading.get_ident()
        features = self.inner.encode(tile_B1DHW, origin)
        copies = len(self.inner.flips) if isinstance(self.inner, MirrorPredictor) else 1
        maps = [entropy for _, entropy in self._seen[: len(self._seen) // copies]]
        if maps and origin not in self._counted:
            self._counted.add(origin)
            corner = [at - first for at, first in zip(origin, self._origin, strict=True)]
            place = tuple(slice(a, a + p) for a, p in zip(corner, self.patch_size, strict=True))
            self._sum[place] += torch.stack(maps).mean(dim=0) * self._window
            self._weight[place] += self._window
        return features

    def decode(self, features: Any, text_PT: Tensor) -> Tensor:
        """Returns the inner logits; see `Predictor.decode`."""
        return self.inner.decode(features, text_PT)

    def result(self) -> Tensor:
        """Returns the map (D, H, W) float32 of 0 to 1 on the network grid; 0 where no tile lay.

        Raises:
            InputError: No router gave a map of a tile.
        """
        if not self._weight.any():
            raise InputError(
                "the routers of this model work on tokens that are no map of the tile, so nothing can be drawn",
                hint="leave out disagreement",
            )
        mean = torch.where(self._weight > 0, self._sum / self._weight.clamp(min=1e-12), torch.zeros(()))
        return mean[tuple(slice(side) for side in self._size)]

    def notes(self) -> list[str]:
        """Returns a sentence where the map says nothing, because the routers treat all voxels alike."""
        values = self.result()[self._weight[tuple(slice(side) for side in self._size)] > 0]
        low, high = (float(torch.quantile(values[:: max(1, len(values) // 100_000)], q)) for q in (0.01, 0.99))
        if high - low >= _FLAT:
            return []
        return [
            f"router disagreement is nearly the same everywhere, {low:.2f} to {high:.2f} of 1: this map does not tell "
            "sure voxels from unsure ones"
        ]

    def _saw(self, name: str, router: nn.Module, given: tuple[Any, ...], routing: Routing) -> None:
        """Keeps the entropy of a tile, each voxel of the router's map repeated over the voxels that it stands for."""
        if threading.get_ident() != self._thread:
            return
        x_BDHWC, context = given
        sides, stride = tuple(x_BDHWC.shape[1:4]), tuple(context.stride)
        spans = tuple(side * step for side, step in zip(sides, stride, strict=True))
        if spans != tuple(self.patch_size) or x_BDHWC.shape[0] != 1:
            return
        entropy = relative_entropy(shares_of_tokens(routing)).view(sides).cpu()
        for axis, step in enumerate(stride):
            entropy = entropy.repeat_interleave(step, dim=axis)
        self._seen.append((name, entropy))


def relative_entropy(shares_TE: Tensor) -> Tensor:
    """Returns −Σ p log p / log E of every row, from 0 to 1: (T, E) → (T,). A row of zeros gives 0."""
    terms_TE = torch.special.entr(shares_TE.float())
    return (terms_TE.sum(dim=1) / math.log(shares_TE.shape[1])).clamp(0, 1)


def on_scan(entropy: Tensor, network: Grid, scan: Grid) -> np.ndarray:
    """Returns a map of 0 to 1 on the scan's grid, times 255, uint8 (i, j, k); it is resampled in blocks of planes."""
    out = np.zeros(scan.shape, dtype=np.uint8)
    for start in range(0, scan.shape[2], _PLANES_AT_ONCE):
        stop = min(start + _PLANES_AT_ONCE, scan.shape[2])
        block = resample(entropy, network, scan.crop(2, start, stop), antialias=False)
        out[:, :, start:stop] = block.mul(255).round_().clamp_(0, 255).to(torch.uint8).numpy()
    return out
