"""Probabilities of prompts on the scan's own grid, in steps of 1/255."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from mome.errors import InputError
from mome.inference.meant_name import meant_name
from mome.labels import load_table

# A lower logit has a probability that rounds to 0 of 255, so that nothing of it is stored.
LOWEST_LOGIT = math.log(0.5 / 254.5)


class ProbabilityMaps(Mapping[str, np.ndarray]):
    """Prompt → probability × 255, uint8 (i, j, k), rounded; it is assembled at every access, 1 byte per voxel.

    Probabilities are the sigmoid of the logits after averaging over tiles and resampling. Between accesses only voxels
    of at least 1/510 are kept, compressed. 128 and more is exactly where the mask is: the mask's logits are above 0.

    Args:
        names: The prompts whose maps are asked.
        shape: Voxels of the scan (i, j, k).
    """

    def __init__(self, names: list[str], shape: tuple[int, int, int]) -> None:
        self.names, self.shape = names, shape
        self._parts: dict[str, list[tuple[tuple[int, int, int], tuple[int, ...], bytes]]] = {n: [] for n in names}

    def write_box(self, name: str, first: tuple[int, int, int], block: np.ndarray) -> None:
        """Stores the values of one prompt inside of a box; where boxes overlap, the larger value holds.

        Args:
            name: The prompt.
            first: The first voxel (i, j, k) of the box.
            block: uint8, on the scan's axes.
        """
        if block.any():
            data = zlib.compress(np.asfortranarray(block).tobytes(order="F"), 1)
            self._parts[name].append((first, block.shape, data))

    def __getitem__(self, name: str) -> np.ndarray:
        """Returns the map of a prompt, by its name or a synonym: uint8, the probability × 255.

        Raises:
            KeyError: There is no such map; the message names the maps there are.
        """
        name = self._name_of(name)
        out = np.zeros(self.shape, dtype=np.uint8)
        for first, shape, data in self._parts[name]:
            place = tuple(slice(at, at + side) for at, side in zip(first, shape, strict=True))
            values = np.frombuffer(zlib.decompress(data), dtype=np.uint8).reshape(shape, order="F")
            np.maximum(out[place], values, out=out[place])
        return out

    def __contains__(self, key: object) -> bool:
        try:  # the method of `Mapping` would assemble a map for its answer
            return self._name_of(key) in self._parts  # type: ignore[arg-type]
        except KeyError:
            return False

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def _name_of(self, key: str) -> str:
        return meant_name(key, self.names, "map of probabilities")


def asked_names(asked: bool | Sequence[str], names: Sequence[str]) -> list[str]:
    """Returns the names of the prompts whose probabilities are asked, each once.

    Args:
        asked: True for all, False for none, or names, synonyms, pairs and groups.
        names: The names of the prompts.

    Raises:
        InputError: A name is none of the prompts'.
    """
    if isinstance(asked, bool):
        return list(names) if asked else []
    chosen = [asked] if isinstance(asked, str) else list(asked)
    found: list[str] = []
    for name in chosen:
        # A pair or group, such as "kidneys", stands for several of the prompts.
        meant = [name] if name in names else [each for each in _names_of(name) if each in names]
        if not meant:
            raise InputError(
                f"probabilities are asked of {name!r:.60}, which is no prompt here",
                hint="names of prompts, as in " + ", ".join(names[:5]),
            )
        found += meant
    return list(dict.fromkeys(found))


def _names_of(text: str) -> tuple[str, ...]:
    try:
        return load_table().names_of(text)
    except (InputError, AttributeError):  # empty, or no text
        return ()


def quantised(logits: Tensor) -> Tensor:
    """Returns sigmoid(logits) × 255 as uint8: 128 and more where a logit is above 0, 127 and less elsewhere."""
    values = torch.sigmoid(logits).mul_(255).round_().clamp_(0, 255).to(torch.uint8)
    is_above = logits > 0
    return torch.where(is_above, values.clamp(min=128), values.clamp(max=127))
