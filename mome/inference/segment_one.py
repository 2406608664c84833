"""Segments one scan in one call; the model is loaded for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mome.inference.choose_model import choose_model
from mome.inference.result import Segmentation
from mome.inference.segmenter import Segmenter
from mome.processing import MoMEProcessor
from mome.volumes import Volume
from mome.volumes.dicom import DEFAULT_DICOM, DicomOptions

if TYPE_CHECKING:
    from mome.modeling import MoME


def segment(
    scan: str | Path | Volume,
    prompts: str | Sequence[str],
    model: MoME | str | Path | None = None,
    processor: MoMEProcessor | None = None,
    *,
    overlap: float | None = None,
    device: str | torch.device | None = None,
    precision: str = "auto",
    prompt_chunk: int = 32,
    exact: bool = False,
    memory: str | int | None = None,
    mirror: str | None = None,
    postprocess: str | Sequence[str] | None = None,
    frame: int | None = None,
    dicom: DicomOptions = DEFAULT_DICOM,
    probabilities: bool | Sequence[str] = False,
    progress: Callable[[int, int], None] | None = None,
    statistics: bool = False,
) -> Segmentation:
    """Segments one scan; see `Segmenter`, which keeps the model for more scans.

    Where `model` is None, `choose_model` takes the bundled checkpoint that knows the prompts.
    """
    note = None
    if model is None:
        chosen = choose_model(prompts)
        model, note = chosen.model, chosen.note
    segmenter = Segmenter(
        model,
        processor,
        overlap=overlap,
        device=device,
        precision=precision,
        prompt_chunk=prompt_chunk,
        exact=exact,
        memory=memory,
        mirror=mirror,
        postprocess=postprocess,
    )
    segmenter.notes += (note,) if note else ()
    return segmenter.segment(
        scan,
        prompts,
        frame=frame,
        dicom=dicom,
        probabilities=probabilities,
        progress=progress,
        statistics=statistics,
    )
