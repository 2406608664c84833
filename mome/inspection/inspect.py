"""Inspects a model on one scan: it is segmented, then every tile runs again while routers and fusion are recorded.

Memory: the planes that are drawn, sums per region, one tile, and a box around each mask; nothing has the size of
(prompts × scales × volume).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mome.errors import InputError
from mome.inference.eval_mode import evaluating
from mome.inference.prepared import PreparedPrompts
from mome.inference.scan_grid import scan_grid
from mome.inference.segmenter import Segmenter
from mome.inspection.recording import SeenRouting, TileRecorder
from mome.inspection.regions import BODY, SCAN, Regions
from mome.inspection.tally import FusionTally, RouterTally, winner_map, winning_scale
from mome.inspection.tiles import Tile, owned_tiles
from mome.inspection.views import View, plan_views
from mome.router_names import named_routers
from mome.volumes import read_volume
from mome.volumes.dicom import DEFAULT_DICOM, DicomOptions

_OVERLAP_NOTE = "where tiles overlap, a voxel shows the tile whose centre is nearest, which weighs most in the logits"


@dataclass
class Inspection:
    """What was seen.

    Attributes:
        report: The content of the JSON file.
        views: One for each prompt.
        scale_names: The scales in words, from coarse to fine.
    """

    report: dict[str, Any]
    views: list[View]
    scale_names: list[str]


def inspect(
    segmenter: Segmenter,
    scan: str | Path,
    prompts: Sequence[str],
    *,
    frame: int | None = None,
    dicom: DicomOptions = DEFAULT_DICOM,
    progress: Callable[[int, int], None] | None = None,
) -> Inspection:
    """Records which scale and which expert decide where, for every prompt.

    Args:
        segmenter: The model.
        scan: A file or a DICOM folder.
        prompts: As for `Segmenter.segment`.
        frame, dicom: As for `Segmenter.segment`.
        progress: Called with (tiles done, number of tiles), first while segmenting, then while recording.

    Raises:
        InputError: As for `Segmenter.segment`, or the segmenter mirrors tiles.
    """
    if segmenter.mirror:
        raise InputError("inspection shows one pass of the network, and this Segmenter mirrors", hint="mirror=None")
    prepared = segmenter.prepare(prompts)
    volume = read_volume(scan, frame=frame, dicom=dicom)
    result = segmenter.segment(volume, prepared, progress=progress)
    array, network = segmenter.processor.to_network(volume, scan_grid(volume, segmenter.processor))
    recording = _Recording(segmenter, prepared, Regions(array[0, 0], network, result.masks, volume.grid))
    recording.views = list(plan_views(volume, result.masks, network))
    with evaluating(segmenter.model):
        recording.run(array, progress)
    names = _scale_names(segmenter.model, network.spacing, recording.scales)
    report = {
        "scan": str(scan),
        "drawn": _OVERLAP_NOTE,
        "network_voxel_mm": [round(step, 4) for step in network.spacing],
        "structures": [
            {"name": entry["name"], "volume_ml": entry["volume_ml"], "warning": entry["warning"]}
            for entry in result.summary()
        ],
        "fusion": {
            "name": segmenter.model.config.fusion["name"],
            "scales": names,
            "note": recording.fusion_note(),
            "prompts": {prepared.names[p]: tally.report() for p, tally in recording.fusions.items()},
        },
        "routers": recording.router_reports(),
        "notes": [*result.notes, *recording.notes],
    }
    return Inspection(report, recording.views, names)


class _Recording:
    """The second pass over the tiles."""

    def __init__(self, segmenter: Segmenter, prepared: PreparedPrompts, regions: Regions) -> None:
        self.segmenter, self.prepared, self.regions = segmenter, prepared, regions
        self.views: list[View] = []
        self.fusions: dict[int, FusionTally] = {}
        self.routers: dict[tuple[str, int | None], RouterTally] = {}  # by router, and prompt where it reads prompts
        self.strides: dict[str, tuple[int, ...]] = {}
        self.scales = 1
        self.notes: list[str] = []

    @torch.inference_mode()
    def run(self, array: Tensor, progress: Callable[[int, int], None] | None) -> None:
        """Runs every tile; see `stream_logits` for the padding."""
        predictor, text_PT = self.segmenter.predictor, self.prepared.text_PT.to(self.segmenter.predictor.device)
        size, patch = array.shape[2:], predictor.patch_size
        missing = [max(step - side, 0) for side, step in zip(size, patch, strict=True)]
        padded = F.pad(array, [amount for axis in reversed(missing) for amount in (0, axis)])
        tiles = list(owned_tiles(size, patch, self.segmenter.overlap))
        with TileRecorder(self.segmenter.model) as recorder:
            for done, tile in enumerate(tiles, start=1):
                place = tuple(slice(o, o + step) for o, step in zip(tile.origin, patch, strict=True))
                recorder.clear()
                features = predictor.encode(
                    padded[(slice(None), slice(None), *place)].to(predictor.device), tile.origin
                )
                for seen in recorder.routings:
                    self._add_routing(seen, tile, None)
                for p in range(text_PT.shape[0]):
                    recorder.clear()
                    predictor.decode(features, text_PT[p : p + 1])
                    for seen in recorder.routings:
                        self._add_routing(seen, tile, p)
                    if recorder.weights_SDHW is not None:
                        self._add_fusion(recorder.weights_SDHW, tile, p)
                if progress is not None:
                    progress(done, len(tiles))

    def _add_routing(self, seen: SeenRouting, tile: Tile, prompt: int | None) -> None:
        spans = tuple(side * step for side, step in zip(seen.sides, seen.stride, strict=True))
        if spans != tuple(self.segmenter.predictor.patch_size):
            note = f"router {seen.name} is left out: its tokens are no map of the tile"
            self.notes += [] if note in self.notes else [note]
            return
        names = self.regions.names if prompt is None else self._regions_of(prompt)
        counts_RT = self.regions.count_on_map(names, tile, seen.sides, seen.stride)
        winner_T = winner_map(seen.routing)
        tally = self.routers.setdefault((seen.name, prompt), RouterTally(seen.routing, names))
        tally.add(seen.routing, counts_RT, winner_T, seen.stride[0] * seen.stride[1] * seen.stride[2])
        self.strides[seen.name] = seen.stride
        for view in self.views if prompt is None else [self.views[prompt]]:
            numbers, at = view.inside(tile, seen.stride, seen.sides)
            view.set_experts(seen.name, numbers, winner_T[at])

    def _add_fusion(self, weights_SDHW: Tensor, tile: Tile, prompt: int) -> None:
        sides = tuple(weights_SDHW.shape[1:])
        stride = tuple(step // side for step, side in zip(self.segmenter.predictor.patch_size, sides, strict=True))
        names, weights_ST = self._regions_of(prompt), weights_SDHW.flatten(1).cpu()
        self.scales = weights_ST.shape[0]
        tally = self.fusions.setdefault(prompt, FusionTally(self.scales, names))
        tally.add(weights_ST, self.regions.count_on_map(names, tile, sides, stride))
        scale_T, weight_T = winning_scale(weights_ST)
        view = self.views[prompt]
        numbers, at = view.inside(tile, stride, sides)
        view.scale_N[numbers], view.weight_N[numbers] = scale_T[at], weight_T[at]

    def _regions_of(self, prompt: int) -> list[str]:
        return [SCAN, BODY, self.prepared.names[prompt]]

    def fusion_note(self) -> str | None:
        """What a reader must know of the fusion."""
        name = self.segmenter.model.config.fusion["name"]
        if not self.fusions:
            return f"the fusion '{name}' shows no weights"
        if self.scales == 1:
            return f"the fusion '{name}' reads one scale, which has all the weight"
        if not any(tally.varies for tally in self.fusions.values()):
            return f"the fusion '{name}' gives every voxel the same weights"
        return None

    def router_reports(self) -> dict[str, Any]:
        """The loads of every router, `all prompts` together or by prompt where the router reads prompts."""
        reports: dict[str, Any] = {}
        modules = named_routers(self.segmenter.model)
        for (name, prompt), tally in self.routers.items():
            entry = reports.setdefault(
                name,
                {
                    "router": type(modules[name]).__name__,
                    "form": tally.form,
                    "experts": tally.experts,
                    "stride": list(self.strides[name]),
                    "load": {},
                },
            )
            entry["load"]["all prompts" if prompt is None else self.prepared.names[prompt]] = tally.report()
        return reports


def _scale_names(model: Any, spacing: Sequence[float], scales: int) -> list[str]:
    """The scales in words, with the size of their voxels; whole-model experts follow the scales of the encoder."""
    strides = model.encoder.strides[model.first_scale :]
    names = []
    for s, stride in enumerate(strides):
        sizes = [f"{step * mm:.3g}" for step, mm in zip(stride, spacing, strict=True)]
        shown = sizes[0] if len(set(sizes)) == 1 else "×".join(sizes)
        names.append(f"scale {s} (voxels of {shown} mm)")
    return names + [f"whole model {e}" for e in range(max(0, scales - len(strides)))]
