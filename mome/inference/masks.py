"""From a volume on the network grid to packed masks on the scan's own grid, plane by plane."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from mome.errors import InputError
from mome.inference.above import AboveThreshold
from mome.inference.first_tile import FirstTile
from mome.inference.memory_plan import PROMPTS_AT_ONCE
from mome.inference.network import wait_for
from mome.inference.packed import PackedMasks
from mome.inference.phases import Phases
from mome.inference.planes import ReadyPlanes, plane_stream, shortest_buffer_axis
from mome.inference.predictor import Predictor
from mome.inference.prepared import PreparedPrompts
from mome.inference.probabilities import LOWEST_LOGIT, ProbabilityMaps, quantised
from mome.inference.stream import Box, stream_planes
from mome.volumes import Grid


def predict_masks(
    predictor: Predictor,
    volume: Tensor,
    network: Grid,
    output: Grid,
    prompts: PreparedPrompts,
    *,
    overlap: float = 0.5,
    steps: Sequence[int] | None = None,
    prompt_chunk: int = 32,
    dtype: torch.dtype = torch.float32,
    wanted: Callable[[Box], bool] | None = None,
    origin: Sequence[int] = (0, 0, 0),
    probabilities: ProbabilityMaps | None = None,
    progress: Callable[[int, int], None] | None = None,
    phases: Phases | None = None,
    first_tile: FirstTile | None = None,
) -> PackedMasks:
    """Returns the masks of all prompts: logits averaged over tiles, resampled by affine, thresholded at 0.

    Args:
        predictor: Computes the logits of a tile.
        volume: (1, 1, D, H, W), windowed HU in [0, 1].
        network: The grid of `volume`.
        output: The grid of the masks.
        prompts: Names and embeddings.
        overlap: The share of a tile that its neighbour covers too, 0 to 0.9.
        prompt_chunk: Prompts that are decoded at once.
        steps, dtype, wanted, origin: See `stream_planes`.
        probabilities: Receives the probabilities of the prompts that it names.
        progress: Called with (tiles done, number of tiles).
        phases: Receives the times of the phases `network` and `resample`.
        first_tile: See `stream_planes`.

    Raises:
        AnotherPlan: See `stream_planes`.
        NotFinite: The logits are not finite.
    """
    phases = phases or Phases()
    axis = shortest_buffer_axis(volume.shape[2:], predictor.patch_size)
    count = len(prompts.names)
    chunks = [slice(first, min(first + PROMPTS_AT_ONCE, count)) for first in range(0, count, PROMPTS_AT_ONCE)]
    planes = [plane_stream(network, output, axis) for _ in chunks]
    masks = PackedMasks(prompts.names, output.shape, planes[0].axis)
    stream = stream_planes(
        predictor,
        volume,
        prompts.text_PT,
        axis=axis,
        overlap=overlap,
        steps=steps,
        prompt_chunk=prompt_chunk,
        dtype=dtype,
        wanted=wanted,
        origin=origin,
        progress=progress,
        first_tile=first_tile,
    )
    for finished in stream:
        wait_for(predictor.device)  # else the time of the network would count as that of resampling
        phases.end("network")
        for chunk, held in zip(chunks, planes, strict=True):
            logits = finished.logits(chunk)
            _check_finite(logits)
            ready = held.push(finished.first, logits)
            if ready is not None:
                _write_masks(masks, prompts.names[chunk], ready)
                if probabilities is not None:
                    _write_probabilities(probabilities, masks.axis, prompts.names[chunk], ready)
            del logits, ready  # else they are held while the next tiles are computed
        phases.end("resample")
    return masks


def _write_masks(masks: PackedMasks, names: list[str], ready: ReadyPlanes) -> None:
    """Writes the planes that are ready of some prompts."""
    above = AboveThreshold(ready.source, ready.target, masks.axis, part=ready.between)
    for name, logits_DHW in zip(names, ready.logits, strict=True):
        for first, positive in above.blocks(logits_DHW, lambda logits: logits > 0):
            masks.write_box(name, _moved(first, masks.axis, ready.planes.start), positive)


def _write_probabilities(maps: ProbabilityMaps, axis: int, names: Collection[str], ready: ReadyPlanes) -> None:
    """Writes the planes that are ready of the prompts whose probabilities are asked."""
    above = AboveThreshold(ready.source, ready.target, axis, LOWEST_LOGIT, ready.between)
    for name, logits_DHW in zip(names, ready.logits, strict=True):
        if name not in maps.names:
            continue
        for first, values in above.blocks(logits_DHW, quantised):
            maps.write_box(name, _moved(first, axis, ready.planes.start), values)


def _moved(first: tuple[int, int, int], axis: int, planes: int) -> tuple[int, int, int]:
    """Returns a voxel of a block of planes as a voxel of the scan."""
    moved = list(first)
    moved[axis] += planes
    return moved[0], moved[1], moved[2]


class NotFinite(InputError):
    """Logits are NaN or infinite."""


def _check_finite(logits: Tensor) -> None:
    """Checks logits; NaN > 0 is false, so the masks would be empty without a message.

    Raises:
        NotFinite: One is NaN or infinite.
    """
    if torch.isfinite(logits.sum()):  # NaN and infinity stay in a sum, which needs no memory
        return
    if not torch.isfinite(logits).all():
        raise NotFinite(
            "the network gives numbers that are not finite; no mask can be made of them",
            hint="use precision='fp32' if it is another, else check the model's weights",
        )
