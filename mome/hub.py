"""Finds the place that a model's name means: an existing folder, a bundled checkpoint, else a Hub id.

The prefixes `local-dir:` and `hf-hub:` say which of them is meant. A Hub id may carry a revision, `org/name@rev`. In
bundled names - and _ are the same. A preset with the tag of its weights, `mome_ct_tiny.openkbp`, is a bundled name too.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from mome.errors import InputError, did_you_mean
from mome.presets import PRESETS, bundled_models, find_name
from mome.pretrained import bundled_folder

_MODEL_FOLDER = "a folder that mome train or MoME.save_pretrained wrote (of a run: its model/)"
_HUB_ID = re.compile(r"(?P<place>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")


class Source(NamedTuple):
    """The place of a model.

    Attributes:
        place: A folder's path or a Hub id, as transformers takes them.
        revision: Branch, tag or commit of a Hub id, or None.
    """

    place: str
    revision: str | None = None


def locate(
    name: str | Path,
    revision: str | None = None,
    subfolder: str | None = None,
    holding: Sequence[str] = ("config.json",),
) -> Source:
    """Finds the place that a name means.

    Args:
        name: A folder, a bundled name, a Hub id, or one of them with its prefix.
        revision: A revision given beside the name; it must not contradict `@rev`.
        subfolder: The folder inside a local folder that holds the model. That of a Hub id goes to transformers instead.
        holding: Files of which a local folder holds at least one. Of a Hub id, transformers finds out.

    Raises:
        InputError: The name is no folder, no bundled name and has not the form of a Hub id, or it has two revisions; or
            the folder holds none of the files.
    """
    text = str(name)
    if text.startswith("local-dir:"):
        return _folder(text.removeprefix("local-dir:"), subfolder, holding)
    if not text.startswith("hf-hub:"):
        if os.path.isfile(text):
            folder = Path(text).parent
            hint = str(folder) if _holds_one(folder, holding) else _MODEL_FOLDER
            raise InputError("a model is a folder, this is a file", where=text, hint=hint)
        if os.path.isdir(text):
            return _folder(text, subfolder, holding)
        bundled = bundled_folder(text)
        if bundled is not None:
            return _folder(str(bundled), subfolder, holding)
    if isinstance(name, Path):
        raise InputError("no such folder", where=text, hint="the name of a Hub model is a string, 'org/name'")
    found = _HUB_ID.fullmatch(text.removeprefix("hf-hub:"))
    if found and not found["place"].startswith("."):
        if found["revision"] and revision and found["revision"] != revision:
            raise InputError(f"two revisions: {revision!r}, and {found['revision']!r} in the name", where=text)
        return Source(found["place"], found["revision"] or revision)
    if text.startswith("hf-hub:"):
        raise InputError(f"'{text}' is not a Hub id", hint="hf-hub:org/name, or hf-hub:org/name@revision")
    known = [*bundled_models(), *PRESETS]
    if find_name(text, PRESETS) is not None:
        raise InputError(
            f"'{text}' is a preset without a bundled checkpoint",
            hint=f"mome.create_model('{text}') has random weights",
        )
    raise InputError(
        f"no model '{text}': no such folder, and it is not bundled{did_you_mean(text, known)}",
        hint="bundled: " + (", ".join(bundled_models()) or "none") + "; a Hub id is written org/name",
    )


def _folder(path: str, subfolder: str | None, holding: Sequence[str]) -> Source:
    path = str(Path(path) / subfolder) if subfolder else path
    if not os.path.isdir(path):
        raise InputError("no such folder", where=path)
    if not _holds_one(Path(path), holding):
        raise InputError(
            f"the folder holds no model: it has no {' and no '.join(holding)}",
            where=path,
            hint=_MODEL_FOLDER,
        )
    return Source(path)


def _holds_one(folder: Path, files: Sequence[str]) -> bool:
    return any((folder / file).is_file() for file in files)
