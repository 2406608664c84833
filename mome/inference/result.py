"""What a segmentation gives back: masks on the scan's grid, one bit per voxel and prompt until asked for."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mome.errors import InputError
from mome.labels import load_table
from mome.prompts import Prompt
from mome.volumes import Grid, write_mask


class PackedMasks(Mapping[str, np.ndarray]):
    """Prompt → uint8 (i, j, k) of 0 and 1, unpacked when it is read.

    Args:
        names: Of the prompts.
        shape: Of the scan.
        axis: Axis along which planes arrive.
    """

    def __init__(self, names: list[str], shape: tuple[int, int, int], axis: int) -> None:
        self.names, self.shape, self.axis = names, shape, axis
        self.plane = [n for a, n in enumerate(shape) if a != axis]
        bits = (int(np.prod(self.plane)) + 7) // 8
        self.bits = {name: np.zeros((shape[axis], bits), dtype=np.uint8) for name in names}
        self.voxels = dict.fromkeys(names, 0)

    def write(self, name: str, planes: list[int], block: np.ndarray) -> None:
        """Stores planes of one prompt; `block` is bool on the scan's axes, cut along `axis`."""
        moved = np.moveaxis(block, self.axis, 0).reshape(len(planes), -1)
        self.bits[name][planes] = np.packbits(moved, axis=1)
        self.voxels[name] += int(moved.sum())

    def name_of(self, key: str) -> str:
        """The mask that a name, or a synonym of it in the class table, means.

        Raises:
            KeyError: There is none; the message names those there are.
        """
        names: list[str | None] = [key]
        with contextlib.suppress(InputError, AttributeError):  # what could be no prompt
            resolved = load_table().resolve(key)
            names += [key.strip(), resolved.name if resolved.how in ("exact", "synonym") else None]
        for name in names:
            if name in self.bits:
                return name
        raise KeyError(f"there is no mask of {key!r}, only of {', '.join(self.names)}")

    def __contains__(self, key: object) -> bool:
        try:
            return self.name_of(key) in self.bits  # type: ignore[arg-type]
        except KeyError:
            return False

    def __getitem__(self, name: str) -> np.ndarray:
        flat = np.unpackbits(self.bits[self.name_of(name)], axis=1, count=int(np.prod(self.plane)))
        return np.ascontiguousarray(np.moveaxis(flat.reshape(self.shape[self.axis], *self.plane), 0, self.axis))

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


