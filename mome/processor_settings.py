"""The settings of the processor: which there are, which values they may have, and whether they were changed."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from numbers import Real
from typing import Any

from mome.checksums import CHECKSUMS, changed_keys
from mome.errors import InputError, did_you_mean

PROCESSOR_FILE = "preprocessor_config.json"
SETTINGS = ("spacing", "orientation", "hu_window", "padding_hu", "postprocess", "overlap", "extend_mm")
_REPLACEMENTS = {
    "spacing": "spacing=[1.5, 1.5, 1.5]",
    "hu_window": "hu_window=[-175, 250]",
    "padding_hu": "padding_hu=-1024",
}
_LONGEST_EXTENSION_MM = 200.0
_SHORTEST_MM, _USUAL_LONGEST_MM, _LONGEST_MM = 0.1, 10.0, 30.0


def summed_settings(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings of a preprocessor_config.json, which have checksums, in the form that is stored.

    Raises:
        InputError: A value is out of range.
    """
    return {key: checked_setting(key, raw[key]) for key in SETTINGS if key in raw}


def changed_settings(raw: Mapping[str, Any], ignore: Collection[str] = ()) -> list[str]:
    """Returns the settings of a preprocessor_config.json that were changed since it was saved.

    Args:
        raw: What the file holds.
        ignore: Settings that are not used.

    Raises:
        InputError: A value that is used is out of range.
    """
    used = {key: value for key, value in raw.items() if key not in ignore}
    return changed_keys(summed_settings(used), raw.get(CHECKSUMS), ignore)


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


def check_plausible(settings: Mapping[str, Any], overrides: Collection[str], where: str) -> None:
    """Checks settings that were read from a file, which may be damaged; see `implausible_settings`.

    Voxels of 10 to 30 mm are noted where a scan is segmented.

    Args:
        settings: `MoMEProcessor.settings`.
        overrides: Names of settings that the caller gave; they are noted where a scan is segmented.
        where: The file that errors name.

    Raises:
        InputError: A setting of the file is none that a CT segmenter has.
    """
    for name, what in implausible_settings(settings):
        is_coarse = (
            name == "spacing" and min(settings["spacing"]) >= _SHORTEST_MM and max(settings["spacing"]) <= _LONGEST_MM
        )
        if name not in overrides and not is_coarse:
            raise InputError(
                what,
                where=where,
                hint=f"is the file damaged? MoMEProcessor.from_pretrained(…, {_REPLACEMENTS[name]}) replaces it",
            )


def checked_setting(name: str, value: Any) -> Any:
    """Checks a setting and returns it in the form that is stored."""
    from mome.postprocess.rules import checked_rules
    from mome.volumes.orientation import orientation_letters, parse_orientation

    if name == "postprocess":
        return checked_rules(value or {}) or None
    if name == "overlap":
        check_overlap(value)
        return float(value)
    if name == "extend_mm":
        if not _is_number(value) or not 0 <= value <= _LONGEST_EXTENSION_MM:
            raise InputError(f"extend_mm is from 0 to {_LONGEST_EXTENSION_MM:g} mm, got {value!r:.60}")
        return float(value)
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


def check_overlap(value: Any) -> None:
    """Checks the share of a tile that its neighbour covers too.

    Raises:
        InputError: It is none from 0 to 0.9.
    """
    if not _is_number(value) or not 0 <= value <= 0.9:
        raise InputError(f"overlap is from 0 to 0.9, got {value!r:.60}")


def _is_number(value: Any) -> bool:
    if not isinstance(value, Real) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond every float
        return False


def unknown_setting(name: str) -> InputError:
    return InputError(
        f"a processor has no setting {name!r:.60}{did_you_mean(name[:60], SETTINGS)}",
        hint="settings: " + ", ".join(SETTINGS),
    )
