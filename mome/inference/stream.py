"""Logits of a whole volume as a stream of finished planes; no tensor of (prompts × volume) ever exists."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from mome.inference.tiles import gaussian_window, tile_starts

if TYPE_CHECKING:
    from mome.modeling import MoME


@torch.inference_mode()
def stream_logits(
    model: MoME,
    volume: Tensor,
    text_PT: Tensor,
    *,
    patch: tuple[int, int, int],
    overlap: float = 0.5,
    prompt_chunk: int = 32,
    autocast: torch.dtype | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """Yields (first plane, logits (P, n, H, W)), from plane 0 to the last, each plane once.

    Tiles are visited along the first axis; the buffer holds one tile's depth of planes. A tile is encoded once
    and decoded for `prompt_chunk` prompts at a time. Logits, not probabilities, are averaged.

    Args:
        model: In eval mode.
        volume: (1, 1, D, H, W) on the network grid.
        text_PT: Rows of the prompts.
        patch: Voxels of a tile.
        overlap: Share of a tile that its neighbour covers too.
        autocast: Lower precision of the network; the buffer stays float32.
        progress: Called with (tiles done, tiles in all).
    """
    device = next(model.parameters()).device
    size = volume.shape[2:]
    grown = [max(side, p) for side, p in zip(size, patch, strict=True)]
    padding = [value for side, goal in zip(reversed(size), reversed(grown), strict=True) for value in (0, goal - side)]
    volume = F.pad(volume, padding)  # 0 is the bottom of the HU window: air
    starts = [tile_starts(side, p, overlap) for side, p in zip(grown, patch, strict=True)]
    window = gaussian_window(patch).to(device)
    text_PT = text_PT.to(device)
    prompts = text_PT.shape[0]
    total = torch.zeros(prompts, patch[0], grown[1], grown[2], device=device)
    weight = torch.zeros(patch[0], grown[1], grown[2], device=device)
    count, tiles = 0, len(starts[0]) * len(starts[1]) * len(starts[2])
    for index, d in enumerate(starts[0]):
        for h in starts[1]:
            for w in starts[2]:
                tile = volume[:, :, d : d + patch[0], h : h + patch[1], w : w + patch[2]].to(device)
                where = (slice(None), slice(None), slice(h, h + patch[1]), slice(w, w + patch[2]))
                with _precision(device, autocast):
                    features = model.encode(tile)
                    for start in range(0, prompts, prompt_chunk):
                        chunk = slice(start, start + prompt_chunk)
                        logits = model.decode(features, text_PT[chunk])[0].float()
                        total[chunk][where] += logits * window
                weight[where[1:]] += window
                count += 1
                if progress is not None:
                    progress(count, tiles)
        following = starts[0][index + 1] if index + 1 < len(starts[0]) else d + patch[0]
        done = following - d
        finished = (total[:, :done] / weight[:done])[:, : max(0, size[0] - d), : size[1], : size[2]]
        if finished.shape[1]:
            yield d, finished
        # the planes that later tiles still touch move to the front
        total = torch.cat([total[:, done:], torch.zeros_like(total[:, :done])], dim=1)
        weight = torch.cat([weight[done:], torch.zeros_like(weight[:done])])


def _precision(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[None]:
    return torch.autocast(device.type, dtype) if dtype is not None else nullcontext()
