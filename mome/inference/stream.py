"""Logits of a whole volume as a stream of finished planes, so that no (prompts × volume) tensor is ever stored."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional as F

from mome.errors import InputError
from mome.inference.first_tile import FirstTile
from mome.inference.logit_ring import FinishedPlanes, LogitRing
from mome.inference.predictor import Predictor
from mome.inference.tiles import gaussian_window, tile_starts, tile_steps

# Weights at the border of a tile are a thousandth of those at its centre, and float16 has few digits below 1e-4. A
# power of two changes no other digit of the mean; with a larger one, logits of usual size would not fit.
_HALF_SCALE = 16
Box = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]


@torch.inference_mode()
def stream_planes(
    predictor: Predictor,
    volume: Tensor,
    text_PT: Tensor,
    *,
    axis: int = 0,
    overlap: float = 0.5,
    steps: Sequence[int] | None = None,
    prompt_chunk: int = 32,
    dtype: torch.dtype = torch.float32,
    wanted: Callable[[Box], bool] | None = None,
    origin: Sequence[int] = (0, 0, 0),
    progress: Callable[[int, int], None] | None = None,
    first_tile: FirstTile | None = None,
) -> Iterator[FinishedPlanes]:
    """Yields the planes of the network grid in order; every plane is yielded once.

    Tiles are visited along `axis`, and the buffer holds as many planes as a tile. A tile is encoded once and decoded
    for `prompt_chunk` prompts at a time. Logits are averaged over tiles with Gaussian weights; averaging logits, not
    probabilities, is our choice.

    Args:
        predictor: Computes the logits of a tile.
        volume: (1, 1, D, H, W), windowed HU in [0, 1] on the network grid.
        text_PT: One row per prompt.
        axis: The axis of the volume that tiles are visited along.
        overlap: The share of a tile that its neighbour covers too, 0 to 0.9.
        steps: Voxels (D, H, W) from one tile to the next, where the volume is a part of a larger one whose tiles keep
            their places; None for those of `overlap`.
        prompt_chunk: Prompts that are decoded at once.
        dtype: Type of the sums of weighted logits; float16 halves the memory of the buffer.
        wanted: Says of a tile, given by its first voxels and last voxels + 1, whether it is computed. Voxels that no
            computed tile covers get `OUTSIDE_LOGIT`.
        origin: The volume's first voxel (d, h, w) on the network grid, of which it may be a part.
        progress: Called with (tiles done, number of tiles); tiles that are not wanted are not counted.
        first_tile: Computes the first tile, before the buffer is allocated.

    Raises:
        AnotherPlan: `first_tile` found that another number of prompts or another type fits into memory.
        InputError: The volume is a batch of several, or the overlap is out of range.
    """
    if volume.dim() != 5 or volume.shape[0] != 1:
        raise InputError(f"a volume is (1, 1, D, H, W), got {tuple(volume.shape)}", hint="one volume at a time")
    if not 0 <= overlap <= 0.9:
        raise InputError(f"overlap is from 0 to 0.9, got {overlap}")
    device, patch, size = predictor.device, predictor.patch_size, volume.shape[2:]
    padded = [max(side, p) for side, p in zip(size, patch, strict=True)]
    # F.pad takes the last axis first. Zero is the bottom of the HU window, which is air.
    missing = [whole - side for side, whole in zip(size, padded, strict=True)]
    if any(missing):
        volume = F.pad(volume, [amount for side in reversed(missing) for amount in (0, side)])
    steps = steps or tile_steps(size, patch, overlap)
    tiles = wanted_tiles(size, patch, steps, wanted)
    text_PT, window = text_PT.to(device), gaussian_window(patch).to(device)
    if dtype == torch.float16:
        window *= _HALF_SCALE
    ring: LogitRing | None = None

    def new_ring() -> LogitRing:
        return LogitRing(text_PT.shape[0], padded, patch[axis], axis, device=device, dtype=dtype)

    starts = tile_starts(padded[axis], patch[axis], steps[axis])
    count, total = 0, len(tiles)
    for index, start in enumerate(starts):
        corners = [tile for tile in tiles if tile[axis] == start]
        # One copy for all tiles of these planes: a copy to a GPU waits for what the GPU has still to compute.
        planes = volume.narrow(2 + axis, start, patch[axis]).to(device) if corners else volume
        for corner in corners:
            box = [slice(first, first + side) for first, side in zip(corner, patch, strict=True)]
            box[axis] = slice(None)
            tile, logits = planes[:, :, box[0], box[1], box[2]], None
            d, h, w = (first + at for first, at in zip(origin, corner, strict=True))
            if count == 0 and first_tile is not None:
                features, logits = first_tile.compute(predictor, tile, (d, h, w), text_PT[:prompt_chunk])
            else:
                features = predictor.encode(tile, (d, h, w))
            ring = ring or new_ring()
            for first in range(0, text_PT.shape[0], prompt_chunk):
                chunk = slice(first, first + prompt_chunk)
                if logits is None:
                    logits = predictor.decode(features, text_PT[chunk])
                ring.add(chunk, corner, logits[0], window)
                logits = None
            del features  # else they are held while the next tile is encoded
            ring.add_weight(corner, window)
            count += 1
            if progress is not None:
                progress(count, total)
        # Later tiles do not touch the planes before the next start.
        is_last = index + 1 == len(starts)
        end = start + patch[axis] if is_last else starts[index + 1]
        ring = ring or new_ring()
        if min(end, size[axis]) > start:
            yield FinishedPlanes(ring, start, min(end, size[axis]), tuple(size))
        if not is_last:
            ring.clear(start, end)


def stream_logits(
    predictor: Predictor,
    volume: Tensor,
    text_PT: Tensor,
    *,
    overlap: float = 0.5,
    prompt_chunk: int = 32,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """Yields (first plane, float32 logits (P, n, H, W) of all prompts) along the first axis; see `stream_planes`."""
    planes = stream_planes(predictor, volume, text_PT, overlap=overlap, prompt_chunk=prompt_chunk, progress=progress)
    for finished in planes:
        yield finished.first, finished.logits(slice(None))


def wanted_tiles(
    size: Sequence[int], patch: Sequence[int], steps: Sequence[int], wanted: Callable[[Box], bool] | None = None
) -> list[tuple[int, int, int]]:
    """Returns the first voxels (d, h, w) of the tiles of a volume that are computed.

    Args:
        size: Voxels (D, H, W) of the volume.
        patch: Voxels (D, H, W) of a tile.
        steps: Voxels (D, H, W) from one tile to the next.
        wanted: See `stream_planes`.
    """
    starts = [tile_starts(max(side, p), p, step) for side, p, step in zip(size, patch, steps, strict=True)]
    corners = [(d, h, w) for d, h, w in product(*starts)]
    if wanted is None:
        return corners

    def box_of(corner: tuple[int, int, int]) -> Box:
        first, second, third = ((a, min(a + p, s)) for a, p, s in zip(corner, patch, size, strict=True))
        return first, second, third

    return [corner for corner in corners if wanted(box_of(corner))]
