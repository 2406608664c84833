"""A program that `torch.export.save` wrote, as a whole-model expert."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mome.errors import InputError
from mome.experts.whole_model import WholeModel, path_of


class ExportedNetwork(nn.Module):
    """The module of an exported program. It is always in the mode that it was exported in."""

    def __init__(self, program: Any, settings: str) -> None:
        super().__init__()
        self.program = program.module()
        self.settings = settings
        self.sizes = _input_sizes(program)
        self.train(False)

    def train(self, mode: bool = True) -> ExportedNetwork:
        """Sets no mode: an exported program has only one."""
        self.training = False
        return self

    def forward(self, volume_BCDHW: Tensor) -> Tensor:
        given = tuple(volume_BCDHW.shape)
        fits = len(given) == len(self.sizes) and all(n in (None, m) for n, m in zip(self.sizes, given, strict=True))
        if not fits:
            wanted = ", ".join("any" if side is None else str(side) for side in self.sizes)
            raise InputError(
                f"the exported program takes volumes ({wanted}), got {given}",
                hint=f"patch_size={[*self.sizes[2:]]}, or torch.export.export(…, dynamic_shapes=…) for other sizes",
            )
        return self.program(volume_BCDHW)


def exported_model(path: str | Path, classes: Sequence[str], **settings: Any) -> WholeModel:
    """Reads a .pt2 file as a frozen whole-model expert.

    The file is trusted: it holds a graph of operators that will run, and `torch.export.load` may read pickled
    metadata in it. Therefore the path comes from the user alone; no config and no checkpoint can name one.

    Args:
        path: The file, as the user typed it.
        classes, settings: See `WholeModel`. Images are run one by one where the program has batch size one.

    Raises:
        InputError: There is no such file, it is no exported program, or it takes no single volume.
    """
    file = path_of(path, "exported program")
    if "frozen" in settings and not settings["frozen"]:
        raise InputError("an exported program cannot be trained", where=str(path), hint="frozen=True")
    try:
        program = torch.export.load(str(file))
    except Exception as error:  # zip, JSON and schema errors of many types
        first = (str(error).splitlines() or [""])[0][:120]
        raise InputError(
            f"this is no program of torch.export: {type(error).__name__}: {first}",
            where=str(path),
            hint="torch.export.save(torch.export.export(network.eval(), (volume,)), 'network.pt2')",
        ) from error
    network = ExportedNetwork(program, hashlib.sha256(file.read_bytes()).hexdigest())
    if len(network.sizes) != 5:
        raise InputError(
            f"the exported program takes {network.sizes}, not one volume (B, C, D, H, W)",
            where=str(path),
            hint="export a module whose forward takes the volume alone",
        )
    one_by_one = network.sizes[0] == 1
    return WholeModel(network, classes, kind="export", one_by_one=one_by_one, **{**settings, "frozen": True})


def _input_sizes(program: Any) -> tuple[int | None, ...]:
    """The sides of the only input, None where a side is dynamic; empty where the inputs are not one tensor."""
    names = program.graph_signature.user_inputs
    values = [node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder" and node.name in names]
    if len(names) != 1 or len(values) != 1 or not isinstance(values[0], Tensor):
        return ()
    return tuple(side if type(side) is int else None for side in values[0].shape)
