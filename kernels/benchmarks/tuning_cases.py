"""The launches that a row of a configuration table is tuned on: those of the benchmark's layers that select the row.

A layer's products are planned as in `gpu.experts`, without biases and with the shape's own load of experts. On meta
tensors the same plans are compiled without a device.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from mome_kernels.gpu import configs, fused, fused_backward, grouped_gradient, grouped_linear, routing
from mome_kernels.gpu.launch import Launch, Machine, ceil_div
from mome_kernels.weights import ExpertWeights
from shapes import Shape, expert_ids
from torch import Tensor

Config = dict[str, Any]
Row = tuple[str, int]  # a kernel and the row's place in its table


@dataclass(frozen=True)
class Case:
    """A fused kernel of a layer, or one `product` of a layer that runs as grouped matrix products."""

    kernel: str
    shape: Shape
    product: str = ""

    @property
    def name(self) -> str:
        return f"{self.shape.name} {self.product}".strip()


def config_of(row: Config) -> Config:
    """The configuration of a row, without its bounds."""
    return {key: value for key, value in row.items() if key != "up_to"}


@contextmanager
def overridden(machine: Machine, row: Row, config: Config) -> Iterator[None]:
    """Replaces the configuration of a row in the cached table, and restores it afterwards."""
    kernel, index = row
    entry = configs.table(machine.arch)[kernel][index]
    shipped = dict(entry)
    try:
        entry.update(config)
        yield
    finally:
        entry.clear()
        entry.update(shipped)


def cases(shape: Shape, machine: Machine, size: int) -> Iterator[Case]:
    """All launches of a layer that use a row, in inference and in training; `size` is the bytes of a number."""
    d, f = shape.D, shape.F
    runs = {
        kernel: configs.fused(machine, kernel, d, f, size, shape.gated) is not None
        for kernel in ("mlp", "mlp_dx", "mlp_dw")
    }
    keeps = d > (256 if size == 2 else 64)  # z is then kept for the backward pass
    if runs["mlp"]:
        yield Case("mlp", shape)
    else:
        yield Case("linear", shape, "up")
        yield Case("linear", shape, "down")
    if keeps:
        yield Case("linear", shape, "up with z")
    if runs["mlp_dx"] and runs["mlp_dw"]:
        yield Case("mlp_dx", shape)
        yield Case("mlp_dw", shape)
        return
    if not keeps:
        yield Case("linear", shape, "z")
    yield Case("linear", shape, "dh")
    yield Case("linear", shape, "dx")
    yield Case("dw", shape, "d_up")
    yield Case("dw", shape, "d_down")


def _sizes(case: Case) -> tuple[int, int, bool, bool]:
    """Output columns, inner length, gated and epilogue of a grouped product."""
    shape = case.shape
    d, f, width = shape.D, shape.F, shape.F * (2 if shape.gated else 1)
    epilogue = shape.activation != "none" or shape.gated
    return {
        "up": (f, d, shape.gated, epilogue),
        "up with z": (f, d, shape.gated, True),
        "down": (d, f, False, False),
        "z": (width, d, False, False),
        "dh": (f, d, False, False),
        "dx": (d, width, False, False),
        "d_up": (width, d, False, False),
        "d_down": (d, f, False, False),
    }[case.product]


def row_of(case: Case, machine: Machine, size: int) -> Row:
    """The row that a case selects."""
    row: Config | None
    if case.kernel in ("linear", "dw"):
        n, k, gated, epilogue = _sizes(case)
        linear = case.kernel == "linear"
        row = configs.linear(machine, n, k, size, gated, epilogue) if linear else configs.dw(machine, n, k, size)
    else:
        row = configs.fused(machine, case.kernel, case.shape.D, case.shape.F, size, case.shape.gated)
    table = configs.table(machine.arch)[case.kernel]
    return case.kernel, next(i for i, other in enumerate(table) if other is row)


def rows(shapes: Iterable[Shape], machine: Machine, size: int) -> dict[Row, list[Case]]:
    """The rows that these shapes select, in the order of the shapes, each with its cases."""
    found: dict[Row, list[Case]] = {}
    for shape in shapes:
        for case in cases(shape, machine, size):
            found.setdefault(row_of(case, machine, size), []).append(case)
    return found


class Bench:
    """The tensors of a case on a device, used for all configurations; its launches fill `outputs`."""

    def __init__(self, case: Case, device: str, dtype: torch.dtype) -> None:
        self.case, self.device, self.dtype = case, device, dtype
        shape = case.shape
        t, d, f, e = shape.T, shape.D, shape.F, shape.E
        self.assignments, self.per_token, self.width = t * shape.K, shape.K, f * (2 if shape.gated else 1)
        n = self.assignments
        torch.manual_seed(0)
        self.weights_TK = torch.rand(t, shape.K, device=device)
        if device == "meta":
            self.slots, self.offsets = (torch.empty(m, dtype=torch.int32, device=device) for m in (n, e + 1))
        else:
            order = routing.route(expert_ids(shape, shape.load, device), e)
            self.slots, self.offsets = order.permutation, order.offsets
        product, fused_case = case.product, not case.product
        needs = lambda *names: fused_case or product in names  # noqa: E731
        tokens = lambda: self._random(t, d)  # noqa: E731
        # only tensors that the case reads, since all tensors of the largest layers exceed the memory of a device
        self.x = tokens() if needs("up", "up with z", "z", "d_up") else None
        self.grad = tokens() if needs("dh", "d_down") else None
        self.hidden = self._random(n, f) if product in ("down", "d_down") else None
        self.dz = self._random(n, self.width) if product in ("dx", "d_up") else None
        self.up = self._random(e, self.width, d) * d**-0.5 if needs("up", "up with z", "z", "dx") else None
        self.down = self._random(e, d, f) * f**-0.5 if needs("down", "dh") else None
        scattered = (t if shape.K == 1 else n, d)
        grouped_sizes: dict[str, list[tuple[int, ...]]] = {
            "up": [(n, f)], "up with z": [(n, f), (n, self.width)], "down": [scattered], "z": [(n, self.width)],
            "dh": [(n, f)], "dx": [(n, d)], "d_up": [(e, self.width, d)], "d_down": [(e, d, f)],
        }  # fmt: skip
        fused_sizes: dict[str, list[tuple[int, ...]]] = {
            "mlp": [scattered], "mlp_dx": [(n, d)], "mlp_dw": [(e, self.width, d), (e, d, f)],
        }  # fmt: skip
        sizes = fused_sizes[case.kernel] if fused_case else grouped_sizes[product]
        self.outputs = [torch.empty(size, dtype=dtype, device=device) for size in sizes]
        if case.kernel == "mlp_dx":
            self.outputs.append(torch.empty_like(self.weights_TK))

    def _random(self, *size: int) -> Tensor:
        return torch.randn(*size, dtype=self.dtype, device=self.device)

    def _tiles(self, height: int) -> routing.Tiles:
        launch, tiles = routing.plan_tiles(self.offsets, self.assignments, height)
        if self.device != "meta":
            launch.run()
        return tiles

    def _parts(self, tiles: routing.Tiles, *size: int) -> Tensor:
        return torch.empty(tiles.bound, *size, dtype=torch.float32, device=self.device)

    def plan(self, machine: Machine) -> list[Launch]:
        """The launches of the case with the current tables."""
        if self.case.kernel == "linear":
            return [self._linear(machine)]
        if self.case.kernel == "dw":
            return self._dw(machine)
        return self._fused(machine)

    def _fused(self, machine: Machine) -> list[Launch]:
        shape, kernel = self.case.shape, self.case.kernel
        size, n = self.dtype.itemsize, self.assignments
        config = configs.fused(machine, kernel, shape.D, shape.F, size, shape.gated)
        experts = ExpertWeights(self.up, None, self.down, None, shape.activation, shape.gated)
        assignments = (experts, self.weights_TK, self.slots, self.offsets)
        if kernel == "mlp_dw":
            height = grouped_gradient.rows_per_split(machine, n, ceil_div(shape.F, config["BF"])) or n
            tiles = self._tiles(height)
            numbers = [out[0].numel() for out in self.outputs]
            parts = self._parts(tiles, sum(numbers))
            launch = fused_backward.plan_dw(self.grad, self.x, *assignments, tiles, parts, machine)
            starts = (parts.view(-1), parts.view(-1)[numbers[0] :])
            # the number of partial sums, and with it the second kernel, depends on BF
            return [launch] + [
                grouped_gradient.plan_sum(start, tiles, out, parts.shape[1])
                for start, out in zip(starts, self.outputs, strict=True)
            ]
        tiles = self._tiles(fused.rows_per_program(machine, config, n))
        scatter, (out, *rest) = self.per_token == 1, self.outputs
        if kernel == "mlp":
            return [fused.plan_forward(self.x, *assignments, tiles, out, machine, scatter=scatter)]
        return [fused_backward.plan_dx(self.grad, self.x, *assignments, tiles, out, *rest, machine, scatter=scatter)]

    def _linear(self, machine: Machine) -> Launch:
        shape, product = self.case.shape, self.case.product
        _, _, gated, epilogue = _sizes(self.case)
        a = {"down": self.hidden, "dh": self.grad, "dx": self.dz}.get(product, self.x)
        weight = self.down if product in ("down", "dh") else self.up
        options: dict[str, Any] = {"transpose": product in ("dh", "dx"), "gated": gated}
        if product in ("up", "up with z"):
            options["activation"] = shape.activation
        if product == "up with z":
            options["z_out"] = self.outputs[1]
        if product in ("up", "up with z", "z", "dh"):
            options |= {"gather": True, "slots": self.slots, "per_token": self.per_token}
        if product == "down":
            single = self.per_token == 1
            options |= {"slots": self.slots, "scatter": single, "weights_TK": self.weights_TK if single else None}
        height = grouped_linear.rows_per_tile(
            machine, weight, self.dtype.itemsize, options["transpose"], gated, epilogue
        )
        tiles = self._tiles(height)
        return grouped_linear.plan_linear(a, weight, None, tiles, self.offsets, self.outputs[0], machine, **options)

    def _dw(self, machine: Machine) -> list[Launch]:
        up, (n, k, _, _), experts = self.case.product == "d_up", _sizes(self.case), self.case.shape.E
        dy, x = (self.dz, self.x) if up else (self.grad, self.hidden)
        options: dict[str, Any] = {"slots": self.slots, "per_token": self.per_token}
        options |= {"gather_x": True} if up else {"gather_y": True, "weights_TK": self.weights_TK}
        config = configs.dw(machine, n, k, self.dtype.itemsize)
        programs = ceil_div(n, config["BN"]) * ceil_div(k, config["BK"])
        few = experts * programs < 4 * machine.processors
        height = grouped_gradient.rows_per_split(machine, self.assignments, programs) if few else 0
        if not height:
            return [grouped_gradient.plan_dw(dy, x, self.offsets, self.outputs[0], None, machine, **options)]
        tiles = self._tiles(height)
        parts = self._parts(tiles, n, k)
        launch = grouped_gradient.plan_dw(dy, x, self.offsets, parts, None, machine, tiles=tiles, **options)
        return [launch, grouped_gradient.plan_sum(parts, tiles, self.outputs[0], n * k)]
