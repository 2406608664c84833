"""Finds the file of every case and structure by its name, and reads masks when they are needed."""

from __future__ import annotations

import functools
import logging
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path

from mome.errors import InputError
from mome.labels import load_table
from mome.labels.dataset import StructureRule
from mome.labels.dataset_file import open_dataset
from mome.volumes import Volume, read_label_map, read_label_table
from mome.volumes.label_map import listed_values, read_mask, several_numbers, unnamed_values
from mome.volumes.mask_names import file_part, safe_characters, split_mask_name
from mome.volumes.scan_files import is_nifti, scans_in, stem
from mome.volumes.structure_masks import structure_mask

logger = logging.getLogger(__name__)

_WHOSE = "say whose numbers they are, as in --labels openkbp"

Files = dict[str | None, Path]
"""The files of one case. The key is a structure for a mask, or None for a label map."""


def find_masks(place: str | Path, *, dataset: str | None = None, cases: Sequence[str] = ()) -> dict[str, Files]:
    """Finds the files of every case in a folder, or takes a single file.

    A file `<case>_<structure>` is a mask if the structure is in the class table, in `dataset` or in the table of a
    single mask in the file's header, or if the case is one of `cases`; the structure is then free text. Such a file is
    a label map instead if its whole name is one of `cases`, if the table in its header is not that of one mask, or if
    it contains several numbers and `dataset` names them. All other files are label maps. A case is also found by the
    name that `mome segment` gives its masks, in which a space is an underscore.

    Args:
        place: Folder or file; files have any ending of a scan, in either case, and hidden files are left out.
        dataset: Whose numbers label maps without a table use: a data set of the package, or a YAML file of one.
        cases: Known names of cases.

    Returns:
        Case → its files.

    Raises:
        InputError: No such file or folder, or two files are the same mask.
    """
    place = Path(place)
    if not place.exists():
        raise InputError("no such file or folder", where=str(place))
    files = scans_in(place) if place.is_dir() else [place]
    names = [*load_table().names(), *(() if dataset is None else open_dataset(dataset).annotated)]
    # macOS decomposes accents in names of files; the same case may have either form on two machines.
    forms = {unicodedata.normalize("NFC", case): case for case in cases}
    found: dict[str, Files] = {}
    for file in files:
        name = unicodedata.normalize("NFC", stem(file))
        own = _named_in(file)
        case, structure = _split(name, [*names, *own], list(forms))
        structure = own.get(structure, structure) if structure is not None else None
        if structure is not None and _is_map(file, structure, dataset):
            case, structure = name, None
        case = forms.get(case, case)
        other = found.setdefault(case, {}).setdefault(structure, file)
        if other is not file:
            what = "label map" if structure is None else f"mask of {structure!r}"
            raise InputError(
                f"case {case!r} has more than one {what}", where=f"{other} and {file}", hint="move one of them away"
            )
    return found


def _named_in(file: Path) -> dict[str, str]:
    """Returns the structure that a single mask of `mome segment` names in its header, by its part of a file name."""
    try:
        table = _label_table(file)
        single = len(table) == 1 and "table_id" in table[0]
        return {file_part(str(entry["name"])): str(entry["name"]) for entry in table if single}
    except InputError:
        return {}  # a damaged file raises its error when its mask is read, which may never happen


def _split(name: str, structures: Sequence[str], cases: Sequence[str]) -> tuple[str, str | None]:
    """Splits the name of a file into its case and its structure, see `split_mask_name`.

    Where no case has this name, a case is looked for whose name is written like this in the names of masks.
    """
    case, structure = split_mask_name(name, structures, cases)
    if case in cases:
        return case, structure
    written: dict[str, str] = {}
    for known in cases:
        if safe_characters(known):
            written.setdefault(file_part(known), known)
    as_written, part = split_mask_name(safe_characters(name), structures, list(written))
    return (written[as_written], part) if as_written in written else (case, structure)


