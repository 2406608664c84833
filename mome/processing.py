"""The processor turns a CT volume into the input of the model.

The settings of the network grid (spacing, orientation, HU window) are stored in `preprocessor_config.json` only.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Mapping
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.image_processing_base import ImageProcessingMixin

from mome.errors import InputError, did_you_mean
from mome.hub import locate
from mome.hub_connection import download_options
from mome.json_file import checked_object

if TYPE_CHECKING:
    from mome.volumes import Grid, Volume

# Written into preprocessor_config.json, so that AutoProcessor finds this class.
_AUTO_MAP = {"AutoProcessor": "modeling_mome.MoMEProcessor"}
_SETTINGS = ("spacing", "orientation", "hu_window", "padding_hu")
_REPLACEMENTS = {
    "spacing": "spacing=[1.5, 1.5, 1.5]",
    "hu_window": "hu_window=[-175, 250]",
    "padding_hu": "padding_hu=-1024",
}
_SHORTEST_MM, _USUAL_LONGEST_MM, _LONGEST_MM = 0.1, 10.0, 30.0
# Keys that transformers writes into preprocessor_config.json or sets on the object.
_HUGGING_FACE_KEYS = ("image_processor_type", "feature_extractor_type", "processor_class", "auto_map", "backend")
_LOADING_KEYS = (
    "cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder", "proxies",
    "return_unused_kwargs", "image_processor_filename", "trust_remote_code",
)  # fmt: skip


class MoMEProcessor(ImageProcessingMixin):
    """Resamples a CT to the network grid by affine and windows its HU to [0, 1].

    Args:
        spacing: Voxel size (x, y, z) of the network grid in mm, along `orientation`'s axes.
        orientation: Three letters, the direction each axis of the network grid runs to.
        hu_window: (low, high) in HU; below is 0, above is 1.
        padding_hu: HU outside the scan.

    Settings are also checked when they are set later, so that a typo cannot move a model to another grid unnoticed.

    Raises:
        InputError: A setting is unknown, or its value is out of range.
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
        self.spacing = spacing
        self.orientation = orientation
        self.hu_window = hu_window
        self.padding_hu = padding_hu

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _SETTINGS:
            value = _checked(name, value)
        elif name not in _HUGGING_FACE_KEYS and not name.startswith("_"):
            raise _unknown(name)
        super().__setattr__(name, value)

    @classmethod
    def from_pretrained(cls, name: str | Path, **kwargs: Any) -> MoMEProcessor:  # type: ignore[override]
        """Loads the settings of a folder, a bundled checkpoint or a Hub id.

        Args:
            name: As for `MoME.from_pretrained`.
            kwargs: Settings override the saved ones, as in `spacing=[2, 2, 2]`; everything else goes to
                transformers (`revision`, `cache_dir`, …).

        Raises:
            InputError: The settings are missing or cannot be reached, a setting is unknown, or a value is none that
                a CT segmenter can have.
        """
        overrides = {key: kwargs.pop(key) for key in _SETTINGS if key in kwargs}
        for key in kwargs:
            if key not in _LOADING_KEYS and not key.startswith("_"):
                raise _unknown(key)
        kwargs.pop("trust_remote_code", None)
        place, revision = locate(name, kwargs.pop("revision", None), kwargs.get("subfolder"))
        if os.path.isdir(place):
            kwargs.pop("subfolder", None)  # it is part of the place now
        kwargs = download_options(place, kwargs)
        try:
            loaded = super().from_pretrained(place, revision=revision or "main", **kwargs)
        except InputError as error:
            raise InputError(
                error.what, where=error.where or f"preprocessor_config.json of {name}", hint=error.hint
            ) from error
        except OSError as error:
            missing = Path(place).is_dir() and not (Path(place) / "preprocessor_config.json").exists()
            reason = "is not there" if missing else f"cannot be loaded: {str(error).splitlines()[0][:120]}"
            raise InputError(
                f"the model's preprocessor_config.json {reason}",
                where=str(name),
                hint="give a processor, or MoMEProcessor.from_pretrained(its original).save_pretrained(this folder)",
            ) from error
        for key, value in overrides.items():
            setattr(loaded[0] if isinstance(loaded, tuple) else loaded, key, value)
        _check_plausible(
            loaded[0] if isinstance(loaded, tuple) else loaded, overrides, f"preprocessor_config.json of {name}"
        )
        return loaded

    @classmethod
    def get_image_processor_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Reads the settings of a checkpoint; the file may come from anybody.

        Raises:
            InputError: The file does not hold an object of settings, or a setting is unknown.
            OSError: The file is missing or no JSON.
        """
        try:
            found, unused = super().get_image_processor_dict(*args, **kwargs)
        except (RecursionError, TypeError, UnicodeDecodeError) as error:
            raise InputError(
                "preprocessor_config.json is no object of settings, is no UTF-8, or nests too deeply"
            ) from error
        found = checked_object(found, "preprocessor_config.json", "the model's folder")
        for key in found:
            if key not in _SETTINGS and key not in _HUGGING_FACE_KEYS and not key.startswith("_"):
                raise _unknown(key)
        return {key: value for key, value in found.items() if key in _SETTINGS}, unused

    def to_dict(self) -> dict[str, Any]:
        """Returns what preprocessor_config.json holds."""
        return {**super().to_dict(), "auto_map": dict(_AUTO_MAP)}

    def settings(self) -> dict[str, Any]:
        """Returns the settings that decide the network grid; a cache depends on them."""
        return {
            "spacing": self.spacing,
            "orientation": self.orientation,
            "hu_window": self.hu_window,
            "padding_hu": self.padding_hu,
        }

    def network_grid(self, grid: Grid) -> Grid:
        """Returns the network grid that covers `grid`.

        Raises:
            InputError: It is larger than `mome.volumes` allows.
        """
        from mome.volumes import network_grid

        x, y, z = self.spacing
        return network_grid(grid, spacing=(x, y, z), orientation=self.orientation)

    def window(self, hu: Tensor) -> Tensor:
        """Maps HU to [0, 1]; any shape."""
        low, high = self.hu_window
        return ((hu - low) / (high - low)).clamp_(0, 1)

    def to_network(self, volume: Volume, part: Grid | None = None) -> tuple[Tensor, Grid]:
        """Returns the volume as float32 (1, 1, D, H, W) in [0, 1] on the network grid, and that grid.

        Args:
            volume: The scan in HU.
            part: A part of the network grid, which is returned instead of the whole.
        """
        from mome.volumes import resample

        target = self.network_grid(volume.grid) if part is None else part
        array = torch.as_tensor(volume.array, dtype=torch.float32)
        hu = resample(array, volume.grid, target, mode="linear", fill=self.padding_hu)
        return self.window(hu)[None, None], target


def processor_of(model: Any) -> MoMEProcessor:
    """Returns the processor of a model: `processor`, else the one saved with its checkpoint.

    Raises:
        InputError: The model has no processor.
    """
    for carried in (getattr(model, "processor", None), getattr(model, "loaded_processor", None)):
        if carried is not None:
            return carried
    place = getattr(model.config, "name_or_path", "")
    if not place:
        raise InputError(
            "a model without its processor: the network grid is not known",
            hint="pass processor=MoMEProcessor.from_pretrained(…) or mome.preset_processor(…)",
        )
    return MoMEProcessor.from_pretrained(place)  # the name includes the revision that the model was loaded with


def implausible_settings(settings: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Returns the settings that no CT segmenter has, each with a sentence; the limits are our choice.

    A voxel is 0.1 to 10 mm long. The HU window is 20 to 20,000 HU wide and holds soft tissue: it reaches above −200 and
    begins below 300 HU. The padding is air, or lies below the window.

    Args:
        settings: `MoMEProcessor.settings`.
    """
    found = []
    shortest, longest = min(settings["spacing"]), max(settings["spacing"])
    if shortest < _SHORTEST_MM or longest > _USUAL_LONGEST_MM:
        is_coarse = shortest >= _SHORTEST_MM and longest <= _LONGEST_MM
        why = "coarse: small structures are lost" if is_coarse else "none of a CT segmenter (0.1 to 30 mm)"
        found.append(("spacing", f"the spacing {settings['spacing']} mm is {why}"))
    low, high = settings["hu_window"]
    if not 20 <= high - low <= 20_000 or high <= -200 or low >= 300:
        found.append(
            ("hu_window", f"the hu_window {settings['hu_window']} is none of a CT segmenter: it must show soft tissue")
        )
    padding = settings["padding_hu"]
    if not -32_768 <= padding <= max(-200, low):
        found.append(("padding_hu", f"padding_hu {padding:g} is no value of air, which lies outside of a scan"))
    return found


