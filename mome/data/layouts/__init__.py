"""Layouts of data folders by name. A new layout is one file here and one line below; `base.py` says what it must have.

`open_cases(folder, "nnunet", "lits")` lists the cases of a folder. Listing the names imports no torch.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from mome.data.case import Case
from mome.errors import InputError
from mome.labels.dataset_file import open_dataset
from mome.labels.own import find_own
from mome.registry import Registry

LAYOUTS = Registry("data layout", "mome.data.layouts", "mome.data_layouts", "mome.data.layouts.base:Layout")

LAYOUTS.register("cases", "mome.data.layouts.cases:Cases", summary="images/, labels/ and cases.json")
LAYOUTS.register("nnunet", "mome.data.layouts.nnunet:NnUNet", summary="imagesTr/, labelsTr/, dataset.json; also MSD")
LAYOUTS.register("masks", "mome.data.layouts.masks:Masks", summary="a folder per case, a mask per structure")
LAYOUTS.register("bids", "mome.data.layouts.bids:Bids", summary="BIDS with segmentations in derivatives/")
LAYOUTS.register("openkbp", "mome.data.layouts.openkbp:OpenKBP", summary="OpenKBP's own CSV files")
LAYOUTS.register("manifest", "mome.data.layouts.manifest:Manifest", summary="a CSV or JSON file that lists the cases")


def open_cases(
    folder: str | Path, layout: str | dict[str, Any], dataset: str | None = None, own: Collection[str] = ()
) -> list[Case]:
    """Lists the cases of a folder; no volume is read.

    Args:
        folder: The folder, or the file of a manifest.
        layout: A name of `LAYOUTS`, or a config string such as `nnunet(part='Ts')`.
        dataset: The data set whose numbers the label maps use, or a YAML file of one; None where the folder itself
            names them.
        own: Structures that the class table does not have, which the folder may name; their names, or a mapping to
            other words for them.

    Returns:
        The cases, sorted as the layout says; at least one.

    Raises:
        InputError: There is no such folder or layout, the folder is not laid out so, it lists no case, or the data set
            has another name for a structure of `own`.
    """
    folder = Path(folder)
    if not folder.exists():
        raise InputError("no such folder of cases", where=str(folder), hint="check the path")
    reader = LAYOUTS.build(layout)
    reader.own = own
    opened = None if dataset is None else open_dataset(dataset)
    _check_one_name(own, () if opened is None else opened.annotated, str(dataset))
    cases: list[Case] = reader.cases(folder, opened)
    if not cases:
        raise InputError("the folder lists no case", where=str(folder), hint=f"layout {layout!r}: {reader.shape}")
    return cases


def _check_one_name(own: Collection[str], annotated: Collection[str], where: str) -> None:
    """Checks that a data set calls one's own structures by the same names.

    Raises:
        InputError: It has another name for one, so that the two would be trained as two structures.
    """
    for name in annotated:
        mine = find_own(name, own)
        if mine not in (None, name):
            raise InputError(
                f"{name!r} and {mine!r} are one structure of your own", where=where, hint=f"write {mine} there"
            )
