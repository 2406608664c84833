"""The result of a segmentation: masks on the scan's grid, their volumes, and how they are saved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np

from mome.errors import InputError
from mome.inference.earlier_results import refuse_results_of_others
from mome.inference.packed import PackedMasks
from mome.inference.probabilities import ProbabilityMaps
from mome.labels import load_table
from mome.labels.color import color_of_number
from mome.prompts import Prompt
from mome.volumes import Grid, Volume
from mome.volumes.mask_names import mask_paths, refuse_to_overwrite
from mome.volumes.mask_set import FlatMap, MaskSet
from mome.volumes.writers.base import build_writer, one_file_per_structure

# Maps of ids are stored as uint8 or uint16.
_LARGEST_ID = 65_535


@dataclass
class Segmentation:
    """Masks of one scan.

    Attributes:
        prompts: The prompts as they were understood; their `warning`s are for the user.
        masks: Prompt, by its name or a synonym → uint8 (i, j, k) of 0 and 1, unpacked at every access.
        grid: The scan's own grid.
        header: `Volume.header` of the scan, which writers copy into masks.
        seconds: Wall time per phase in seconds.
        notes: Sentences of the reader about the scan, and of writers about files they wrote.
        doubts: Those of the notes for which this scan and its masks should be looked at.
        source: The scan's file or DICOM folder; None where the scan was passed as an array.
        probabilities: Prompt → probability × 255, uint8 (i, j, k), of the prompts that it was asked of; None otherwise.
        model: The name of the model, without its folder; empty where it has none.
        model_version: The fingerprint of its weights and config; empty where it was not computed.
        scan_digest: `mome.volumes.scan_digest.scan_digest` of the scan; empty where it was not computed.
        tiles: Tiles that were computed for each group of prompts, and tiles over the whole network grid.
        disagreement: How much the routers disagree (`mome.inference.disagreement`) × 255, uint8 (i, j, k); None where
            nobody asked.
        statistics: Prompt → what `mome.volumes.statistics.structure_statistics` returns; None where nobody asked. They
            are those of whole masks. Once a map of ids was made, `voxels_in_map` and `volume_ml_in_map` stand beside.
        voxels_in_map: Prompt → number of voxels that the map of ids gives to it: those of its mask that no smaller
            mask covers. None until a map was made, by `save(…, multilabel=True)` or `label_map`.
        overlapping_voxels: Number of voxels in several masks, of which that map gives each to one; None until then.
    """

    prompts: list[Prompt]
    masks: PackedMasks
    grid: Grid
    header: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    source: Path | None = None
    probabilities: ProbabilityMaps | None = None
    model: str = ""
    model_version: str = ""
    scan_digest: str = ""
    statistics: dict[str, dict[str, Any]] | None = None
    tiles: tuple[int, int] = (0, 0)
    doubts: tuple[str, ...] = ()
    disagreement: np.ndarray | None = None
    voxels_in_map: dict[str, int] | None = None
    overlapping_voxels: int | None = None

    def __repr__(self) -> str:
        volumes = ", ".join(f"{prompt.name} {self.volume_ml(prompt.name):.1f} ml" for prompt in self.prompts)
        scan = "" if self.source is None else f"{self.source.name}: "
        return f"Segmentation({scan}{volumes})"

    @property
    def warnings(self) -> list[str]:
        """All notes and warnings for the user, one sentence each."""
        return list(dict.fromkeys([*self.notes, *(p.warning for p in self.prompts if p.warning)]))

    def volume_ml(self, name: str) -> float:
        """Returns the volume of a mask in ml; voxels that lie in other masks, too, count.

        Args:
            name: A prompt's name or a synonym.

        Raises:
            KeyError: There is no such mask; the message names the masks there are.
        """
        return self._ml(self.masks.voxels[self.masks.name_of(name)])

    def _ml(self, voxels: int) -> float:
        return voxels * abs(float(np.linalg.det(self.grid.affine[:3, :3]))) / 1000

    def label_map(self, ids: Mapping[str, int] | None = None) -> tuple[np.ndarray, list[dict[str, Any]], int]:
        """Returns one array of ids, its label table, and the number of voxels in several masks.

        Smaller structures are written over larger ones.

        Args:
            ids: Prompt, by its name or a synonym → id, a number of its own from 1 to 65535; None for those of the class
                table. Free text has none there and gets one above them. Ids of other structures are not used.

        Raises:
            InputError: `ids` lacks a prompt, gives it two numbers, or holds another number.
        """
        masks = self.mask_set()
        if ids is not None:
            by_name = _ids_by_name(ids, self.masks)
            masks = replace(masks, labels=[{**entry, "id": by_name[entry["name"]]} for entry in masks.labels])
        self._count(masks.flat)
        return masks.flat.array, masks.labels, masks.flat.overlap

    def _count(self, flat: FlatMap) -> None:
        """Notes what a map of ids holds of each structure, here and in the statistics."""
        self.voxels_in_map, self.overlapping_voxels = dict(flat.voxels), flat.overlap
        for name, found in (self.statistics or {}).items():
            found.update(self._in_map(name))

    def _in_map(self, name: str) -> dict[str, Any]:
        """Returns what the map of ids holds of a structure; nothing where no map was made."""
        if self.voxels_in_map is None:
            return {}
        voxels = self.voxels_in_map[name]
        return {"voxels_in_map": voxels, "volume_ml_in_map": round(self._ml(voxels), 3)}

    def label_entries(self) -> list[dict[str, Any]]:
        """Returns the label table of the masks: `id`, `name`, `snomed` and `color` per prompt.

        Labels of the model's own have ids above those of the class table, whatever else is asked; free text has the
        ids above them (`mome.prompts.Prompt.number`).
        """
        table, entries = load_table(), list[dict[str, Any]]()
        highest, outside = max(label.id for label in table), 0
        for prompt in self.prompts:
            if prompt.name in table:
                label = table[prompt.name]
                entries.append({"id": label.id, "name": label.name, "snomed": label.snomed, "color": list(label.color)})
            else:
                outside += 1
                number = prompt.number or outside
                is_free = prompt.resolved.how == "free"
                color = [255, 255, 255] if is_free else list(color_of_number(number))
                entries.append({"id": highest + number, "name": prompt.name, "snomed": None, "color": color})
        return entries

    def mask_set(self) -> MaskSet:
        """Returns the masks in the form that writers take."""
        return MaskSet(
            self.masks,
            self.label_entries(),
            self.masks.voxels,
            self.grid,
            self.header,
            self.source,
            self.model,
            self.model_version,
            self.scan_digest,
        )

    def save(
        self,
        folder: str | Path,
        stem: str,
        *,
        multilabel: bool = False,
        writer: str | dict[str, Any] = "nifti",
        overwrite: bool = False,
    ) -> list[Path]:
        """Writes the masks: all files, or none where one of them cannot be written. Masks of this scan are replaced.

        Args:
            folder: Where the files go.
            stem: The scan's name in the file names, as in `<stem>_<prompt>.nii.gz`.
            multilabel: Write one file `<stem>.nii.gz` of the class table's ids, smaller structures over larger ones.
            writer: A name from `mome.volumes.WRITERS`, as a config string or dict.
            overwrite: Replace files of another scan, too; see `mome.inference.earlier_results`.

        Raises:
            InputError: `stem` is no name, there is no such writer or it cannot write this, a mask would overwrite the
                scan or, without `overwrite`, a file of another scan, or two prompts give one file name.
            OutputError: The disk is full or the folder cannot be written.
        """
        if not stem or Path(stem).name != stem:
            raise InputError(
                f"a stem is the name of a file without its folder, got {stem!r:.80}", hint="save(folder, 'ct')"
            )
        chosen = build_writer(writer)
        separate = one_file_per_structure(chosen, multilabel=multilabel)
        names = [prompt.name for prompt in self.prompts]
        paths = mask_paths(folder, stem, names, ending=chosen.ending, separate=separate)
        refuse_to_overwrite([self.source] if self.source else [], paths)
        if not overwrite:
            refuse_results_of_others(paths, self.grid, self.scan_digest, self.header, self.source)
        chosen.check_source(self.source)
        masks = self.mask_set()
        written: list[Path] = []
        try:
            for path, part in zip(paths, map(masks.only, names) if separate else [masks], strict=True):
                notes = chosen.write(path, part, multilabel=multilabel) or ()
                written.append(path)
                self.notes = tuple(dict.fromkeys((*self.notes, *notes)))
            if multilabel:
                self._count(masks.flat)
        except OSError:
            for path in written:
                path.unlink(missing_ok=True)
            raise
        return written

    def save_html(self, path: str | Path, volume: Volume, title: str | None = None) -> Path:
        """Writes a page that shows the CT with its masks in a browser, without a network; see `mome.viz.page_file`.

        Args:
            path: Path of the page.
            volume: The scan in HU, as `mome.volumes.read_volume` returns it.
            title: The heading; None for the name of the file.

        Raises:
            OutputError: The file cannot be written.
        """
        from mome.viz.page_file import save_page

        colors = {entry["name"]: entry["color"] for entry in self.label_entries()}
        structures = [
            {"name": p.name, "color": colors[p.name], "volume_ml": self.volume_ml(p.name), "warning": p.warning}
            for p in self.prompts
        ]
        shown = Path(path).name.partition(".")[0] if title is None else title
        return save_page(path, shown, volume, self.masks, structures, self.notes)

    def summary(self) -> list[dict[str, Any]]:
        """Returns one entry per prompt: its text and name, how it was understood, its volume and its warning.

        `volume_ml` is that of the whole mask. Once a map of ids was made, `voxels_in_map` and `volume_ml_in_map` are
        what that map holds.
        """
        return [
            {
                "prompt": p.text,
                "name": p.name,
                "understood": p.resolved.how,
                "trained": p.trained,
                "volume_ml": round(self.volume_ml(p.name), 3),
                **self._in_map(p.name),
                "warning": p.warning,
            }
            for p in self.prompts
        ]


def _ids_by_name(ids: Mapping[str, int], masks: PackedMasks) -> dict[str, int]:
    """Returns the ids of a map by the names of the prompts.

    Raises:
        InputError: A prompt has none or two, or they are no different whole numbers from 1 to 65535.
    """
    if not isinstance(ids, Mapping):
        raise InputError(f"ids is a dict of prompts and numbers, got {ids!r:.60}", hint="{'liver': 1, 'spleen': 2}")
    found: dict[str, Any] = {}
    for key, number in ids.items():
        if key not in masks:
            continue
        name = masks.name_of(key)
        if found.setdefault(name, number) != number:
            raise InputError(f"ids holds two numbers for {name!r:.60}", hint="an id for every prompt")
    missing = [name for name in masks if name not in found]
    if missing:
        raise InputError(f"ids holds no id of {missing[0]!r:.60}", hint="an id for every prompt")
    numbers = [found[name] for name in masks]
    are_whole = all(isinstance(number, Integral) and not isinstance(number, bool) for number in numbers)
    if not are_whole or not all(1 <= number <= _LARGEST_ID for number in numbers) or len(set(numbers)) < len(numbers):
        raise InputError(
            f"ids are different whole numbers from 1 to {_LARGEST_ID}, got {', '.join(map(str, numbers)):.80}"
        )
    return {name: int(number) for name, number in found.items()}
