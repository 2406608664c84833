"""The Segmenter: a model loaded once, scans in, masks on their own grids out."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mome.errors import InputError
from mome.inference.planes import PlaneStream
from mome.inference.result import PackedMasks, Segmentation, prompt_parts
from mome.inference.stream import stream_logits
from mome.processing import MoMEProcessor, processor_of
from mome.prompts import Prompt, embed_prompts, understand
from mome.volumes import Volume, checked_volume, read_volume

if TYPE_CHECKING:
    from mome.modeling import MoME

_PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Segmenter:
    """Segments scans by text prompts.

    Args:
        model: A MoME, or what `MoME.from_pretrained` takes.
        processor: Of the model. Where None: what the model carries as `processor`, else what is saved beside it.
        overlap: Share of a tile that its neighbour covers too, 0 to 0.9.
        device: As in "cuda"; the model's own where None.
        precision: `fp32`, `bf16` or `fp16` inside the network.
        prompt_chunk: Prompts decoded at once; smaller needs less memory.
        progress: Called with (tiles done, tiles in all).

    Raises:
        InputError: A model without a processor, or a value out of range.
    """

    def __init__(
        self,
        model: MoME | str | Path,
        processor: MoMEProcessor | None = None,
        *,
        overlap: float = 0.5,
        device: str | torch.device | None = None,
        precision: str = "fp32",
        prompt_chunk: int = 32,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        if isinstance(model, str | Path):
            from mome.modeling import MoME

            network = MoME.from_pretrained(model)  # before its processor: what is wrong with it is said first
            processor = processor or MoMEProcessor.from_pretrained(model)
        else:
            network = model
            processor = processor or processor_of(model)
        if not 0 <= overlap <= 0.9:
            raise InputError(f"overlap is from 0 to 0.9, got {overlap}")
        if precision not in _PRECISIONS:
            raise InputError(f"precision is one of {', '.join(_PRECISIONS)}, got {precision!r}")
        if device is not None:
            torch.nn.Module.to(network, _device(device))
        self.model, self.processor = network.eval(), processor
        self.overlap, self.precision = overlap, precision
        self.prompt_chunk, self.progress = max(1, prompt_chunk), progress

    def understand(self, prompts: str | Sequence[str]) -> list[Prompt]:
        """The prompts as the model understands them, each once; nothing is run.

        Raises:
            InputError: No prompt, an empty one, or prompts whose masks could not be told apart by their file names.
        """
        understood = understand([prompts] if isinstance(prompts, str) else list(prompts), self.model)
        once = list({p.name: p for p in reversed(understood)}.values())[::-1]
        prompt_parts(once)
        return once

    def segment(
        self, scan: str | Path | Volume, prompts: str | Sequence[str], *, frame: int | None = None
    ) -> Segmentation:
        """Masks of the prompts on the scan's own grid.

        All prompts share one encoder pass per tile; logits are averaged over tiles and thresholded at 0 after
        resampling by affine. A prompt named twice is segmented once.

        Args:
            scan: A file (see `mome.volumes.read_volume`) or a Volume in HU.
            prompts: Names, synonyms, or free text where the model's tower is at hand.
            frame: Which volume of a 4-D file, from 0.

        Raises:
            InputError: The scan cannot be read, a prompt cannot be embedded, or the network gives no finite numbers.
        """
        seconds: dict[str, float] = {}
        began = time.perf_counter()

        def lap(phase: str) -> None:
            nonlocal began
            now = time.perf_counter()
            seconds[phase] = round(seconds.get(phase, 0.0) + now - began, 3)
            began = now

        understood = self.understand(prompts)
        text_PT = embed_prompts(understood, self.model)
        lap("prompts")
        volume = checked_volume(scan) if isinstance(scan, Volume) else read_volume(scan, frame=frame)
        lap("read")
        network, grid = self.processor.to_network(volume)
        lap("resample")
        planes = PlaneStream(grid, volume.grid)
        masks = PackedMasks([p.name for p in understood], volume.shape, planes.axis)
        try:
            for first, logits in stream_logits(
                self.model,
                network,
                text_PT,
                patch=tuple(self.model.config.patch_size),
                overlap=self.overlap,
                prompt_chunk=self.prompt_chunk,
                autocast=_PRECISIONS[self.precision],
                progress=self.progress,
            ):
                lap("network")
                if not torch.isfinite(logits).all():  # NaN > 0 is false: the masks would be empty without a word
                    raise InputError(
                        "the network gives numbers that are not finite; no mask can be made of them",
                        hint="precision='fp32' where it is another, else check the model's weights",
                    )
                for indices, block in planes.push(first, logits):
                    positive = (block > 0).cpu().numpy()
                    for name, mask in zip(masks, positive, strict=True):
                        masks.write(name, indices, mask)
                lap("resample")
        except torch.OutOfMemoryError as error:
            raise InputError(
                "the GPU's memory is not enough for this scan",
                hint="a smaller prompt_chunk, precision='bf16', or device='cpu'",
            ) from error
        source = None if isinstance(scan, Volume) else Path(scan)
        return Segmentation(understood, masks, volume.grid, volume.header, seconds, volume.notes, source)


def segment(
    scan: str | Path | Volume,
    prompts: str | Sequence[str],
    model: MoME | str | Path = "mome-ct-tiny",
    processor: MoMEProcessor | None = None,
    *,
    overlap: float = 0.5,
    device: str | torch.device | None = None,
    precision: str = "fp32",
    prompt_chunk: int = 32,
    progress: Callable[[int, int], None] | None = None,
    frame: int | None = None,
) -> Segmentation:
    """Segments one scan; see `Segmenter`, which keeps the model for the next one."""
    segmenter = Segmenter(
        model,
        processor,
        overlap=overlap,
        device=device,
        precision=precision,
        prompt_chunk=prompt_chunk,
        progress=progress,
    )
    return segmenter.segment(scan, prompts, frame=frame)


def _device(device: str | torch.device) -> torch.device:
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise InputError(f"no such device: {device!r}", hint="cpu, cuda, cuda:1") from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise InputError("there is no CUDA device here", hint="device='cpu'")
    return chosen
