"""Augments batches of training patches, on any device: mirroring, one interpolation for all movements, then values."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from mome.data.augmentations.base import Augmentation, Cut, Flip, ImageChange, Movement, PatchFrame
from mome.data.patch_movement import centre_of, moved
from mome.errors import InputError
from mome.labels.sides import other_side
from mome.registry import AUGMENTATIONS
from mome.typed import check_range

_STREAM = 6361  # keeps these draws apart from the sampler's, which also start from the run's seed
_Kind = TypeVar("_Kind", bound=Augmentation)


@dataclass(frozen=True, kw_only=True)
class AugmentationConfig:
    """What is changed in patches. Either `transforms` lists augmentations by name, or the other keys stand for a list.

    Our choice.

    Args:
        transforms: Augmentations, as in `["flip", "rotate(degrees=20)", "noise(hu=40)"]`; `mome list augmentations`
            shows them. Mirroring and movements come first, then the others in this order, then slabs. None takes the
            keys below.
        margin: Share of the patch's side that is read beyond each face, so that movements show the scan there, not air.
        on: Where batches are augmented: `device` (the accelerator), `loader` (the processes that load patches), or
            `auto`, which is the device where it is a GPU.
        mirror: Probability of a left-right flip; left and right structures exchange their labels.
        affine: Probability of a rotation, and of a zoom.
        rotate: Largest angle about each axis, in degrees.
        zoom: Largest relative zoom, as in 0.15 for 85 % to 115 %.
        intensity: Largest relative change of contrast; the brightness shifts by up to half of it.
        noise: Largest standard deviation of the noise; 1 is the width of the HU window.
        gamma: Largest exponent of a gamma curve, or its inverse, as in 1.5; 1 changes nothing.
        blur: Probability of a blur by up to one voxel along each axis, as thick slices and smooth kernels give.
        slab: Probability that the patch becomes a slab of random height with air above and below it, as short scans
            are padded in inference.

    Raises:
        InputError: A value is outside its range, `transforms` holds what is no augmentation, or both forms are given.
    """

    transforms: tuple[Any, ...] | None = None
    margin: float = 0.0
    on: Literal["auto", "device", "loader"] = "auto"
    mirror: float = 0.5
    affine: float = 0.0
    rotate: float = 10.0
    zoom: float = 0.15
    intensity: float = 0.1
    noise: float = 0.05
    gamma: float = 1.0
    blur: float = 0.0
    slab: float = 0.0

    def __post_init__(self) -> None:
        owner = "augmentation"
        check_range(owner, 0, 1, mirror=self.mirror, affine=self.affine, intensity=self.intensity, noise=self.noise)
        check_range(owner, 0, 1, blur=self.blur, slab=self.slab, margin=self.margin)
        check_range(owner, 1, 5, gamma=self.gamma)
        check_range(owner, 0, 180, rotate=self.rotate)
        check_range(owner, 0, 0.9, zoom=self.zoom)  # at 1, the smallest patch would have no extent
        if self.transforms is not None:
            for spec in self.transforms:
                AUGMENTATIONS.resolve(spec)
            short = [field.name for field in fields(self) if field.name not in ("transforms", "margin", "on")]
            given = [name for name in short if getattr(self, name) != type(self).__dataclass_fields__[name].default]
            if given:
                raise InputError(
                    f"augmentation.{given[0]} has no effect beside augmentation.transforms",
                    hint="put it into transforms",
                )

    def specs(self, hu_width: float) -> list[Any]:
        """Returns the augmentations.

        Args:
            hu_width: Width of the HU window.
        """
        if self.transforms is not None:
            return list(self.transforms)
        return [
            {"name": "flip", "probability": self.mirror},
            {"name": "rotate", "probability": self.affine, "degrees": self.rotate},
            {"name": "scale", "probability": self.affine, "share": self.zoom},
            {"name": "gamma", "probability": float(self.gamma > 1), "largest": self.gamma},
            {"name": "blur", "probability": self.blur, "voxels": 1.0},
            {
                "name": "contrast", "probability": float(self.intensity > 0), "contrast": self.intensity,
                "hu": self.intensity / 2 * hu_width,
            },
            {"name": "noise", "probability": float(self.noise > 0), "hu": self.noise * hu_width},
            {"name": "slab", "probability": self.slab},
        ]  # fmt: skip


class BatchAugmentation:
    """Augments batches. The seed and a patch's number alone decide what happens to it.

    Args:
        config: See `AugmentationConfig`.
        names: The trained labels.
        frame: Grid and window of the patches.
        seed: Seed of the run.

    Attributes:
        can_mirror: False if one structure of a left-right pair is trained without the other. A mirrored patch would
            show the missing one under the wrong label, so left and right are not exchanged then.

    Raises:
        InputError: An argument of an augmentation is outside its range.
    """

    def __init__(
        self, config: AugmentationConfig, names: Sequence[str], frame: PatchFrame = PatchFrame(), seed: int = 0  # noqa: B008
    ) -> None:  # fmt: skip
        self.config, self.frame, self.seed = config, frame, seed
        partners = {name: other_side(name) for name in names}
        self._without_partner = [name for name, partner in partners.items() if partner not in partners]
        self.can_mirror = not self._without_partner
        specs = [AUGMENTATIONS.canonical(spec) for spec in config.specs(frame.hu_width)]
        parts: list[Augmentation] = [AUGMENTATIONS.build(spec, frame=frame) for spec in specs]
        seen: Counter[str] = Counter()
        self._parts: list[tuple[Augmentation, list[int]]] = []
        for spec, part in zip(specs, parts, strict=True):
            # The stream of a part follows from its name, so that adding another changes no draw of it.
            self._parts.append((part, [zlib.crc32(spec["name"].encode()), seen[spec["name"]]]))
            seen[spec["name"]] += 1

    @property
    def notes(self) -> list[str]:
        """Sentences for the user: left and right are not exchanged although an augmentation would do it."""
        axis = self.frame.left_right_axis
        if self.can_mirror or not any(part.may_mirror(axis) for part, _ in self._of_kind(Flip)):
            return []
        return [f"left and right are not mirrored: {self._without_partner[0]} is trained without its other side"]

    def margin(self, patch: Sequence[int]) -> tuple[int, ...]:
        """Returns the voxels that are read beyond each face of a patch along D, H, W."""
        moves = any(isinstance(part, Movement) and part.probability > 0 for part, _ in self._parts)
        return tuple(round(self.config.margin * side) if moves else 0 for side in patch)

    def runs_on(self, device: torch.device) -> bool:
        """Says whether batches are augmented on the accelerator's device, not where they are loaded."""
        return self.config.on == "device" or (self.config.on == "auto" and device.type != "cpu")

    def swaps_sides(self, number: int) -> bool:
        """Says whether left and right are exchanged in a patch."""
        return self.frame.left_right_axis in self._flipped_axes(number)

    def __call__(
        self, volume_BDHW: Tensor, codes_BDHW: Tensor, numbers: Sequence[int], patch: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Returns augmented patches. Which label a mirrored code stands for is the caller's to know (`swaps_sides`).

        Args:
            volume_BDHW: float32 in [0, 1], with the margin.
            codes_BDHW: Whole numbers, one per set of structures; 0 is none.
            numbers: Of the patches.
            patch: Voxels (D, H, W) of the result.

        Returns:
            Volume and codes without the margin, of the types of the arguments.
        """
        volume_BDHW, codes_BDHW = self._mirror(volume_BDHW, codes_BDHW, numbers)
        volume_BDHW, codes_BDHW = self._move(volume_BDHW, codes_BDHW, numbers, patch)
        for part, stream in self._of_kind(ImageChange):
            rows, rngs = self._chosen(part, stream, numbers)
            if rows:
                volume_BDHW[rows] = part.change(volume_BDHW[rows], rngs)
        volume_BDHW = volume_BDHW.clamp_(0, 1)
        for cut, stream in self._of_kind(Cut):
            for row, rng in zip(*self._chosen(cut, stream, numbers), strict=True):
                inside = torch.from_numpy(cut.inside(rng, patch)).to(volume_BDHW.device)
                volume_BDHW[row] *= inside
                codes_BDHW[row] *= inside
        return volume_BDHW, codes_BDHW

    def _mirror(self, volume_BDHW: Tensor, codes_BDHW: Tensor, numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
        volume_BDHW, codes_BDHW = volume_BDHW.clone(), codes_BDHW.clone()
        for row, number in enumerate(numbers):
            axes = self._flipped_axes(number)
            if axes:
                volume_BDHW[row] = volume_BDHW[row].flip(axes)
                codes_BDHW[row] = codes_BDHW[row].flip(axes)
        return volume_BDHW, codes_BDHW

    def _flipped_axes(self, number: int) -> tuple[int, ...]:
        """Returns the axes of (D, H, W) that are mirrored in a patch; an axis that is mirrored twice is not."""
        count: Counter[int] = Counter()
        for part, stream in self._of_kind(Flip):
            for rng in self._chosen(part, stream, [number])[1]:
                count.update(part.axes(rng))
        if not self.can_mirror:
            count[self.frame.left_right_axis] = 0
        return tuple(axis for axis, times in sorted(count.items()) if times % 2)

    def _move(
        self, volume_BDHW: Tensor, codes_BDHW: Tensor, numbers: Sequence[int], patch: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Applies all movements of a patch in one interpolation, and cuts off the margin."""
        matrices: dict[int, np.ndarray] = {}
        fields: dict[int, Tensor] = {}
        for part, stream in self._of_kind(Movement):
            for row, rng in zip(*self._chosen(part, stream, numbers), strict=True):
                matrix = part.matrix(rng)
                if matrix is not None:
                    matrices[row] = matrices.get(row, np.eye(3)) @ matrix
                field = part.displacement(rng, patch, volume_BDHW.device)
                if field is not None:
                    fields[row] = fields[row] + field if row in fields else field
        volume, codes = centre_of(volume_BDHW, patch), centre_of(codes_BDHW, patch)
        for row in sorted({*matrices, *fields}):
            matrix = matrices.get(row, np.eye(3))
            volume[row], codes[row] = moved(
                volume_BDHW[row], codes_BDHW[row], patch, self.frame.spacing, matrix, fields.get(row)
            )
        return volume, codes

    def _of_kind(self, kind: type[_Kind]) -> list[tuple[_Kind, list[int]]]:
        return [(part, stream) for part, stream in self._parts if isinstance(part, kind) and part.probability > 0]

    def _chosen(
        self, part: Augmentation, stream: list[int], numbers: Sequence[int]
    ) -> tuple[list[int], list[np.random.Generator]]:
        """Returns the rows of the batch that a part changes, and the generator of each."""
        rngs = [np.random.default_rng([self.seed, number, _STREAM, *stream]) for number in numbers]
        rows = [row for row, rng in enumerate(rngs) if rng.random() < part.probability]
        return rows, [rngs[row] for row in rows]
