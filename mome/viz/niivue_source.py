"""The source of NiiVue, the viewer that HTML pages carry; `mome/viz/niivue/README.md` says where it comes from."""

from __future__ import annotations

import gzip
import hashlib
from functools import lru_cache
from pathlib import Path

VERSION = "0.69.0"
SHA256 = "47b896b77ec4a5be3ef1949c33ad393b6f45629921f326c279000bcf51bdb4af"
_FOLDER = Path(__file__).parent / "niivue"


@lru_cache(maxsize=1)
def niivue_source() -> str:
    """Returns the JavaScript of NiiVue as one classic script (2.3 MB), which defines the global `niivue`.

    Raises:
        RuntimeError: The installed file is not the one that belongs to this version.
    """
    script = gzip.decompress((_FOLDER / "niivue.umd.js.gz").read_bytes())
    if hashlib.sha256(script).hexdigest() != SHA256:
        raise RuntimeError(f"{_FOLDER / 'niivue.umd.js.gz'} is damaged; install mome again")
    return script.decode("utf-8")


def niivue_licences() -> str:
    """Returns the licences of NiiVue and of the libraries inside it."""
    return (_FOLDER / "LICENSE").read_text(encoding="utf-8")
