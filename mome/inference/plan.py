"""What segmenting a scan will take, before it is done: grids, tiles, seconds and bytes."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mome.inference.above import AboveThreshold
from mome.inference.body_mask import BodyMask, body_mask
from mome.inference.loaded_scan import reading_bytes
from mome.inference.memory_plan import MemoryPlan, Work, budget, fitting_plan, gpu_bytes
from mome.inference.mirror import MirrorPredictor
from mome.inference.network import wait_for
from mome.inference.packed import PackedMasks
from mome.inference.prepared import PreparedPrompts
from mome.inference.scan_grid import scan_grid
from mome.inference.scan_tiles import tiles_of_scan
from mome.inference.stream import wanted_tiles
from mome.inference.tiles import tile_steps
from mome.memory import as_text, process_bytes, reset_peak
from mome.volumes import Grid, Volume

if TYPE_CHECKING:
    from mome.inference.segmenter import Segmenter

# Planes that are interpolated and packed to measure the time of a voxel.
_MEASURED_PLANES = 16


@dataclass(frozen=True)
class TileCost:
    """What one tile costs here, measured by running it.

    Attributes:
        encode_s: Seconds of the encoder.
        decode_s: Seconds of decoding one chunk of prompts.
        chunk: Prompts of this chunk.
        network_bytes: Highest memory above that before, without the logits; 0 where the system does not say.
    """

    encode_s: float
    decode_s: float
    chunk: int
    network_bytes: int


@dataclass(frozen=True)
class ScanPlan:
    """How one scan will be segmented.

    Attributes:
        scan: The scan's grid.
        network: The network grid of the scan (`mome.inference.scan_grid`).
        part: The part of the network grid that tiles are laid over.
        tiles_of_all: Tiles over all of the network grid.
        tiles: Tiles that will be computed, once for every pass.
        passes: Groups of prompts that are computed one after the other.
        memory: How prompts are grouped.
        network_s: Seconds of the network that are expected.
        masks_s: Seconds of resampling and packing masks at most, as if all masks filled the scan.
        bytes_by_part: Bytes that are expected at most, by part: `MemoryPlan.bytes_of`, and `next scan` where one is
            read meanwhile.
        base_bytes: Memory of the process with the model, before the scan is read.
    """

    scan: Grid
    network: Grid
    part: Grid
    tiles_of_all: int
    tiles: int
    passes: int
    memory: MemoryPlan
    network_s: float
    masks_s: float
    bytes_by_part: dict[str, int]
    base_bytes: int

    @property
    def peak_bytes(self) -> int:
        """Returns the memory of the process that is expected at most."""
        return self.base_bytes + sum(self.bytes_by_part.values())

    def lines(self) -> list[str]:
        """Returns the plan in words, one line each."""
        tiles = f"{self.tiles} tiles at most" + (
            f"; {self.tiles_of_all} over all of this grid, air included" if self.tiles != self.tiles_of_all else ""
        )
        together = "1 prompt" if self.memory.chunk == 1 else f"{self.memory.chunk} prompts"
        passes = f", {self.passes} passes over them" if self.passes > 1 else ""
        largest = sorted(self.bytes_by_part.items(), key=lambda item: -item[1])[:4]
        return [
            f"scan           {_sides(self.scan)}",
            f"network grid   {_sides(self.network)}, of which {'×'.join(map(str, self.part.shape))} are looked at",
            f"tiles          {tiles}{passes}; {together} at once",
            f"seconds        about {self.network_s:.0f} for the network, up to {self.masks_s:.0f} for the masks",
            f"memory         at most {as_text(self.peak_bytes)}: {as_text(self.base_bytes)} before the scan, "
            + ", ".join(f"{as_text(size)} {name}" for name, size in largest),
        ]

    def as_dict(self) -> dict[str, Any]:
        """Returns the plan as JSON."""
        return {
            "scan": list(self.scan.shape),
            "network_grid": list(self.network.shape),
            "part": list(self.part.shape),
            "tiles_of_all": self.tiles_of_all,
            "tiles": self.tiles,
            "passes": self.passes,
            "prompts_at_once": self.memory.chunk,
            "sums_in_float16": self.memory.half_sums,
            "network_seconds": round(self.network_s, 1),
            "most_seconds_of_masks": round(self.masks_s, 1),
            "bytes": self.bytes_by_part,
            "bytes_before": self.base_bytes,
        }


def plan_scan(
    segmenter: Segmenter,
    volume: Volume,
    prompts: PreparedPrompts,
    cost: TileCost,
    base_bytes: int,
    *,
    read_ahead: bool = False,
    disagreement: bool = False,
) -> ScanPlan:
    """Measures some planes of a mask, and says what a scan will take.

    Args:
        segmenter: The model with its settings.
        volume: The scan.
        prompts: The prompts.
        cost: What `measured_tile` returned for them.
        base_bytes: Memory of the process before the scan was read.
        read_ahead: Count the next scan, too, which is read meanwhile. It is taken to be as large as this one.
        disagreement: Count the maps of the routers' disagreement, too.

    Raises:
        InputError: The scan does not fit into memory.
    """
    network = scan_grid(volume, segmenter.processor)
    patch = segmenter.predictor.patch_size
    body: BodyMask | None = None if segmenter.exact else body_mask(volume, network, patch, segmenter.overlap)
    part = network if body is None else body.grid
    wanted = tiles_of_scan(network, volume.grid) if body is None else body.wants
    steps = tile_steps(network.shape, patch, segmenter.overlap)
    tiles = len(wanted_tiles(part.shape, patch, steps, wanted))
    device = segmenter.predictor.device
    work = Work(
        volume.shape,
        part.shape,
        patch,
        len(prompts.names),
        cost.network_bytes,
        on_gpu=device.type == "cuda",
        disagreement=disagreement,
    )
    next_scan = reading_bytes(volume.array.nbytes, 4 * int(np.prod(part.shape))) if read_ahead else 0
    left = budget(segmenter.memory, volume.array.nbytes)
    memory = fitting_plan(
        work,
        left,
        chunk=segmenter.decoded_at_once,
        reserved=next_scan,
        gpu_budget=gpu_bytes(device),
        exact=segmenter.exact,
    )
    fits = next_scan and memory.total(work) <= left - next_scan  # else it is not read ahead
    parts = {"next scan": next_scan} if fits else {}
    passes = -(-len(prompts.names) // memory.group)
    decode_s = cost.decode_s / cost.chunk * len(prompts.names)
    voxels = float(np.prod(volume.shape)) * len(prompts.names)
    return ScanPlan(
        scan=volume.grid,
        network=network,
        part=part,
        tiles_of_all=len(wanted_tiles(network.shape, patch, steps)),
        tiles=tiles,
        passes=passes,
        memory=memory,
        network_s=tiles * (passes * cost.encode_s + decode_s),
        masks_s=voxels * _seconds_per_voxel(part, volume.grid),
        bytes_by_part=memory.bytes_of(work) | parts,
        base_bytes=base_bytes,
    )


@torch.inference_mode()
def measured_tile(segmenter: Segmenter, prompts: PreparedPrompts) -> TileCost:
    """Runs one tile of random voxels twice, and measures the memory of the first time and the seconds of the second."""
    predictor = segmenter.predictor
    if isinstance(predictor, MirrorPredictor):
        predictor = predictor.for_volume(predictor.patch_size)  # all mirrored copies of a tile are measured together
    text_PT = prompts.text_PT[: segmenter.decoded_at_once].to(predictor.device)
    tile = torch.rand(1, 1, *predictor.patch_size, generator=torch.Generator().manual_seed(0)).to(predictor.device)
    before, is_known = _begin_peak(predictor.device)
    predictor.decode(predictor.encode(tile, (0, 0, 0)), text_PT)
    wait_for(predictor.device)
    logits = 2 * len(text_PT) * tile.numel() * 4
    taken = max(0, _peak_bytes(predictor.device) - before - logits) if is_known else 0
    began = time.perf_counter()
    features = predictor.encode(tile, (0, 0, 0))
    wait_for(predictor.device)
    encoded = time.perf_counter()
    predictor.decode(features, text_PT)
    wait_for(predictor.device)
    return TileCost(encoded - began, time.perf_counter() - encoded, len(text_PT), taken)


def _begin_peak(device: torch.device) -> tuple[int, bool]:
    """Begins to measure the highest memory of a device; returns the bytes that are taken, and whether it can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device), True
    return process_bytes(), reset_peak()


def _peak_bytes(device: torch.device) -> int:
    """Returns the highest memory since `_begin_peak`."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else process_bytes(peak=True)


def _seconds_per_voxel(network: Grid, output: Grid) -> float:
    """Returns the seconds of interpolating and packing a voxel of a mask that fills some planes of the scan."""
    planes = min(_MEASURED_PLANES, output.shape[2])
    middle = output.shape[2] // 2
    target = output.crop(2, max(0, middle - planes // 2), max(0, middle - planes // 2) + planes)
    masks, logits = PackedMasks(["mask"], target.shape, 2), torch.ones(network.shape)
    began = time.perf_counter()
    for first, positive in AboveThreshold(network, target, 2).blocks(logits, lambda block: block > 0):
        masks.write_box("mask", first, positive)
    return (time.perf_counter() - began) / float(np.prod(target.shape))


def _sides(grid: Grid) -> str:
    sides = "×".join(map(str, grid.shape))
    return f"{sides} voxels of {'×'.join(f'{step:.3g}' for step in grid.spacing)} mm"
