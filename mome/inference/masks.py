"""From a volume on the network grid to packed masks on the scan's own grid, plane by plane."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mome.errors import InputError
from mome.inference.packed import PackedMasks
from mome.inference.phases import Phases
from mome.inference.planes import PlaneStream
from mome.inference.predictor import Predictor
from mome.inference.prepared import PreparedPrompts
from mome.inference.stream import stream_logits
from mome.volumes import Grid


def predict_masks(
    predictor: Predictor,
    volume: Tensor,
    network: Grid,
    output: Grid,
    prompts: PreparedPrompts,
    *,
    overlap: float = 0.5,
    prompt_chunk: int = 32,
    progress: Callable[[int, int], None] | None = None,
    phases: Phases | None = None,
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
        progress: Called with (tiles done, number of tiles).
        phases: Receives the times of the phases `network` and `resample`.

    Raises:
        InputError: The logits are not finite, or the GPU's memory does not suffice.
    """
    phases = phases or Phases()
    planes = PlaneStream(network, output)
    masks = PackedMasks(prompts.names, output.shape, planes.axis)
    stream = stream_logits(
        predictor, volume, prompts.text_PT, overlap=overlap, prompt_chunk=prompt_chunk, progress=progress
    )
    try:
        for first, logits in stream:
            phases.end("network")
            if not torch.isfinite(logits).all():  # NaN > 0 is false, so the masks would be empty without a message
                raise InputError(
                    "the network gives numbers that are not finite; no mask can be made of them",
                    hint="use precision='fp32' if it is another, else check the model's weights",
                )
            for indices, block in planes.push(first, logits):
                positive = (block > 0).cpu().numpy()
                for name, mask in zip(masks, positive, strict=True):
                    masks.write(name, indices, mask)
            phases.end("resample")
    except torch.OutOfMemoryError as error:
        raise InputError(
            "the GPU's memory is not enough for this scan",
            hint="a smaller prompt_chunk, precision='bf16', or device='cpu'",
        ) from error
    return masks