def _check_plausible(processor: MoMEProcessor, overrides: Collection[str], where: str) -> None:
    """Checks settings that were read from a file, which may be damaged; see `implausible_settings`.

    Voxels of 10 to 30 mm are noted where a scan is segmented.

    Args:
        processor: The processor.
        overrides: Names of settings that the caller gave; they are noted where a scan is segmented.
        where: The file that errors name.

    Raises:
        InputError: A setting of the file is none that a CT segmenter has.
    """
    for name, what in implausible_settings(processor.settings()):
        is_coarse = (
            name == "spacing" and min(processor.spacing) >= _SHORTEST_MM and max(processor.spacing) <= _LONGEST_MM
        )
        if name not in overrides and not is_coarse:
            raise InputError(
                what,
                where=where,
                hint=f"is the file damaged? MoMEProcessor.from_pretrained(…, {_REPLACEMENTS[name]}) replaces it",
            )


def _checked(name: str, value: Any) -> Any:
    """Checks a setting and returns it in the form that is stored."""
    from mome.volumes.orientation import orientation_letters, parse_orientation

    if name == "orientation":
        return orientation_letters(parse_orientation(value))
    if name == "padding_hu":
        if not _is_number(value):
            raise InputError(f"padding_hu is a number of HU, got {value!r:.60}")
        return float(value)
    numbers = list(value) if hasattr(value, "__iter__") and not isinstance(value, str | dict) else []
    real = all(_is_number(item) for item in numbers)
    if name == "spacing" and not (real and len(numbers) == 3 and min(numbers) >= 0.01 and max(numbers) <= 1000):
        raise InputError(f"spacing is three positive numbers of mm from 0.01 to 1000, got {value!r:.60}")
    if name == "hu_window" and not (real and len(numbers) == 2 and numbers[0] < numbers[1]):
        raise InputError(f"hu_window is (low, high) in HU with low < high, got {value!r:.60}")
    return [float(item) for item in numbers]


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _unknown(name: str) -> InputError:
    return InputError(
        f"a processor has no setting {name!r:.60}{did_you_mean(name[:60], _SETTINGS)}",
        hint="settings: " + ", ".join(_SETTINGS),
    )
