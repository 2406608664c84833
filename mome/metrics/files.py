"""Which file holds which case and structure, and masks that are read only when they are asked for."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from mome.errors import InputError
from mome.labels import load_dataset, load_table
from mome.volumes import Volume, read_label_table, read_volume
from mome.volumes.mask_names import split_mask_name
from mome.volumes.scan_files import NIFTI_ENDINGS, is_nifti, stem

Files = dict[str | None, Path]
"""Of one case: structure, or None for a map of numbers → file."""


def find_masks(place: str | Path, *, dataset: str | None = None, cases: Sequence[str] = ()) -> dict[str, Files]:
    """Case → its files, of a folder or of a single file.

    `<case>_<structure>` is a mask where the structure is in the class table, or the case one of `cases` (the rest is
    then free text). It is a map all the same where the whole name is one of `cases`, where the table in its header is
    not that of one mask, or where it holds several numbers and `dataset` names them.

    Raises:
        InputError: No such file or folder.
    """
    place = Path(place)
    if not place.exists():
        raise InputError("no such file or folder", where=str(place))
    files = (
        [place] if place.is_file() else [file for ending in NIFTI_ENDINGS for file in sorted(place.glob(f"*{ending}"))]
    )
    names = load_table().names()
    found: dict[str, Files] = {}
    for file in files:
        case, structure = split_mask_name(stem(file), names, cases)
        if structure is not None and _is_map(file, structure, dataset):
            case, structure = stem(file), None
        found.setdefault(case, {})[structure] = file
    return found


def pair_files(
    prediction: str | Path, reference: str | Path, *, dataset: str | None = None
) -> tuple[dict[str, Files], dict[str, Files]]:
    """Two single files as one case, whatever they are called.

    Case and structure are the reference's. Where neither is a map whose numbers are named, both are masks.

    Returns:
        What `find_masks` gives, of the prediction and of the reference.
    """
    guess, truth = find_masks(prediction, dataset=dataset), find_masks(reference, dataset=dataset)
    ((case, wanted),), (found,) = truth.items(), guess.values()
    name = next((structure for structure in (*wanted, *found) if structure is not None), case)
    if not _map_numbers(found, dataset) and not _map_numbers(wanted, dataset):
        found, wanted = {name: Path(prediction)}, {name: Path(reference)}
    return {case: found}, {case: wanted}


def open_masks(files: Files, dataset: str | None = None) -> dict[str, Callable[[], Volume]]:
    """Structure → function that gives its mask as a volume of bool.

    A mask's file is read at each call, so that no more than the masks in use are held; a map is read once, at the
    first call, and compared with one number at a time.

    Raises:
        InputError: A map whose numbers nothing names. At the call: what `read_volume` raises, or a mask that holds
            several numbers.
    """
    masks: dict[str, Callable[[], Volume]] = {
        name: functools.partial(_read_mask, path) for name, path in files.items() if name is not None
    }
    if None in files:
        numbers = _map_numbers(files, dataset)
        if not numbers:
            raise InputError(
                "the file's numbers have no names: it holds no label table",
                where=str(files[None]),
                hint="say whose numbers they are, as in --labels openkbp",
            )
        read = functools.cache(functools.partial(read_volume, files[None]))
        for name, number in numbers.items():
            masks.setdefault(name, functools.partial(_of_map, read, number))
    return masks


def _is_map(file: Path, structure: str, dataset: str | None) -> bool:
    try:
        table = _label_table(file)
        if len(table) == 1 and int(table[0]["id"]) == 1:  # `mome segment` marks a single mask by `table_id`
            return "table_id" not in table[0] and table[0]["name"] != structure
        # without a data set the numbers could not be named: the voxels are not read for it
        return bool(table) or (dataset is not None and _several_numbers(read_volume(file).array))
    except (InputError, OSError, EOFError, zlib.error):
        return False  # said when the file is read, if it is asked for at all


def _label_table(file: Path) -> list[dict]:
    return read_label_table(file) if is_nifti(file) else []


def _map_numbers(files: Files, dataset: str | None) -> dict[str, int]:
    """Structure → number in the case's map: of the table in its header, else of the data set. Empty without a map."""
    if None not in files:
        return {}
    table = {entry["name"]: int(entry["id"]) for entry in _label_table(files[None])}
    return table or ({} if dataset is None else load_dataset(dataset).name_to_id)


def _several_numbers(array: np.ndarray) -> bool:
    inside = array[array > 0]
    return bool(inside.size and inside.min() != inside.max())


def _read_mask(path: Path) -> Volume:
    volume = read_volume(path)
    if _several_numbers(volume.array):
        raise InputError(
            "a mask holds 0 and one other number, this file holds several: it is a map without a label table",
            where=str(path),
            hint="say whose numbers they are, as in --labels openkbp",
        )
    return Volume(volume.array > 0, volume.affine, volume.header)


def _of_map(read: Callable[[], Volume], number: int) -> Volume:
    volume = read()
    return Volume(volume.array == number, volume.affine, volume.header)
