"""Random arguments of the ops, and the comparison of two implementations."""

from __future__ import annotations

import torch


def assignments(tokens: int, experts: int, k: int, load: str) -> torch.Tensor:
    """Ids (T, K): uniform, skewed to the first experts, all to the last one, or with an expert without tokens."""
    generator = torch.Generator().manual_seed(0)
    if load == "one":
        return torch.full((tokens, k), experts - 1)
    scores = torch.rand(tokens, experts, generator=generator)
    if load == "zipf":
        scores = scores * torch.arange(1, experts + 1).float() ** -1.5
    if load == "empty":
        scores[:, 0] = -1
    return scores.topk(k, dim=-1).indices


def mlp_inputs(gated: bool, bias: bool, load: str, dtype: torch.dtype = torch.float64, tokens: int = 53) -> list:
    torch.manual_seed(0)
    d, e, k, f = 5, 4, 2, 7
    leaf = lambda *shape: torch.randn(*shape, dtype=dtype, requires_grad=True)  # noqa: E731
    width = 2 * f if gated else f
    weights_TK = torch.rand(tokens, k, dtype=torch.promote_types(dtype, torch.float32), requires_grad=True)
    return [
        leaf(tokens, d),
        assignments(tokens, e, k, load),
        weights_TK,
        leaf(e, width, d),
        leaf(e, width) if bias else None,
        leaf(e, d, f),
        leaf(e, d) if bias else None,
    ]


def head_inputs(scales: int = 3, batch: int = 2, prompts: int = 3, c: int = 4, voxels: int = 700, dtype=torch.float64):
    torch.manual_seed(0)
    leaf = lambda *shape: torch.randn(*shape, dtype=dtype, requires_grad=True)  # noqa: E731
    return [
        leaf(batch, scales, c, voxels),
        leaf(prompts, c),
        leaf(prompts, scales),
        leaf(batch, prompts, c, c),
        leaf(batch, prompts, c),
        leaf(batch, prompts, c, c),
        leaf(batch, prompts, c),
        leaf(batch, prompts, c),
        leaf(batch, prompts),
    ]


def same_values_and_gradients(fast, plain, inputs: list, **options: object) -> None:
    ours, expected = fast(*inputs, **options), plain(*inputs, **options)
    torch.testing.assert_close(ours, expected)
    leaves = [t for t in inputs if torch.is_tensor(t) and t.requires_grad]
    grad = torch.randn_like(ours)
    got = torch.autograd.grad(ours, leaves, grad)
    want = torch.autograd.grad(expected, leaves, grad, allow_unused=True)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b)
