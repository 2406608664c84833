"""Names of temporary files, from which a later run can tell whether the process that wrote them still lives.

A name is `.<host><process><start><random>.part<ending>`, each of the four as eight hexadecimal digits. Releases before
this scheme wrote sixteen random digits.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

_OURS = re.compile(r"\.(?:[0-9a-f]{16}|(?P<owner>[0-9a-f]{24})[0-9a-f]{8})\.part(?:\.[\w.]{1,12})?")
# Whether a process of another host lives cannot be asked; its files are taken for stale after this time.
_FOREIGN_AGE_S = 24 * 3600.0


def temporary_path(path: Path) -> Path:
    """Returns a temporary path beside `path`, with its ending, because some libraries choose a format by it."""
    ending = ".nii.gz" if path.name.endswith(".nii.gz") else path.suffix
    return path.with_name(f".{_owner(os.getpid())}{os.urandom(4).hex()}.part{ending}")


@contextlib.contextmanager
def temporary_folder() -> Iterator[Path]:
    """Yields a new folder of mode 0700 among the system's temporary files, and removes it at the end.

    Those of killed processes are removed, too, because scans of patients may be in them.
    """
    import shutil
    import tempfile

    base = Path(tempfile.gettempdir())
    remove_stale_parts(base, earlier_names=False)
    folder = temporary_path(base / "mome")
    folder.mkdir(mode=0o700)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def remove_stale_parts(folder: str | Path, *, earlier_names: bool = True) -> list[Path]:
    """Removes the temporary files and folders in `folder` whose process has ended, as after SIGKILL.

    Only names that `temporary_path` makes are considered. Files that cannot be removed stay.

    Args:
        folder: The folder.
        earlier_names: Also remove names of releases before this scheme, which do not say whose they are. In a folder
            that other programs use, such as the system's for temporary files, they stay.

    Returns:
        What was removed.
    """
    import shutil

    try:
        names = os.listdir(folder)
    except OSError:
        return []
    removed = []
    for name in names:
        path = Path(folder) / name
        found = _OURS.fullmatch(name)
        if found is None or path.is_symlink() or not (found["owner"] or earlier_names):
            continue
        if found["owner"] and not _is_stale(path, found["owner"]):
            continue
        with contextlib.suppress(OSError):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
            removed.append(path)
    return removed


def _is_stale(path: Path, owner: str) -> bool:
    """Says whether the process that `owner` describes has ended."""
    if owner[:8] != _host():
        try:
            return time.time() - path.lstat().st_mtime > _FOREIGN_AGE_S
        except OSError:
            return False
    return _owner(int(owner[8:16], 16)) != owner


def _owner(process: int) -> str:
    """Returns host, process and its start as 24 hexadecimal digits; the start is 0 where no such process runs."""
    return f"{_host()}{process & 0xFFFFFFFF:08x}{_started(process):08x}"


def _host() -> str:
    return f"{zlib.crc32(platform.node().encode()):08x}"


def _started(process: int) -> int:
    """Returns a number that differs between processes which had the same id; 0 where the process has ended."""
    try:
        # The start in clock ticks since boot is the 20th field after the command's closing parenthesis.
        stat = Path(f"/proc/{process}/stat").read_bytes().rpartition(b")")[2].split()
        return 0 if stat[0] in (b"Z", b"X") else int(stat[19]) & 0xFFFFFFFF or 1
    except OSError:
        pass
    if Path("/proc/self/stat").exists():
        return 0
    try:  # a system without /proc, such as macOS
        os.kill(process, 0)
    except ProcessLookupError:
        return 0
    except OSError:  # the process belongs to another user
        return 1
    return 1
