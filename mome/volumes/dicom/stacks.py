"""Stacks of slices: a series is one stack, or several where its images differ in size or orientation."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mome.errors import InputError
from mome.volumes.dicom.files import DicomFiles
from mome.volumes.dicom.headers import ImageHeader
from mome.volumes.dicom.kinds import reason_not_ct
from mome.volumes.dicom.slices import Slice

# A stack of at most this many images is left out where another stack of the series has four times as many.
_FEW = 3
_MOST_LISTED = 6
LARGEST = "largest"
"""In place of a series' number or UID: the CT with the most slices."""


@dataclass
class Stack:
    """Images of one series that have one size and orientation; the images of a series that is no CT.

    Attributes:
        header: The header of the first image.
        slices: The slices of a CT.
        not_ct: What the images are instead of a CT, or None.
        images: The number of images.
        notes: Sentences about images of the series that are left out.
    """

    header: ImageHeader
    slices: list[Slice]
    not_ct: str | None = None
    images: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def summary(self) -> str:
        """Kind, number and size of the images, as in "CT, 60 slices of 512 × 512"."""
        if self.not_ct is not None:
            return f"not a CT but {self.not_ct}, {_count(self.images, 'image')}"
        return f"CT, {_count(self.images, 'slice')} of {self.header.columns} × {self.header.rows}"


def stacks_of(files: DicomFiles) -> list[Stack]:
    """Returns the stacks in the order in which they are numbered for the user: by SeriesNumber, then by size.

    Localizers, and up to three images of another size or orientation than a stack that is four times as large, are
    left out; a note of the large stack says so.
    """
    groups: dict[str, list[Slice]] = {}
    for image in files.slices:
        # Without a UID, the number of the series is all that tells series apart.
        groups.setdefault(image.header.series_uid or str(image.header.series_number), []).append(image)
    stacks = [stack for images in groups.values() for stack in _split(images)]
    others: dict[str, list[ImageHeader]] = {}
    for header in files.others:
        others.setdefault(header.series_uid, []).append(header)
    for headers in others.values():
        stacks.append(Stack(headers[0], [], reason_not_ct(headers[0]), len(headers)))
    return sorted(stacks, key=lambda stack: (stack.header.series_number, stack.header.series_uid, -stack.images))


def choose_stack(stacks: list[Stack], series: str | int | None, where: Path) -> Stack:
    """Returns the stack that is asked for, or the only one.

    Args:
        stacks: What `stacks_of` returned.
        series: A number from 1, a SeriesInstanceUID, `largest` for the CT with the most slices, or None.
        where: The folder, for errors.

    Raises:
        InputError: There is no such stack, there are several and none is chosen, or it is no CT.
    """
    chosen = stacks
    text = "" if series is None else str(series).strip()
    if text == LARGEST:
        chosen = _largest(stacks)
    elif series is not None:
        by_number = [stack for number, stack in enumerate(stacks, 1) if str(number) == text]
        chosen = by_number or [stack for stack in stacks if stack.header.series_uid == text]
        if not chosen:
            raise InputError(
                f"there is no series {text[:64]!r}: {_listed(stacks)}", where=str(where), hint="mome info lists them"
            )
    if len(chosen) == 1:
        if chosen[0].not_ct is not None:
            raise InputError(
                f"not a CT but {chosen[0].not_ct}", where=str(where), hint="only CT is segmented: give a CT series"
            )
        return chosen[0]
    if all(stack.not_ct for stack in chosen):
        kinds = ", ".join(sorted({str(stack.not_ct) for stack in chosen}))
        raise InputError(
            f"the folder holds {len(chosen)} DICOM series, and none is a CT: {kinds[:200]}",
            where=str(where),
            hint="only CT is segmented: give a CT series",
        )
    what = f"{len(chosen)} DICOM series"
    if len({stack.header.series_uid for stack in chosen}) == 1:
        mixed = any(stack.not_ct for stack in chosen)
        what = "one series of " + ("CT and other images" if mixed else "images of several sizes or orientations")
    raise InputError(
        f"the folder holds {what}, not one stack of slices: {_listed(stacks)}",
        where=str(where),
        hint="choose one: --series 1, in Python dicom=DicomOptions(series=1); mome info lists them",
    )


def _largest(stacks: list[Stack]) -> list[Stack]:
    """Returns the CT with the most slices, with a note on the others; all that are equally large where several are."""
    most = max((stack.images for stack in stacks if stack.not_ct is None), default=None)
    chosen = [stack for stack in stacks if stack.not_ct is None and stack.images == most]
    if len(chosen) == 1 and len(stacks) > 1:
        number = stacks.index(chosen[0]) + 1
        chosen[0].notes.append(f"series {number}, the largest CT, is read of {_listed(stacks)}")
    return chosen or stacks


def _split(images: list[Slice]) -> list[Stack]:
    """Splits the slices of one series by size, pixel spacing and orientation."""
    localizers = [image for image in images if image.is_localizer]
    if len(localizers) == len(images):
        return [Stack(images[0].header, [], "localizer images", len(images))]
    groups: list[list[Slice]] = []
    for image in images:
        if image.is_localizer:
            continue
        home = next((group for group in groups if _belong_together(group[0], image)), None)
        if home is None:
            groups.append([image])
        else:
            home.append(image)
    groups.sort(key=len, reverse=True)
    few = [group for group in groups[1:] if len(group) <= _FEW and 4 * len(group) <= len(groups[0])]
    stacks = [Stack(group[0].header, group, images=len(group)) for group in groups if group not in few]
    if localizers:
        stacks[0].notes.append(f"{_count(len(localizers), 'localizer image')} of the series left out")
    if few:
        sizes = Counter(f"{group[0].header.columns} × {group[0].header.rows}" for group in few for _ in group)
        stacks[0].notes.append(
            f"{_count(sizes.total(), 'image')} of another size or orientation left out: {', '.join(sizes)}"
        )
    return stacks


def _belong_together(a: Slice, b: Slice) -> bool:
    """Says whether two slices may lie in one stack; directions may differ by the rounding of a header."""
    assert a.orientation is not None and b.orientation is not None
    assert a.pixel_spacing is not None and b.pixel_spacing is not None
    return bool(
        (a.header.rows, a.header.columns) == (b.header.rows, b.header.columns)
        and np.allclose(a.pixel_spacing, b.pixel_spacing, rtol=1e-3, atol=0)
        and np.abs(a.orientation - b.orientation).max() < 2e-3
    )


def _listed(stacks: list[Stack]) -> str:
    listed = [f"{number}: {stack.summary}" for number, stack in enumerate(stacks[:_MOST_LISTED], 1)]
    more = len(stacks) - _MOST_LISTED
    return "; ".join(listed) + (f"; and {more} more" if more > 0 else "")


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")
