"""Logits of a whole volume as a stream of finished planes, so that no (prompts × volume) tensor is ever stored."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from mome.errors import InputError
from mome.inference.predictor import Predictor
from mome.inference.tiles import gaussian_window, tile_starts


@torch.inference_mode()
def stream_logits(
    predictor: Predictor,
    volume: Tensor,
    text_PT: Tensor,
    *,
    overlap: float = 0.5,
    prompt_chunk: int = 32,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """Yields (first plane, float32 logits (P, n, H, W)) from plane 0 to the last; every plane is yielded once.

    Tiles are visited along the first axis, and the buffer holds as many planes as a tile. A tile is encoded once and
    decoded for `prompt_chunk` prompts at a time. Logits are averaged over tiles with Gaussian weights; averaging
    logits, not probabilities, is our choice.

    Args:
        predictor: Computes the logits of a tile.
        volume: (1, 1, D, H, W), windowed HU in [0, 1] on the network grid.
        text_PT: One row per prompt.
        overlap: The share of a tile that its neighbour covers too, 0 to 0.9.
        prompt_chunk: Prompts that are decoded at once.
        progress: Called with (tiles done, number of tiles).

    Raises:
        InputError: The volume is a batch of several, or the overlap is out of range.
    """
    if volume.dim() != 5 or volume.shape[0] != 1:
        raise InputError(f"a volume is (1, 1, D, H, W), got {tuple(volume.shape)}", hint="one volume at a time")
    if not 0 <= overlap <= 0.9:
        raise InputError(f"overlap is from 0 to 0.9, got {overlap}")
    device, patch, size = predictor.device, predictor.patch_size, volume.shape[2:]
    padded_size = [max(side, p) for side, p in zip(size, patch, strict=True)]
    # F.pad takes the last axis first. Zero is the bottom of the HU window, which is air.
    missing = [padded - side for side, padded in zip(size, padded_size, strict=True)]
    volume = F.pad(volume, [amount for axis in reversed(missing) for amount in (0, axis)])
    starts = [tile_starts(side, p, overlap) for side, p in zip(padded_size, patch, strict=True)]
    window = gaussian_window(patch).to(device)
    text_PT = text_PT.to(device)
    prompts = text_PT.shape[0]
    total = torch.zeros(prompts, patch[0], padded_size[1], padded_size[2], device=device)
    weight = torch.zeros(patch[0], padded_size[1], padded_size[2], device=device)
    count, tiles = 0, len(starts[0]) * len(starts[1]) * len(starts[2])
    for index, d in enumerate(starts[0]):
        for h in starts[1]:
            for w in starts[2]:
                tile = volume[:, :, d : d + patch[0], h : h + patch[1], w : w + patch[2]].to(device)
                region = (slice(None), slice(None), slice(h, h + patch[1]), slice(w, w + patch[2]))
                features = predictor.encode(tile, (d, h, w))
                for start in range(0, prompts, prompt_chunk):
                    chunk = slice(start, start + prompt_chunk)
                    total[chunk][region] += predictor.decode(features, text_PT[chunk])[0] * window
                weight[region[1:]] += window
                count += 1
                if progress is not None:
                    progress(count, tiles)
        next_start = starts[0][index + 1] if index + 1 < len(starts[0]) else d + patch[0]
        done = next_start - d  # later tiles do not touch these planes
        finished = (total[:, :done] / weight[:done])[:, : max(0, size[0] - d), : size[1], : size[2]]
        if finished.shape[1]:
            yield d, finished
        total = torch.cat([total[:, done:], torch.zeros_like(total[:, :done])], dim=1)
        weight = torch.cat([weight[done:], torch.zeros_like(weight[:done])])
