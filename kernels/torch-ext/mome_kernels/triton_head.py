"""The fusion head on a GPU: a tile of voxels is read once, and every prompt is computed from registers.

Neither (prompts × scales × voxels) nor (prompts × channels × voxels) reaches device memory. The gradients of the
per-prompt weights are summed by each program over its tiles and then over programs, in a fixed order: no atomics, and
reruns are bit-equal.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .gpu import configs, head_tiles, head_voxels
from .gpu.launch import Launch, Machine, ceil_div, machine_of, power_of_two

_VOXELS = 128  # of a program with a voxel per thread


def _warps(machine: Machine) -> int:
    """Of such a program: AMD's have 64 threads."""
    return 2 if machine.arch.startswith("gfx") else 4


def supports(features: Tensor) -> bool:
    """Whether these kernels take the tensor: float32, at most eight scales, 8, 16 or 32 channels."""
    scales, channels = features.shape[1:3]
    return features.dtype == torch.float32 and scales <= 8 and channels in (8, 16, 32)


def tile(channels: int, machine: Machine, *, backward: bool) -> tuple[int, int]:
    """Voxels of a tile and warps of a program of `head_tiles`, the largest whose registers do not spill."""
    if backward:
        narrow = machine.arch.startswith("sm_8")
        return {16: (16 if narrow else 32, 8), 32: (2 if narrow else 4, 8)}[channels]
    return {16: (64, 4), 32: (32 if machine.arch.startswith("gfx") else 64, 8)}[channels]


def _inputs(features: Tensor, named: dict[str, Tensor], top_k: int, slope: float) -> dict[str, object]:
    """Arguments that all kernels share. Two numbers are read at once: what is not aligned to eight bytes is copied."""
    aligned = {name: t if t.data_ptr() % 8 == 0 else t.clone() for name, t in named.items()}
    scales, channels, voxels = features.shape[1:]
    return {
        "f_ptr": features, **aligned, "V": voxels, "P": named["q_ptr"].shape[0], "slope": slope, "C": channels,
        "TOP_K": top_k if 0 < top_k < scales else 0,
    }  # fmt: skip


def plan_forward(
    out: Tensor, features: Tensor, named: dict[str, Tensor], top_k: int, slope: float, machine: Machine
) -> Launch:
    """A launch of the forward kernel. `named`: query, bias, and the three layers by the kernels' argument names."""
    batch, scales, channels, voxels = features.shape
    arguments = {**_inputs(features, named, top_k, slope), "out_ptr": out}
    if channels == 8:
        block = _VOXELS * (2 if scales <= 5 else 1)  # of two voxels the weights are read once
        arguments |= {"S": scales, "BLOCK": block}
        return Launch(head_voxels.forward, (ceil_div(voxels, block), batch), arguments, _warps(machine))
    block, warps = tile(channels, machine, backward=False)
    arguments |= {
        "S": power_of_two(scales), "SCALES": scales, "BLOCK": block, "PRECISION": configs.precision(features, machine),
    }  # fmt: skip
    return Launch(head_tiles.forward, (ceil_div(voxels, block), batch), arguments, warps)


def _programs(tiles: int, groups: int, machine: Machine) -> int:
    """Programs that share the tiles of one of `groups`: enough to fill the machine a few times over."""
    return min(tiles, max(1, ceil_div(4 * machine.processors, max(1, groups))))


def plan_backward(
    grad: Tensor, features: Tensor, named: dict[str, Tensor], d_features: Tensor, top_k: int, slope: float,
    machine: Machine,
) -> tuple[list[Launch], Tensor]:  # fmt: skip
    """Launches of the backward kernels, and the partial sums of the weights' gradients that they write.

    (batch, prompts, programs, 2 C² + 4 C + S + 1): d query C, d bias S, d W1 C², d b1 C, d W2 C², d b2 C, d w3 C, d b3.
    """
    batch, scales, channels, voxels = features.shape
    prompts, width = named["q_ptr"].shape[0], 2 * channels**2 + 4 * channels + scales + 1
    shared = {**_inputs(features, {k: v for k, v in named.items() if k != "b3_ptr"}, top_k, slope), "g_ptr": grad}
    if channels == 8:
        tiles = ceil_div(voxels, _VOXELS)
        programs = _programs(tiles, batch * prompts, machine)
        partial = features.new_empty(batch, prompts, programs, width)
        shared |= {"S": scales, "BLOCK": _VOXELS}
        sums = {**shared, "part_ptr": partial, "TILES": tiles, "PROGRAMS": programs, "ZERO": 0}
        grid, warps = (programs * prompts, batch), _warps(machine)
        return [
            Launch(head_voxels.backward_features, (tiles, batch), {**shared, "df_ptr": d_features}, warps),
            Launch(head_voxels.backward_weights, grid, {**sums, "FIRST": True}, warps),
            Launch(head_voxels.backward_weights, grid, {**sums, "FIRST": False}, warps),
        ], partial
    block, warps = tile(channels, machine, backward=True)
    tiles = ceil_div(voxels, block)
    programs = _programs(tiles, batch, machine)
    partial = features.new_empty(batch, prompts, programs, width)
    arguments = {
        **shared, "df_ptr": d_features, "part_ptr": partial, "S": power_of_two(scales), "SCALES": scales,
        "TILES": tiles, "PROGRAMS": programs, "WIDTH": width, "BLOCK": block,
        # at 32 channels the fragments of tensor-core products would not fit the registers beside the features
        "PRECISION": configs.precision(features, machine) if channels == 16 else None,
    }  # fmt: skip
    return [Launch(head_tiles.backward, (programs, batch), arguments, warps)], partial


def forward(
    features: Tensor, query: Tensor, bias: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, w3: Tensor,
    b3: Tensor, top_k: int, negative_slope: float,
) -> Tensor:  # fmt: skip
    """See `mome_kernels.fusion_head`."""
    out = features.new_empty(features.shape[0], query.shape[0], features.shape[3])
    if features.numel():
        named = _names(query, bias, w1, b1, w2, b2, w3, b3)
        plan_forward(out, features, named, top_k, negative_slope, machine_of(features)).run()
    return out


def backward(
    grad: Tensor, features: Tensor, query: Tensor, bias: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor,
    w3: Tensor, b3: Tensor, top_k: int, negative_slope: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of all nine inputs, in their order."""
    batch, scales, channels, _ = features.shape
    d_features, named = torch.empty_like(features), _names(query, bias, w1, b1, w2, b2, w3, b3)
    machine = machine_of(features)
    launches, partial = plan_backward(grad, features, named, d_features, top_k, negative_slope, machine)
    for launch in launches if features.numel() else ():
        launch.run()
    sizes = [channels, scales, channels**2, channels, channels**2, channels, channels, 1]
    # clones: a custom op's results must not share memory
    parts = [part.clone() for part in partial.sum(2).split(sizes, dim=-1)]
    d_query, d_bias, d_w1, d_b1, d_w2, d_b2, d_w3, d_b3 = parts
    square = (*d_w1.shape[:2], channels, channels)
    return (
        d_features, d_query.sum(0), d_bias.sum(0), d_w1.view(square), d_b1, d_w2.view(square), d_b2, d_w3,
        d_b3.squeeze(-1),
    )  # fmt: skip


def _names(*tensors: Tensor) -> dict[str, Tensor]:
    names = ("q_ptr", "s_ptr", "w1_ptr", "b1_ptr", "w2_ptr", "b2_ptr", "w3_ptr", "b3_ptr")
    return dict(zip(names, tensors, strict=True))