@dataclass
class Segmentation:
    """Masks of one scan.

    Attributes:
        prompts: As understood; their `warning`s are for the user.
        masks: Prompt, by its name or a synonym → uint8 (i, j, k), unpacked lazily.
        grid: The scan's own grid.
        header: What the writer keeps of the scan's header.
        seconds: Time per phase.
        notes: What the reader said about the scan.
        source: The scan's file, where it was read from one.
    """

    prompts: list[Prompt]
    masks: PackedMasks
    grid: Grid
    header: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    source: Path | None = None

    @property
    def warnings(self) -> list[str]:
        """Everything the user should know, one sentence each."""
        return [*self.notes, *(p.warning for p in self.prompts if p.warning)]

    def volume_ml(self, name: str) -> float:
        """Volume of a mask in ml; a KeyError names the masks there are."""
        return self.masks.voxels[self.masks.name_of(name)] * abs(float(np.linalg.det(self.grid.affine[:3, :3]))) / 1000

    def label_map(self) -> tuple[np.ndarray, list[dict[str, Any]], int]:
        """One map of the class table's ids, its table, and how many voxels more than one mask claimed.

        Smaller structures lie over larger ones. Free text has no id in the table and gets one above it.
        """
        names = sorted(self.masks, key=lambda name: -self.masks.voxels[name])
        table = self.label_entries()
        highest = max(entry["id"] for entry in table)
        out = np.zeros(self.grid.shape, dtype=np.uint16 if highest > 255 else np.uint8)
        overlap = 0
        ids = {entry["name"]: entry["id"] for entry in table}
        for name in names:
            mask = self.masks[name].astype(bool)
            overlap += int((out[mask] > 0).sum())
            out[mask] = ids[name]
        return out, table, overlap

    def label_entries(self) -> list[dict[str, Any]]:
        """The label table of the masks."""
        table, entries = load_table(), []
        free = max(label.id for label in table)
        for prompt in self.prompts:
            if prompt.name in table:
                label = table[prompt.name]
                entries.append({"id": label.id, "name": label.name, "snomed": label.snomed, "color": list(label.color)})
            else:
                free += 1
                entries.append({"id": free, "name": prompt.name, "snomed": None, "color": [255, 255, 255]})
        return entries

    def save(self, folder: str | Path, stem: str, *, multilabel: bool = False) -> list[Path]:
        """Writes `<stem>_<prompt>.nii.gz` per prompt, or one `<stem>.nii.gz` of ids.

        All or nothing: where one file cannot be written, those written before it are removed again.

        Raises:
            InputError: A mask would overwrite the scan, or two prompts give one file name.
            OutputError: The disk is full or the folder cannot be written.
        """
        paths = mask_paths(folder, stem, self.prompts, multilabel=multilabel)
        refuse_to_overwrite([self.source] if self.source else [], paths)
        if multilabel:
            array, table, _ = self.label_map()
            return [write_mask(paths[0], array, self.grid, self.header, table)]
        written: list[Path] = []
        try:
            for path, entry in zip(paths, self.label_entries(), strict=True):
                single = [{**entry, "id": 1, "table_id": entry["id"]}]
                written.append(write_mask(path, self.masks[entry["name"]], self.grid, self.header, single))
        except OSError:
            for path in written:
                path.unlink(missing_ok=True)
            raise
        return written

    def summary(self) -> list[dict[str, Any]]:
        """One entry per prompt: name, how it was understood, volume, warning."""
        return [
            {
                "prompt": p.text,
                "name": p.name,
                "understood": p.resolved.how,
                "trained": p.trained,
                "volume_ml": round(self.volume_ml(p.name), 3),
                "warning": p.warning,
            }
            for p in self.prompts
        ]


def mask_paths(folder: str | Path, stem: str, prompts: Sequence[Prompt], *, multilabel: bool = False) -> list[Path]:
    """Where `Segmentation.save` writes: one file, or one per prompt.

    Raises:
        InputError: Two prompts give one file name, or one gives none.
    """
    parts = prompt_parts(prompts)
    names = [f"{stem}.nii.gz"] if multilabel else [f"{stem}_{part}.nii.gz" for part in parts]
    return [Path(folder) / name for name in names]


def prompt_parts(prompts: Sequence[Prompt]) -> list[str]:
    """The prompts' parts of file names.

    Raises:
        InputError: Two prompts give one file name, or one gives none.
    """
    owners: dict[str, str] = {}
    for prompt in prompts:
        other = owners.setdefault(file_part(prompt.name), prompt.name)
        if other != prompt.name:
            raise InputError(
                f"the prompts {other!r} and {prompt.name!r} give the same file name",
                where=f"…_{file_part(prompt.name)}.nii.gz",
                hint="word one of them differently",
            )
    return list(owners)


def refuse_to_overwrite(scans: Sequence[Path], outputs: Sequence[Path]) -> None:
    """Masks never replace a scan.

    Raises:
        InputError: A path of `outputs` is one of the scans, whatever links lead there.
    """
    kept = {scan.resolve() for scan in scans}
    for path in outputs:
        if path.resolve() in kept:
            raise InputError("a mask would overwrite its scan", where=str(path), hint="another folder for the masks")


def file_part(text: str) -> str:
    """A prompt or a scan's name as part of a file name: what a user types never becomes a path.

    Raises:
        InputError: Nothing is left of it.
    """
    safe = re.sub(r"[^\w.+-]+", "_", text.strip().replace(" ", "_")).strip("._")[:100]
    if not safe:
        raise InputError(f"{text!r} gives no file name", hint="use letters or digits")
    return safe
