"""Test-time augmentation by mirroring: the logits of a tile are averaged over mirrored copies of it.

Where the mirror exchanges left and right, a prompt of one side is asked as that of the other: in the mirrored copy of a
scan, the left kidney looks like the right one. So every prompt has two text rows, its own and its mirror's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain, combinations
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mome.errors import InputError, did_you_mean
from mome.inference.predictor import Predictor
from mome.labels import Resolved, load_table
from mome.labels.sides import mirrored_words
from mome.prompts import Prompt, embed_prompts
from mome.volumes.orientation import parse_orientation

if TYPE_CHECKING:
    from mome.modeling import MoME

# The letters of an axis in an option, and the world axis that they stand for.
AXES = {"lr": 0, "ap": 1, "si": 2}


def read_axes(text: str) -> tuple[str, ...]:
    """Reads which axes are mirrored: `lr` (left and right), `ap`, `si`, several with commas, or `all`.

    Raises:
        InputError: It names another axis, or none.
    """
    asked = list(AXES) if text == "all" else [part.strip() for part in str(text).split(",")]
    for part in asked:
        if part not in AXES:
            raise InputError(
                f"mirror names the axes lr, ap and si, got {part!r:.40}{did_you_mean(part, [*AXES, 'all'])}",
                hint="mirror='lr', 'lr,ap' or 'all'",
            )
    return tuple(name for name in AXES if name in asked)


class MirrorPredictor:
    """Averages the logits of another predictor over all combinations of mirrored axes; 2, 4 or 8 passes per tile.

    The place of a mirrored tile is its place in the mirrored volume, so that parts which read it
    (`MapContext.origin_B3`) see what they would see in a mirrored scan. Averaging logits, not probabilities, is our
    choice; nnU-Net does the same.

    Args:
        inner: The predictor of one tile.
        axes: Names of `AXES`.
        orientation: Three letters, the direction each axis of the network grid runs to.
        size: Voxels of the volume along each axis; see `for_volume`.

    Raises:
        InputError: An orientation is none.
    """

    def __init__(
        self, inner: Predictor, axes: Sequence[str], orientation: str, size: tuple[int, int, int] | None = None
    ) -> None:
        self.inner, self.axes, self.orientation, self.size = inner, tuple(axes), orientation, size
        worlds = [world for world, _ in parse_orientation(orientation)]
        places = [worlds.index(AXES[name]) for name in self.axes]
        self.flips = list(chain.from_iterable(combinations(places, n) for n in range(len(places) + 1)))
        self.left_right = worlds.index(0)

    @property
    def patch_size(self) -> tuple[int, int, int]:
        """That of the inner predictor."""
        return self.inner.patch_size

    @property
    def device(self) -> torch.device:
        """That of the inner predictor."""
        return self.inner.device

    def for_volume(self, size: Sequence[int]) -> MirrorPredictor:
        """Returns the predictor for one volume, whose mirrored tiles lie at their places in the mirrored volume.

        Args:
            size: Voxels of the volume along each axis; one that is shorter than a tile is padded to it.
        """
        depth, height, width = (max(side, patch) for side, patch in zip(size, self.patch_size, strict=True))
        return MirrorPredictor(self.inner, self.axes, self.orientation, (depth, height, width))

    def encode(self, tile_B1DHW: Tensor, origin: tuple[int, int, int]) -> list[Any]:
        """Returns the inner features of every mirrored copy; see `Predictor.encode`."""
        return [
            self.inner.encode(tile_B1DHW.flip([axis + 2 for axis in flip]), self._mirrored_origin(origin, flip))
            for flip in self.flips
        ]

    def decode(self, features: list[Any], text_P2T: Tensor) -> Tensor:
        """Returns the mean logits; see `Predictor.decode`.

        Args:
            features: What `encode` returned.
            text_P2T: For every prompt its own row and that of its mirror; see `with_mirrored_rows`.
        """
        total: Tensor | None = None
        for flip, one in zip(self.flips, features, strict=True):
            text_PT = text_P2T[:, 1 if self.left_right in flip else 0]
            logits = self.inner.decode(one, text_PT).flip([axis + 2 for axis in flip])
            total = logits if total is None else total + logits
        assert total is not None
        return total / len(self.flips)

    def _mirrored_origin(self, origin: tuple[int, int, int], flip: tuple[int, ...]) -> tuple[int, int, int]:
        """Returns the first voxel of a mirrored tile in the mirrored volume."""
        if not flip:
            return origin
        if self.size is None:
            raise RuntimeError("the size of the volume is not known: call for_volume first")
        first = list(origin)
        for axis in flip:
            first[axis] = self.size[axis] - self.patch_size[axis] - origin[axis]
        return first[0], first[1], first[2]


def with_mirrored_rows(text_PT: Tensor, prompts: Sequence[Prompt], model: MoME, axes: Sequence[str]) -> Tensor:
    """Returns text rows (P, 2, T) for a `MirrorPredictor`: each prompt's own row, and that of its mirror.

    Args:
        text_PT: The prompts' own rows.
        prompts: The prompts.
        model: The model, which may have to embed labels that nobody asked for.
        axes: The axes that are mirrored; without `lr`, both rows are the same.

    Raises:
        InputError: A prompt's mirror is not known, cannot be embedded, or was not trained although the prompt was.
    """
    names = [mirrored_name(prompt, model) if "lr" in axes else prompt.name for prompt in prompts]
    others = [
        (place, _mirrored_prompt(prompt, name, model))
        for place, (prompt, name) in enumerate(zip(prompts, names, strict=True))
        if name != prompt.name
    ]
    mirrored_PT = text_PT.clone()
    if others:
        try:
            rows = embed_prompts([prompt for _, prompt in others], model)
        except InputError as error:
            raise InputError(
                f"mirroring left and right asks for the other side of each prompt: {error.what}",
                where=error.where,
                hint="mirror='ap,si', which keeps left and right",
            ) from error
        mirrored_PT[[place for place, _ in others]] = rows.to(text_PT)
    return torch.stack([text_PT, mirrored_PT], dim=1)


def mirrored_name(prompt: Prompt, model: MoME) -> str:
    """Returns what a prompt is called in a mirrored scan: the label of the other side, or its own name.

    A label without another side, such as the liver, keeps its name. Free text has no side: the class table removes
    sides from it or refuses it. The names of a model's own labels are mirrored by their words.

    Raises:
        InputError: The structure lies on one side only, or the name of a model's own label has a side and the model has
            no label of the other one.
    """
    table = load_table()
    if prompt.name in table:
        label = table[prompt.name]
        if label.mirror is None and label.laterality is not None:
            raise InputError(
                f"{prompt.name!r} lies on one side only, so that a mirrored scan does not show it",
                hint="mirror='ap,si', which keeps left and right",
            )
        return label.mirror or prompt.name
    mirrored = mirrored_words(prompt.name)
    if mirrored.lower() == prompt.name.lower():
        return prompt.name
    found = next((label for label in model.config.labels if label.lower() == mirrored.lower()), None)
    if found is None:
        raise InputError(
            f"{prompt.name!r} has a side, and this model has no label {mirrored!r} for the mirrored scan",
            hint="mirror='ap,si', which keeps left and right",
        )
    return found


def _mirrored_prompt(prompt: Prompt, name: str, model: MoME) -> Prompt:
    """Returns a prompt for the other side.

    Raises:
        InputError: The model was trained on the prompt and not on its mirror.
    """
    trained = name in model.config.trained_labels
    if prompt.trained and not trained:
        raise InputError(
            f"mirroring left and right asks for {name} where it looks for {prompt.name}, and this model was not "
            "trained on it",
            hint="mirror='ap,si', which keeps left and right",
        )
    resolved = Resolved(name, name, None, "exact", None, (name,))
    return replace(prompt, text=name, name=name, resolved=resolved, trained=trained, warning=None)
