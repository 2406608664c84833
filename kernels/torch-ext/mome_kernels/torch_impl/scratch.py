"""Work buffers that the next block uses again.

A fresh allocation is not in any cache, and the operating system zeroes its pages first, which costs more than most of
the arithmetic on them.
"""

from __future__ import annotations

import math

from torch import Tensor


class Scratch:
    """Buffers by name, each as large as the largest request so far. The next request of a name overwrites it.

    Args:
        like: A tensor with the dtype and device of the buffers.
        largest: The most rows that `rows` will be asked for, so that its buffers never have to grow.
    """

    def __init__(self, like: Tensor, largest: int = 0) -> None:
        self.like, self.largest = like, largest
        self.held: dict[str | tuple[str, int], Tensor] = {}

    def __call__(self, name: str, *shape: int) -> Tensor:
        """A buffer of this shape; its contents are undefined."""
        size = math.prod(shape)
        if name not in self.held or self.held[name].numel() < size:
            self.held[name] = self.like.new_empty(size)
        return self.held[name][:size].view(shape)

    def rows(self, name: str, count: int, width: int) -> Tensor:
        """A slice (count, width) of a buffer of that width; for many small blocks of few widths."""
        buffer = self.held.get((name, width))
        if buffer is None or buffer.shape[0] < count:
            buffer = self.held[name, width] = self.like.new_empty(max(count, self.largest), width)
        return buffer[:count]
