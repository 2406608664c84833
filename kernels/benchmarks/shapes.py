"""The 21 shapes of the kernel benchmark, the loads of experts, and lower bounds of the times.

Shapes L are of language models and bound by arithmetic. Shapes V are of dense vision, with many tokens and small
widths, and bound by memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Shape:
    """T tokens of width D, E experts of hidden width F, K experts per token."""

    name: str
    text: str
    T: int
    D: int
    F: int
    E: int
    K: int
    gated: bool = False
    activation: str = "gelu"
    load: str = "uniform"

    @property
    def flops(self) -> float:
        """Floating-point operations of the forward pass."""
        return 2 * self.T * self.K * self.D * self.F * (3 if self.gated else 2)


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("V1", "Swin-UNETR s0, 96³, b2", 221184, 48, 192, 8, 1),
        Shape("V2", "Swin-UNETR s1", 27648, 96, 384, 8, 2),
        Shape("V5", "Swin-UNETR s0, 128³, b4", 1048576, 48, 192, 4, 1),
        Shape("V6", "voxels, 96³, C 32", 884736, 32, 128, 4, 2),
        Shape("V7", "voxels, 96³, C 64", 884736, 64, 256, 16, 1),
        Shape("V14", "1×1 convolution, 160³/2³, C 64", 512000, 64, 64, 8, 2),
        Shape("V11", "2D, 512², patch 4, b8", 131072, 96, 384, 16, 2),
        Shape("L1", "Mixtral-8x7B", 8192, 4096, 14336, 8, 2, True, "silu"),
        Shape("L2", "Qwen3-30B-A3B", 32768, 2048, 768, 128, 8, True, "silu"),
        Shape("L4", "OLMoE-1B-7B", 16384, 2048, 1024, 64, 8, True, "silu"),
        Shape("L6", "L4, Zipf 1.5", 16384, 2048, 1024, 64, 8, True, "silu", "zipf"),
        Shape("L3", "DeepSeek-V3 shard", 16384, 7168, 2048, 32, 8, True, "silu"),
        Shape("V12", "2D, 512², patch 4, C 192", 131072, 192, 768, 64, 2),
        Shape("V13", "gated vision", 110592, 192, 512, 16, 1, True, "silu"),
        Shape("V10", "UNETR-L, 10⁵ tokens", 110592, 384, 1536, 32, 2),
        Shape("V9", "ViT-B p8, 96³, b8", 13824, 768, 3072, 16, 2),
        Shape("V15", "V9, 80 % on one expert", 13824, 768, 3072, 16, 2, load="one80"),
        Shape("V8", "ViT-B p16, 96³, b8", 1728, 768, 3072, 8, 2),
        Shape("L5", "fine-grained", 8192, 768, 256, 128, 8, True, "silu"),
        Shape("V3", "Swin-UNETR s2", 3456, 192, 768, 8, 2),
        Shape("V4", "Swin-UNETR s3", 432, 384, 1536, 8, 2),
    )
}
LOADS = ("uniform", "zipf", "one80", "empty")


def expert_ids(shape: Shape, load: str, device: str | torch.device) -> torch.Tensor:
    """Ids (T, K), all different within a token: uniform, Zipf 1.5, 80 % led by the last expert, or expert 0 unused."""
    generator = torch.Generator(device=device).manual_seed(0)
    weight = torch.ones(shape.E, device=device)
    if load == "zipf":
        weight = torch.arange(1, shape.E + 1, device=device).float() ** -1.5
    if load == "empty" and shape.E > shape.K:
        weight[0] = 0.0
    # the K smallest of exponential variables with these rates are a draw without replacement
    race = torch.empty(shape.T, shape.E, device=device).exponential_(generator=generator) / weight
    if load == "one80":
        led = torch.rand(shape.T, device=device, generator=generator) < 0.8
        race[led, shape.E - 1] = -1.0
    return race.topk(shape.K, largest=False).indices


@dataclass(frozen=True)
class Device:
    """FLOP/s of dense half precision, bytes/s, and vector instructions per second that a kernel can reach."""

    flops: float
    bandwidth: float
    instructions: float


# Issued instructions of one activation, compiled for sm_90, or eight per exponential or reciprocal if that is more.
ACTIVATION_COST = {"none": 0, "relu": 1, "silu": 16, "gelu": 10, "gelu_tanh": 12}


def bounds_ms(shape: Shape, limits: Device, backward: bool) -> dict[str, float]:
    """Lower bounds of the time of a fused layer in half precision: memory, tensor cores, activations on vector units.

    Forward bytes: x read and y written per assignment, routing weights, parameters, the combine. With `backward`
    forward and backward together: also x and dy read, dx written, weights read and their gradients written; a backward
    pass has twice the products of the forward, and where the layer is fused (widths to 256) the first of them again.
    """
    n = shape.T * shape.K
    weights = shape.E * shape.D * shape.F * (3 if shape.gated else 2)
    moved = 2 * (2 * n * shape.D + weights) + 8 * n
    work, activations = shape.flops, n * shape.F * ACTIVATION_COST[shape.activation]
    if shape.K > 1:
        moved += 2 * (n * shape.D + shape.T * shape.D)  # combine
    if backward:
        moved += 2 * (4 * n * shape.D + 2 * weights) + 8 * n
        again = (2 / 3 if shape.gated else 1 / 2) if shape.D <= 256 else 0
        work, activations = work * (3 + again), activations * 3
    return {
        "memory": 1e3 * moved / limits.bandwidth,
        "tensor_cores": 1e3 * work / limits.flops,
        "activations": 1e3 * activations / limits.instructions,
    }


# Prompts, scales and channels of the fusion head over 96³ voxels; the first has a target.
HEADS = ((32, 5, 8), (32, 1, 8), (32, 5, 16), (32, 5, 32))


def head_name(prompts: int, scales: int, channels: int) -> str:
    """The name of a head's step in the results."""
    return f"head P={prompts} S={scales} C={channels}"


def head_bounds_ms(
    prompts: int, scales: int, channels: int, voxels: int, limits: Device, backward: bool
) -> dict[str, float]:
    """Lower bounds of the time of the fusion head in float32: memory, and arithmetic on vector units (two FLOP each).

    Forward: features read, logits written. With `backward` forward and backward together: also features and the
    logits' gradients read, the features' gradients written; the products of the forward again and two for each.
    """
    features, logits = scales * channels * voxels, prompts * voxels
    fusion = 4 * scales * channels if scales > 1 else 0
    work = logits * (fusion + 4 * channels**2 + 2 * channels)
    moved = 4 * (features + logits)
    if backward:
        moved, work = moved + 4 * (2 * features + logits), 4 * work
    return {"memory": 1e3 * moved / limits.bandwidth, "arithmetic": 1e3 * work / 2 / limits.instructions}
