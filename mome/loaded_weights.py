"""Looks at the numbers of weights after they were loaded: damage that names, types and shapes do not show."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mome.errors import InputError
from mome.labels import load_table

# Names that are spelled at least this much alike are taken for typos (Python's difflib; our choice): "splene" is one of
# the spleen, "plaque_left" none of lung_left.
_TYPO = 0.8
# A disk or a download loses blocks of 4,096 bytes or more, which are this many numbers in float32.
_SHORTEST_BLOCK = 1_000
_COPY = "copy or download the checkpoint again; MoME.from_pretrained(…, allow_damaged=True) loads it as it is"


def damage_of(model: nn.Module, names: Iterable[str], fresh: Callable[[], nn.Module]) -> str | None:
    """Says what is wrong with the loaded numbers; None where nothing is.

    Zeros are compared with a new model: biases begin at zero, and so may weights of some parts.

    Args:
        model: The loaded model.
        names: Its tensors that were read from the checkpoint.
        fresh: Makes a new model of the same config; called only where a tensor has many zeros.
    """
    tensors = {name: tensor for name, tensor in _readable(model).items() if name in set(names)}
    broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        return f"{len(broken)} of {len(tensors)} tensors hold NaN or infinite numbers: {shown(broken)}"
    zero = [name for name, tensor in tensors.items() if _may_not_be_zero(name, tensor)]
    blocks = {name: block for name, tensor in tensors.items() if (block := _zero_block(tensor)) is not None}
    if not zero and not blocks:
        return None
    with torch.random.fork_rng(devices=[]):
        new = _readable(fresh())
    zero = [name for name in zero if name in new and new[name].any()]
    if zero:
        return f"{len(zero)} of {len(tensors)} tensors of weights hold zeros only: {shown(zero)}"
    lost = [name for name, block in blocks.items() if name in new and new[name].reshape(-1)[block].any()]
    if lost:
        return f"{len(lost)} of {len(tensors)} tensors hold a block of zeros, as a damaged disk leaves: {shown(lost)}"
    return None


def refuse_damage(model: nn.Module, names: Iterable[str], fresh: Callable[[], nn.Module], where: str) -> None:
    """Checks the loaded numbers.

    Args:
        model, names, fresh: See `damage_of`.
        where: The checkpoint, for the error.

    Raises:
        InputError: A tensor holds NaN or infinite numbers, or zeros where a new model has none.
    """
    damage = damage_of(model, names, fresh)
    if damage is not None:
        raise InputError(damage, where=where, hint=_COPY)


def unused_note(stored: Iterable[str], used: Mapping[str, object]) -> list[str]:
    """Returns a note that names the tensors of a checkpoint which no model of its config has."""
    unused = sorted(name for name in stored if name not in used)
    return [f"{len(unused)} tensors of the checkpoint are not used: {shown(unused)}"] if unused else []


def unknown_label_notes(trained_labels: Iterable[str]) -> list[str]:
    """Returns a note on trained labels that are typos or synonyms of the class table's, which make a structure unknown.

    Other labels that the class table does not have are structures of the model's own.
    """
    table, notes = load_table(), []
    for name in trained_labels:
        if name in table or not name.strip():
            continue
        meant = table.resolve(name).names or get_close_matches(name[:60], table.names(), n=1, cutoff=_TYPO)
        if meant:
            notes.append(
                f"the checkpoint calls itself trained on {name!r:.60}, which the class table does not have, "
                f"did you mean {meant[0]!r}?"
            )
    return notes


def shown(names: list[str]) -> str:
    """Returns the first names of a list."""
    return ", ".join(sorted(names)[:4]) + (", …" if len(names) > 4 else "")


def _readable(model: nn.Module) -> dict[str, Tensor]:
    """The floating-point tensors whose values are in memory; offloaded and quantised ones are left out.

    Of a tensor that is spread over processes it is the part of this process.
    """
    tensors = {
        name: tensor.to_local() if isinstance(tensor, DTensor) else tensor
        for name, tensor in model.state_dict().items()
    }
    return {
        name: tensor
        for name, tensor in tensors.items()
        if type(tensor) is Tensor and not tensor.is_meta and tensor.is_floating_point()
    }


def _may_not_be_zero(name: str, tensor: Tensor) -> bool:
    """Whether a tensor is all zero and should perhaps not be. Rows of the text bank are zero until they are set."""
    never = name.endswith("bias") or name in ("text_bank.rows_LT", "text_bank.mean_T")
    return not never and tensor.numel() > 0 and not tensor.any()


def _zero_block(tensor: Tensor) -> slice | None:
    """Returns where a long run of zeros lies in the flat tensor; None where there is none.

    A file of which a block was lost has zeros from one place to another, whatever the shapes are. Zeros of whole rows
    or kernels were put there on purpose, as by pruning.
    """
    zeros = (tensor.detach().reshape(-1) == 0).nonzero().reshape(-1)
    if not _SHORTEST_BLOCK <= len(zeros) < tensor.numel():
        return None
    starts = torch.cat([zeros.new_zeros(1), (zeros.diff() != 1).nonzero().reshape(-1) + 1])
    lengths = torch.diff(starts, append=starts.new_tensor([len(zeros)]))
    longest = int(lengths.argmax())
    begin, length = int(zeros[starts[longest]]), int(lengths[longest])
    unit = math.prod(tensor.shape[-1:] if tensor.ndim <= 3 else tensor.shape[2:])
    is_whole = begin % unit == 0 and length % unit == 0
    return slice(begin, begin + length) if length >= _SHORTEST_BLOCK and not is_whole else None
