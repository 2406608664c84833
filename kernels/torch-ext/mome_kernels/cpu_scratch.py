"""Work buffers of the CPU code, taken again by the next block: what an allocator hands out afresh is in no cache, and
its pages are zeroed by the system first, which costs more than most of what is computed in them.
"""

from __future__ import annotations

import math

from torch import Tensor


class Scratch:
    """Buffers by name, as large as the largest that was asked for. What they hold is lost with the next block.

    Args:
        like: Its dtype and device.
        largest: Of `rows`, the most that will be asked for: a buffer that grew would be a fresh one each time.
    """

    def __init__(self, like: Tensor, largest: int = 0) -> None:
        self.like, self.largest = like, largest
        self.held: dict[str | tuple[str, int], Tensor] = {}

    def __call__(self, name: str, *shape: int) -> Tensor:
        size = math.prod(shape)
        if name not in self.held or self.held[name].numel() < size:
            self.held[name] = self.like.new_empty(size)
        return self.held[name][:size].view(shape)

    def rows(self, name: str, count: int, width: int) -> Tensor:
        """(count, width), for many small blocks of few widths: one slice of a buffer of that width."""
        buffer = self.held.get((name, width))
        if buffer is None or buffer.shape[0] < count:
            buffer = self.held[name, width] = self.like.new_empty(max(count, self.largest), width)
        return buffer[:count]
