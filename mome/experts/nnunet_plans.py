"""What a folder of nnU-Net says of its network in `plans.json` and `dataset.json`, read and checked for the adapter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mome.errors import InputError

# The networks of nnU-Net, and the arguments in its plans that are names of classes. No other name is imported.
NETWORKS, ARGUMENTS = "dynamic_network_architectures.architectures.", "torch.nn."


def spacing_xyz(spacing: Sequence[float], transpose_forward: Sequence[int]) -> list[float]:
    """The spacing of a configuration, which is in nnU-Net's transposed order of (z, y, x), as (x, y, z)."""
    zyx = [0.0, 0.0, 0.0]
    for position, axis in enumerate(transpose_forward):
        zyx[axis] = float(spacing[position])
    return zyx[::-1]


def classes_of(dataset: dict[str, Any]) -> tuple[list[str], str]:
    """The names of the network's maps in order, and the activation, from the contents of `dataset.json`.

    Labels have one map for each number, the background first, under a softmax. Regions, which are lists of several
    numbers, have one map each in the order of the file, without the background, under a sigmoid.
    """
    labels = {name: value for name, value in dataset["labels"].items() if name != "ignore"}
    if any(isinstance(value, list) and len(value) > 1 for value in labels.values()):
        return [name for name, value in labels.items() if value not in (0, [0])], "sigmoid"
    numbers = {name: int(value[0] if isinstance(value, list) else value) for name, value in labels.items()}
    return sorted(numbers, key=lambda name: numbers[name]), "softmax"


def check_configuration(configuration: Any, dataset: dict[str, Any], where: str) -> None:
    """Checks that a configuration is one that the adapter carries.

    Raises:
        InputError: It is 2-D, a stage of a cascade, reads several channels, or does not normalise HU as CT.
    """
    channels = dataset.get("channel_names", dataset.get("modality", {}))
    reasons = {
        "is 2-D": len(configuration.patch_size) != 3,
        "is a stage of a cascade, which reads masks of another network": configuration.previous_stage_name is not None,
        f"reads {len(channels)} channels": len(channels) != 1,
        f"normalises by {configuration.normalization_schemes}, not as CT": list(configuration.normalization_schemes)
        != ["CTNormalization"],
    }
    for reason, applies in reasons.items():
        if applies:
            raise InputError(
                f"the nnU-Net configuration {reason}",
                where=where,
                hint="a 3d_fullres or 3d_lowres configuration of CT, or WholeModel around a module of your own",
            )


def check_window(hu_window: Sequence[float], intensities: dict[str, float], where: str) -> None:
    """Checks that the model's window keeps all HU that nnU-Net reads.

    Raises:
        InputError: The window cuts some off.
    """
    low, high = intensities["percentile_00_5"], intensities["percentile_99_5"]
    if hu_window[0] > low or hu_window[1] < high:
        raise InputError(
            f"nnU-Net reads {low:.0f} to {high:.0f} HU, the window {list(hu_window)} cuts some of it off",
            where=where,
            hint=f"a processor with hu_window=[{low:.0f}, {high:.0f}] or wider",
        )


def read_intensities(properties: dict[str, Any]) -> dict[str, float]:
    """The four numbers of nnU-Net's normalisation of CT."""
    return {key: float(properties[key]) for key in ("mean", "std", "percentile_00_5", "percentile_99_5")}


def checked_class(name: Any, prefix: str) -> str:
    """A name of a class in plans.json that may be imported.

    Raises:
        InputError: It is outside the packages that nnU-Net's own plans name.
    """
    if not isinstance(name, str) or not name.startswith(prefix):
        raise InputError(
            f"plans.json names the class {name!r:.80}, which is not imported: it is not in {prefix[:-1]}",
            hint="build the network yourself and pass WholeModel(network, classes, spacing=…)",
        )
    return name


def checked_arguments(configuration: Any) -> dict[str, Any]:
    """The arguments of the network of a configuration, whose names of layers may be imported.

    Raises:
        InputError: One names another class than a layer of torch.
    """
    arguments = dict(configuration.network_arch_init_kwargs)
    for key in configuration.network_arch_init_kwargs_req_import:
        if arguments[key] is not None:
            checked_class(arguments[key], ARGUMENTS)
    return arguments
