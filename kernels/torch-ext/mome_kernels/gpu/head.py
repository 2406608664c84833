"""The fusion head on a GPU: a tile of voxels is read once, and every prompt is computed from registers.

Neither (prompts × scales × voxels) nor (prompts × channels × voxels) reaches device memory. Each program sums the
gradients of a prompt's weights over its tiles; these sums are then added over programs. There are no atomic additions,
so that reruns are bit-equal.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..weights import HeadWeights
from . import configs, head_tiles, head_voxels
from .launch import Launch, Machine, ceil_div, machine_of, power_of_two

_VOXELS = 128  # voxels of a program of `head_voxels`, one per thread
_POINTERS = ("q_ptr", "s_ptr", "w1_ptr", "b1_ptr", "w2_ptr", "b2_ptr", "w3_ptr", "b3_ptr")  # of `HeadWeights.tensors`


def _warps(machine: Machine) -> int:
    """Warps of a program of `head_voxels`; a warp of an AMD device has 64 threads."""
    return 2 if machine.arch.startswith("gfx") else 4


def supports(features: Tensor) -> bool:
    """Whether these kernels support the features: float32, at most eight scales, 8, 16 or 32 channels."""
    scales, channels = features.shape[1:3]
    return features.dtype == torch.float32 and scales <= 8 and channels in (8, 16, 32)


def tile(channels: int, machine: Machine, *, backward: bool) -> tuple[int, int]:
    """Voxels of a tile and warps of a program of `head_tiles`: the largest tile whose registers do not spill."""
    if backward:
        narrow = machine.arch.startswith("sm_8")
        return {16: (16 if narrow else 32, 8), 32: (2 if narrow else 4, 8)}[channels]
    return {16: (64, 4), 32: (32 if machine.arch.startswith("gfx") else 64, 8)}[channels]


def _inputs(features: Tensor, head: HeadWeights) -> dict[str, object]:
    """The arguments of all kernels. They read numbers in pairs, so that tensors not aligned to 8 bytes are copied."""
    aligned = [t if t.data_ptr() % 8 == 0 else t.clone() for t in head.tensors]
    scales, channels, voxels = features.shape[1:]
    return {
        "f_ptr": features, **dict(zip(_POINTERS, aligned, strict=True)), "V": voxels, "P": head.prompts,
        "slope": head.negative_slope, "C": channels, "TOP_K": head.top_k if 0 < head.top_k < scales else 0,
    }  # fmt: skip


def plan_forward(out: Tensor, features: Tensor, head: HeadWeights, machine: Machine) -> Launch:
    """A launch of the forward kernel."""
    batch, scales, channels, voxels = features.shape
    arguments = {**_inputs(features, head), "out_ptr": out}
    if channels == 8:
        block = _VOXELS * (2 if scales <= 5 else 1)  # two voxels per thread read the weights once
        arguments |= {"S": scales, "BLOCK": block}
        return Launch(head_voxels.forward, (ceil_div(voxels, block), batch), arguments, _warps(machine))
    block, warps = tile(channels, machine, backward=False)
    arguments |= {
        "S": power_of_two(scales), "SCALES": scales, "BLOCK": block, "PRECISION": configs.precision(features, machine),
    }  # fmt: skip
    return Launch(head_tiles.forward, (ceil_div(voxels, block), batch), arguments, warps)


def _programs(tiles: int, groups: int, machine: Machine) -> int:
    """Programs among which the tiles of one of `groups` are divided; enough to fill the device a few times over."""
    return min(tiles, max(1, ceil_div(4 * machine.processors, max(1, groups))))


def plan_backward(
    grad: Tensor, features: Tensor, head: HeadWeights, d_features: Tensor, machine: Machine
) -> tuple[list[Launch], Tensor]:
    """Launches of the backward kernels, and the partial sums of the weights' gradients that they write.

    These are (batch, prompts, programs, 2 C² + 4 C + S + 1), in the order of `HeadWeights.tensors`.
    """
    batch, scales, channels, voxels = features.shape
    prompts, width = head.prompts, 2 * channels**2 + 4 * channels + scales + 1
    common = {**_inputs(features, head), "g_ptr": grad}
    del common["b3_ptr"]
    if channels == 8:
        tiles = ceil_div(voxels, _VOXELS)
        programs = _programs(tiles, batch * prompts, machine)
        partial = features.new_empty(batch, prompts, programs, width)
        common |= {"S": scales, "BLOCK": _VOXELS}
        sums = {**common, "part_ptr": partial, "TILES": tiles, "PROGRAMS": programs, "ZERO": 0}
        grid, warps = (programs * prompts, batch), _warps(machine)
        return [
            Launch(head_voxels.backward_features, (tiles, batch), {**common, "df_ptr": d_features}, warps),
            Launch(head_voxels.backward_weights, grid, {**sums, "FIRST": True}, warps),
            Launch(head_voxels.backward_weights, grid, {**sums, "FIRST": False}, warps),
        ], partial
    block, warps = tile(channels, machine, backward=True)
    tiles = ceil_div(voxels, block)
    programs = _programs(tiles, batch, machine)
    partial = features.new_empty(batch, prompts, programs, width)
    arguments = {
        **common, "df_ptr": d_features, "part_ptr": partial, "S": power_of_two(scales), "SCALES": scales,
        "TILES": tiles, "PROGRAMS": programs, "WIDTH": width, "BLOCK": block,
        # at 32 channels the operands of tensor-core products would not fit the registers beside the features
        "PRECISION": configs.precision(features, machine) if channels == 16 else None,
    }  # fmt: skip
    return [Launch(head_tiles.backward, (programs, batch), arguments, warps)], partial


def forward(features: Tensor, head: HeadWeights) -> Tensor:
    """See `mome_kernels.fusion_head`."""
    out = features.new_empty(features.shape[0], head.prompts, features.shape[3])
    if features.numel():
        plan_forward(out, features, head, machine_of(features)).run()
    return out


def backward(grad: Tensor, features: Tensor, head: HeadWeights) -> tuple[Tensor, ...]:
    """Gradients of the features and of the eight tensors of the head, in their order."""
    _, scales, channels, _ = features.shape
    d_features = torch.empty_like(features)
    launches, partial = plan_backward(grad, features, head, d_features, machine_of(features))
    for launch in launches if features.numel() else ():
        launch.run()
    sizes = [channels, scales, channels**2, channels, channels**2, channels, channels, 1]
    # cloned, since the results of a custom op must not be views of one tensor
    parts = [part.clone() for part in partial.sum(2).split(sizes, dim=-1)]
    d_query, d_bias, d_w1, d_b1, d_w2, d_b2, d_w3, d_b3 = parts
    square = (*d_w1.shape[:2], channels, channels)
    return (
        d_features, d_query.sum(0), d_bias.sum(0), d_w1.view(square), d_b1, d_w2.view(square), d_b2, d_w3,
        d_b3.squeeze(-1),
    )  # fmt: skip
