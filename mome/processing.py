"""The processor turns a CT volume into the input of the model.

The settings of the network grid (spacing, orientation, HU window) are stored in `preprocessor_config.json` only.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.image_processing_base import ImageProcessingMixin

from mome.checksums import CHECKSUMS, changed_file, sums_of
from mome.errors import InputError
from mome.hub import locate
from mome.hub_connection import DOWNLOAD_KEYS, download_options
from mome.json_file import checked_object, read_json_object
from mome.processor_settings import (
    PROCESSOR_FILE,
    SETTINGS,
    changed_settings,
    check_plausible,
    checked_setting,
    unknown_setting,
)
from mome.remote_code import AUTO_MAP, write_stub
from mome.weights_file import find_file

if TYPE_CHECKING:
    from mome.volumes import Grid, Volume

# At this angle, masks of the bundled model on a grid that is turned with the scan are as close to those of the upright
# patient as masks on an upright grid; beyond it they are worse (`benchmarks/results/orientations.md`).
LARGEST_ROTATION_DEG = 10.0
# The overlap of tiles of nnU-Net, for models that name no other.
USUAL_OVERLAP = 0.5
# Keys that transformers writes into preprocessor_config.json or sets on the object.
_HUGGING_FACE_KEYS = ("image_processor_type", "feature_extractor_type", "processor_class", "auto_map", "backend")
_LOADING_KEYS = (
    *DOWNLOAD_KEYS, "proxies", "return_unused_kwargs", "image_processor_filename", "trust_remote_code"
)  # fmt: skip


class MoMEProcessor(ImageProcessingMixin):
    """Resamples a CT to the network grid by affine and windows its HU to [0, 1].

    Args:
        spacing: Voxel size (x, y, z) of the network grid in mm, along `orientation`'s axes.
        orientation: Three letters, the direction each axis of the network grid runs to.
        hu_window: (low, high) in HU; below is 0, above is 1.
        padding_hu: HU outside the scan.
        postprocess: Rules of post-processing that `Segmenter` applies to masks unless it is told otherwise: structure →
            config strings, `*` for every structure, as in `{"spinal_cord": ["keep_near(mm=10)"]}`.
        overlap: The share of a tile that its neighbour covers too, 0 to 0.9, which `Segmenter` takes unless it is told
            otherwise. Less overlap means fewer tiles and less time; how much a model needs has to be measured.
        extend_mm: How far a scan is continued beyond its upper and lower end before it is segmented, with copies of its
            last planes, 0 to 200 mm, rounded to whole planes of the network. Networks that saw organs whole find them
            better where a scan cuts them off. Around a turned scan that is put upright, the copies fill what the
            network's grid shows beyond its ends. Training does not use it.

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
        postprocess: Mapping[str, Sequence[str]] | None = None,
        overlap: float = USUAL_OVERLAP,
        extend_mm: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.spacing = spacing
        self.orientation = orientation
        self.hu_window = hu_window
        self.padding_hu = padding_hu
        self.postprocess = postprocess
        self.overlap = overlap
        self.extend_mm = extend_mm

    def __setattr__(self, name: str, value: Any) -> None:
        if name in SETTINGS:
            value = checked_setting(name, value)
        elif name not in _HUGGING_FACE_KEYS and not name.startswith("_"):
            raise unknown_setting(name)
        super().__setattr__(name, value)

    @classmethod
    def from_pretrained(cls, name: str | Path, **kwargs: Any) -> MoMEProcessor:  # type: ignore[override]
        """Loads the settings of a folder, a bundled checkpoint or a Hub id.

        Args:
            name: As for `MoME.from_pretrained`.
            kwargs: Settings override the saved ones, as in `spacing=[2, 2, 2]`; everything else goes to
                transformers (`revision`, `cache_dir`, …).

        Raises:
            InputError: The settings are missing or cannot be reached, a setting is unknown, a value is none that a CT
                segmenter can have, or it was changed since the file was saved.
        """
        overrides = {key: kwargs.pop(key) for key in SETTINGS if key in kwargs}
        for key in kwargs:
            if key not in _LOADING_KEYS and not key.startswith("_"):
                raise unknown_setting(key)
        kwargs.pop("trust_remote_code", None)
        # A processor may be saved without a model.
        holding = ("config.json", PROCESSOR_FILE)
        place, revision = locate(name, kwargs.pop("revision", None), kwargs.get("subfolder"), holding)
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
        processor = loaded[0] if isinstance(loaded, tuple) else loaded
        check_plausible(processor.settings(), overrides, f"{PROCESSOR_FILE} of {name}")
        hub = {key: value for key, value in {**kwargs, "revision": revision}.items() if key in DOWNLOAD_KEYS}
        file = find_file(place, PROCESSOR_FILE, hub)
        changed = [] if file is None else changed_settings(read_json_object(file), overrides)
        if changed:
            raise changed_file([f"{key} in {PROCESSOR_FILE}" for key in changed], name)
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
        except InputError:
            raise
        except ValueError as error:  # Python reads no whole number of more than 4300 digits
            raise InputError(f"preprocessor_config.json cannot be read: {error!s:.80}") from error
        found = checked_object(found, "preprocessor_config.json", "the model's folder")
        for key in found:
            if key not in (*SETTINGS, *_HUGGING_FACE_KEYS, CHECKSUMS) and not key.startswith("_"):
                raise unknown_setting(key)
        return {key: value for key, value in found.items() if key in SETTINGS}, unused

    def to_dict(self) -> dict[str, Any]:
        """Returns what preprocessor_config.json holds; settings of inference only where they are not the usual ones."""
        held = {**super().to_dict(), "auto_map": {"AutoProcessor": AUTO_MAP["AutoProcessor"]}}
        usual = {"postprocess": None, "overlap": USUAL_OVERLAP, "extend_mm": 0.0}
        return {key: value for key, value in held.items() if key not in usual or value != usual[key]}

    def to_json_file(self, json_file_path: str | os.PathLike) -> None:
        """Writes preprocessor_config.json with the checksums of its settings, and beside it what `auto_map` names."""
        held = self.to_dict()
        values = {**held, CHECKSUMS: sums_of({key: held[key] for key in SETTINGS if key in held})}
        path = Path(json_file_path)
        path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        if path.name == PROCESSOR_FILE:  # AutoProcessor refuses a folder without it
            write_stub(path.parent)

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

        It keeps the rotation of a scan that is turned by up to 10°, so that voxels are interpolated once and the grids
        are parallel. A scan that is turned more is put upright, because networks know patients along the axes;
        `mome.inference.scan_grid` then cuts the grid to the patient.

        Raises:
            InputError: It is larger than `mome.volumes` allows.
        """
        from mome.volumes import network_grid
        from mome.volumes.upright import rotation_degrees, upright_grid

        x, y, z = self.spacing
        make = upright_grid if rotation_degrees(grid) > LARGEST_ROTATION_DEG else network_grid
        return make(grid, spacing=(x, y, z), orientation=self.orientation)

    def extended(self, network: Grid) -> Grid:
        """Returns a network grid that is continued by `extend_mm` at its upper and lower end.

        Args:
            network: What `network_grid` returned, or a part of it.

        Raises:
            InputError: It is larger than `mome.volumes` allows.
        """
        from mome.volumes.sizes import check_size

        if not self.extend_mm:
            return network
        axis = next(axis for axis, letter in enumerate(self.orientation) if letter in "SI")
        planes = round(self.extend_mm / network.spacing[axis])
        grid = network.crop(axis, -planes, network.shape[axis] + planes)
        check_size(grid.shape, what="the network's grid of the scan", hint="a part of the scan, or a smaller extend_mm")
        return grid

    def window(self, hu: Tensor) -> Tensor:
        """Maps HU to [0, 1]; any shape."""
        low, high = self.hu_window
        return ((hu - low) / (high - low)).clamp_(0, 1)

    def to_network(self, volume: Volume, part: Grid | None = None) -> tuple[Tensor, Grid]:
        """Returns the volume as float32 (1, 1, D, H, W) in [0, 1] on the network grid, and that grid.

        Args:
            volume: The scan in HU.
            part: A part of the network grid, or of what `extended` makes of it, which is returned instead of the whole.
        """
        from mome.volumes import resample
        from mome.volumes.orientation import closest_axes

        target = self.network_grid(volume.grid) if part is None else part
        array = torch.as_tensor(volume.array, dtype=torch.float32)
        upwards = next(axis for axis, (world, _) in enumerate(closest_axes(volume.affine)) if world == 2)
        repeat = upwards if self.extend_mm else None
        hu = resample(array, volume.grid, target, mode="linear", fill=self.padding_hu, repeat=repeat)
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