def pair_files(
    prediction: str | Path, reference: str | Path, *, dataset: str | None = None
) -> tuple[dict[str, Files], dict[str, Files]]:
    """Treats two single files as one case, whatever their names are.

    The case and the structure are taken from the reference's name. Both files are masks unless one of them is a label
    map whose numbers have names.

    Returns:
        What `find_masks` returns, for the prediction and for the reference.
    """
    ((case, wanted),) = find_masks(reference, dataset=dataset).items()
    (predicted,) = find_masks(prediction, dataset=dataset).values()
    name = next((structure for structure in (*wanted, *predicted) if structure is not None), case)
    if not _map_rules(predicted, dataset) and not _map_rules(wanted, dataset):
        predicted, wanted = {name: Path(prediction)}, {name: Path(reference)}
    return {case: predicted}, {case: wanted}


def open_masks(files: Files, dataset: str | None = None) -> dict[str, Callable[[], Volume]]:
    """Prepares the masks of one case for reading.

    A mask's file is read at every call, so that only the masks in use are in memory. A label map is read once, at the
    first call; a call compares it with the numbers of one structure. Of a structure with a mask of its own, the mask
    is taken.

    Returns:
        Structure → function that returns its mask, a volume of bool.

    Raises:
        InputError: A label map whose numbers have no names. A call of a function raises what `read_label_map`
            raises, or an `InputError` for a mask that contains several numbers, or whose sides cannot be told apart.
    """
    masks: dict[str, Callable[[], Volume]] = {
        name: functools.partial(read_mask, path, hint=_WHOSE) for name, path in files.items() if name is not None
    }
    if None in files:
        rules = _map_rules(files, dataset)
        if not rules:
            raise InputError(
                "the file's numbers have no names: it holds no label table",
                where=str(files[None]),
                hint=_WHOSE,
            )
        values = {value for rule in rules.values() for value in rule.values}
        read = functools.cache(functools.partial(_read_map, files[None], tuple(sorted(values))))
        for name, rule in rules.items():
            masks.setdefault(name, functools.partial(_mask_of_map, read, rule, name, files[None]))
    return masks


def masked_and_mapped(files: Files, dataset: str | None = None) -> list[str]:
    """Returns the structures of a case that have a mask of their own and stand in its label map, too, sorted."""
    return sorted(_map_rules(files, dataset).keys() & files.keys())


def _is_map(file: Path, structure: str, dataset: str | None) -> bool:
    """Says whether a file that is named like a mask of `structure` is a label map."""
    try:
        table = _label_table(file)
        if len(table) == 1 and int(table[0]["id"]) == 1:  # `mome segment` marks a single mask by `table_id`
            return "table_id" not in table[0] and table[0]["name"] != structure
        # Without a data set the numbers would have no names, so the voxels need not be read.
        return bool(table) or (dataset is not None and several_numbers(read_label_map(file).array))
    except InputError:
        return False  # a damaged file raises its error when its mask is read, which may never happen


def _label_table(file: Path) -> list[dict]:
    """Returns the label table in a NIfTI file's header; empty for other files."""
    return read_label_table(file) if is_nifti(file) else []


def is_map_without_table(files: Files) -> bool:
    """Says whether a case has a label map whose numbers are named by a data set, not by a table in its header."""
    return None in files and not _label_table(files[None])


def _map_rules(files: Files, dataset: str | None) -> dict[str, StructureRule]:
    """Returns structure → which numbers of the case's label map make it up.

    They come from the table in the map's header, else from the rules of the data set, by which an organ includes its
    tumour and a number of both sides is split. It is empty if the case has no label map, or if its numbers have no
    names.
    """
    if None not in files:
        return {}
    table = {entry["name"]: StructureRule((int(entry["id"]),)) for entry in _label_table(files[None])}
    return table or ({} if dataset is None else open_dataset(dataset).structures)


def _read_map(path: Path, numbers: tuple[int, ...]) -> Volume:
    """Reads a label map and says which of its values have no name."""
    volume = read_label_map(path)
    unnamed = unnamed_values(volume.array, numbers)
    if unnamed:
        logger.warning("%s: no structure has the value %s, which is not scored", path, listed_values(unnamed))
    return volume


def _mask_of_map(read: Callable[[], Volume], rule: StructureRule, name: str, path: Path) -> Volume:
    """Returns the mask of one structure of a label map.

    Raises:
        InputError: The rule tells left and right apart, and in this map that is not possible.
    """
    volume = read()
    try:
        mask = structure_mask(volume.array, volume.affine, rule, name)
    except InputError as error:
        raise InputError(error.what, where=str(path), hint=error.hint) from error
    return Volume(mask, volume.affine, volume.header)
