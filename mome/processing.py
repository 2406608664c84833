"""From a CT volume to what the model sees, and back onto the grid it came from.

Network-grid settings (spacing, orientation, HU window) live here alone, in `preprocessor_config.json`.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.image_processing_base import ImageProcessingMixin

from mome.errors import InputError
from mome.hub import locate

if TYPE_CHECKING:
    from mome.volumes import Grid, Volume


class MoMEProcessor(ImageProcessingMixin):
    """Resamples a CT to the network grid by affine and windows its HU to [0, 1].

    Args:
        spacing: Voxel size (x, y, z) of the network grid in mm, along `orientation`'s axes.
        orientation: Three letters, the direction each axis of the network grid runs to.
        hu_window: (low, high) in HU; below is 0, above is 1.
        padding_hu: HU outside the scan.
    """

    model_input_names = ["volume"]

    def __init__(
        self,
        spacing: tuple[float, float, float] | list[float] = (1.5, 1.5, 1.5),
        orientation: str = "RAS",
        hu_window: tuple[float, float] | list[float] = (-175.0, 250.0),
        padding_hu: float = -1024.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if len(spacing) != 3 or min(spacing) <= 0:
            raise InputError(f"spacing is three positive numbers of mm, got {list(spacing)}")
        if len(hu_window) != 2 or hu_window[0] >= hu_window[1]:
            raise InputError(f"hu_window is (low, high) in HU with low < high, got {list(hu_window)}")
        self.spacing = [float(value) for value in spacing]
        self.orientation = orientation
        self.hu_window = [float(value) for value in hu_window]
        self.padding_hu = float(padding_hu)

    @classmethod
    def from_pretrained(cls, name: str | Path, **kwargs: Any) -> MoMEProcessor:  # type: ignore[override]
        """Loads the settings of a folder, a bundled checkpoint or a Hub id.

        Raises:
            InputError: There are none, or they cannot be reached.
        """
        try:
            return super().from_pretrained(locate(name), **kwargs)
        except OSError as error:
            raise InputError(
                f"'{name}' has no preprocessor_config.json: {str(error).splitlines()[0][:120]}",
                hint="give a processor, or save one beside the model (processor.save_pretrained)",
            ) from error

    def settings(self) -> dict[str, Any]:
        """What decides the network grid: the part of the configuration that a cache depends on."""
        return {
            "spacing": self.spacing,
            "orientation": self.orientation,
            "hu_window": self.hu_window,
            "padding_hu": self.padding_hu,
        }

    def settings_hash(self) -> str:
        """SHA-256 of `settings`, first 16 hexadecimal digits; a cache carries it."""
        return hashlib.sha256(json.dumps(self.settings(), sort_keys=True).encode()).hexdigest()[:16]

    def network_grid(self, grid: Grid) -> Grid:
        """The network grid that covers `grid`."""
        from mome.volumes import network_grid

        return network_grid(grid, spacing=tuple(self.spacing), orientation=self.orientation)

    def window(self, hu: Tensor) -> Tensor:
        """HU → [0, 1], any shape."""
        low, high = self.hu_window
        return ((hu - low) / (high - low)).clamp_(0, 1)

    def to_network(self, volume: Volume) -> tuple[Tensor, Grid]:
        """Volume → float32 (1, 1, D, H, W) in [0, 1] on the network grid, and that grid."""
        from mome.volumes import resample

        target = self.network_grid(volume.grid)
        array = torch.as_tensor(volume.array, dtype=torch.float32)
        hu = resample(array, volume.grid, target, mode="linear", fill=self.padding_hu)
        return self.window(hu)[None, None], target
