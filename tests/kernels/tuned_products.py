"""Compares the launches of `tuning_cases`, run by Triton's interpreter, with plain torch; prints one JSON line.

`test_kernels_tuning.py` runs this in a separate process, since the interpreter must be requested before the kernels are
imported.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import silu

sys.path.insert(0, str(Path(__file__).parents[2] / "kernels" / "benchmarks"))

from mome_kernels.gpu.launch import Machine
from shapes import SHAPES
from tuning_cases import Bench, cases

MACHINE = Machine("sm_90", 132)
# layers that run fused, fused in the forward pass only, and as grouped products; with two experts per token and one
LAYERS = [
    replace(SHAPES["V13"], T=50, D=16, F=20, E=4, K=2),
    replace(SHAPES["V13"], T=50, D=16, F=20, E=4, K=1),
    replace(SHAPES["V13"], T=50, D=64, F=20, E=4, K=1),
    replace(SHAPES["L5"], T=50, D=72, F=24, E=4, K=2),
    replace(SHAPES["L5"], T=50, D=72, F=24, E=4, K=1),
]


def _sums(rows: Tensor, left: Tensor, bench: Bench) -> Tensor:
    """Σ left rowsᵀ over the rows of every expert."""
    bounds = bench.offsets.tolist()
    return torch.stack([left[a:b].T @ rows[a:b] for a, b in zip(bounds, bounds[1:], strict=False)])


def expected(bench: Bench) -> list[Tensor]:
    """The outputs by the definition of the product."""
    shape, product = bench.case.shape, bench.case.product or bench.case.kernel
    slots = bench.slots.long()
    token = slots // shape.K
    expert = torch.repeat_interleave(torch.arange(shape.E), bench.offsets.long().diff())
    weight = bench.weights_TK.flatten()[slots, None]
    times = lambda rows, matrices: torch.einsum("nk,nok->no", rows, matrices[expert])  # noqa: E731
    back = lambda rows, matrices: torch.einsum("nk,nko->no", rows, matrices[expert])  # noqa: E731

    def placed(rows: Tensor) -> Tensor:
        """Rows in expert order; with one expert per token, at their token and times its routing weight."""
        if shape.K > 1:
            return rows
        return torch.empty_like(rows).index_copy(0, token, rows * weight)

    if product in ("up", "up with z", "z"):
        z = times(bench.x[token], bench.up)
        first, second = z.chunk(2, 1)
        h = silu(first) * second
        return {"up": [h], "up with z": [h, z], "z": [z]}[product]
    if product == "down":
        return [placed(times(bench.hidden, bench.down))]
    if product == "dh":
        return [back(bench.grad[token], bench.down)]
    if product == "dx":
        return [back(bench.dz, bench.up)]
    if product == "d_up":
        return [_sums(bench.x[token], bench.dz, bench)]
    if product == "d_down":
        return [_sums(bench.hidden, bench.grad[token] * weight, bench)]
    x, up, down = (t.detach().clone().requires_grad_() for t in (bench.x[token], bench.up, bench.down))
    weights_TK = weight.detach().clone().requires_grad_()
    first, second = torch.einsum("nk,nok->no", x, up[expert]).chunk(2, 1)
    y = torch.einsum("nk,nok->no", silu(first) * second, down[expert])
    if product == "mlp":
        return [placed(y)]
    dx, d_weights, d_up, d_down = torch.autograd.grad(y * weights_TK, [x, weights_TK, up, down], bench.grad[token])
    if product == "mlp_dw":
        return [d_up, d_down]
    at = dx if shape.K > 1 else torch.empty_like(dx).index_copy(0, token, dx)
    d_weights_TK = torch.empty_like(bench.weights_TK)
    d_weights_TK.view(-1).index_copy_(0, slots, d_weights[:, 0])
    return [at, d_weights_TK]


def main() -> None:
    errors: dict[str, float] = {}
    for shape in LAYERS:
        for case in cases(shape, MACHINE, 4):
            bench = Bench(case, "cpu", torch.float32)
            for out in bench.outputs:
                out.fill_(float("nan"))
            for launch in bench.plan(MACHINE):
                launch.run()
            pairs = zip(bench.outputs, expected(bench), strict=True)
            every = torch.stack([(out - right).abs().max() / right.abs().max() for out, right in pairs])
            name = f"{case.kernel} {case.product} D={shape.D} K={shape.K}"
            errors[name] = float(every.nan_to_num(nan=1.0).max())
    print(json.dumps(errors))


if __name__ == "__main__":
    main()
