"""Files that allocate no more than they hold."""

from __future__ import annotations

import io
import os
from pathlib import Path


class BoundedFile(io.BufferedReader):
    """A file open for reading whose `read` asks for no more bytes than follow.

    Python allocates as many bytes as are asked for before it reads. A damaged element may have a length of up to 4 GB.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path))
        self._size = os.fstat(self.fileno()).st_size

    def read(self, size: int | None = -1, /) -> bytes:
        """Returns at most `size` bytes."""
        if size is None or size < 0:
            return super().read()
        return super().read(min(size, max(0, self._size - self.tell())))
