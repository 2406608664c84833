"""Where a model's name leads: an existing folder, a checkpoint inside the package, else a Hub id."""

from __future__ import annotations

import difflib
import re
from pathlib import Path

from mome.errors import InputError
from mome.zoo import BUNDLED, PRESETS, bundled_models

# Written beside every saved model, so that AutoModel(trust_remote_code=True) finds the package, or says what to
# install: transformers checks the imports of such a file before it runs it.
STUB_NAME = "modeling_mome.py"
STUB = '"""Needs the package: pip install mome."""\n\nfrom mome.auto import MoME, MoMEConfig\n'
AUTO_MAP = {"AutoConfig": "modeling_mome.MoMEConfig", "AutoModel": "modeling_mome.MoME"}


def locate(name: str | Path) -> str:
    """A folder's path, or a Hub id as it is.

    Raises:
        InputError: Neither a folder, nor bundled, nor the form of a Hub id.
    """
    text = str(name)
    if Path(text).is_dir():
        if not (Path(text) / "config.json").is_file():
            raise InputError("the folder holds no model: it has no config.json", where=text)
        return text
    if text in bundled_models():
        return str(BUNDLED / text)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", text) and not text.startswith((".", "/")):
        return text
    known = [*bundled_models(), *PRESETS]
    close = difflib.get_close_matches(text, known, n=1)
    if text in PRESETS:
        raise InputError(
            f"'{text}' is a preset without a bundled checkpoint",
            hint=f"mome.create_model('{text}') has random weights",
        )
    raise InputError(
        f"no model '{text}': no such folder, and it is not bundled"
        + (f"; did you mean '{close[0]}'?" if close else ""),
        hint="bundled: " + (", ".join(bundled_models()) or "none") + "; a Hub id is written org/name",
    )
