"""Files that allocate no more than they hold."""

from __future__ import annotations

import io
import os
from pathlib import Path

from mome.volumes.dicom.deflated import check_inflated_size


class BoundedFile(io.BufferedReader):
    """A file open for reading whose `read` asks for no more bytes than follow.

    Python allocates as many bytes as are asked for before it reads. A damaged element may have a length of up to 4 GB.
    Where the rest of a file is read at once, it is taken for deflated, and checked by `check_inflated_size`.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path))
        self._size = os.fstat(self.fileno()).st_size

    def read(self, size: int | None = -1, /) -> bytes:
        """Returns at most `size` bytes.

        Raises:
            DamagedFile: The rest of the file is asked for, and inflates to more than its header accounts for.
        """
        if size is None or size < 0:
            # pydicom reads the rest of a file at once only where it is deflated, and inflates it then.
            rest = super().read()
            check_inflated_size(rest)
            return rest
        return super().read(min(size, max(0, self._size - self.tell())))
