"""MONAI's SegResNet and SegResNetDS, and CT-FM, which has the layout of the second."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mome.convert.mapping import (
    Conversion,
    another_architecture,
    check_one_channel,
    count_blocks,
    match_encoder,
    read_shape,
)

# CT-FM's model card orients to SPL and scales −1024…2048 HU to 0…1; its pre-training configuration has voxels of
# 3 × 1 × 1 mm along these axes.
CT_FM_PROCESSOR = {"spacing": [3.0, 1.0, 1.0], "orientation": "SPL", "hu_window": [-1024.0, 2048.0]}
_PROCESSOR = {"spacing": [1.5, 1.5, 1.5], "orientation": "RAS", "hu_window": [-175.0, 250.0]}


def ct_fm(source: Mapping[str, Tensor], norm: str | None = None) -> Conversion:
    """A checkpoint of CT-FM (Pai et al. 2025, arXiv 2501.09001): `ct_fm_segresnet` or `ct_fm_feature_extractor`.

    Raises:
        InputError: See `mome.convert.mapping.match_encoder`.
    """
    what = "CT-FM with the layout of SegResNetDS"
    found = _conversion(source, "deep_supervision", what, norm)
    found.processor = dict(CT_FM_PROCESSOR)
    found.notes.append("CT-FM's pre-training trained the encoder only; a decoder in the file is copied as it is")
    return found


def segresnet(source: Mapping[str, Tensor], norm: str | None = None) -> Conversion:
    """A state dict of MONAI's `SegResNet` or `SegResNetDS`.

    Args:
        source: The file's tensors.
        norm: `batch`, `instance` or `group`, where the file does not tell: the weights of the last two look alike.

    Raises:
        InputError: See `mome.convert.mapping.match_encoder`.
    """
    if "convInit.conv.weight" in source:
        found = _conversion(source, "original", "SegResNet of MONAI", norm)
    else:
        found = _conversion(source, "deep_supervision", "SegResNetDS of MONAI", norm)
    found.processor = dict(_PROCESSOR)
    found.notes.append(
        "a state dict does not say on which grid it was trained; 1.5 mm, RAS and -175 to 250 HU are assumed "
        "(--spacing, --orientation, --hu-window)"
    )
    return found


def _conversion(source: Mapping[str, Tensor], layout: str, what: str, norm: str | None) -> Conversion:
    names = {key: key for key in source}
    if layout == "deep_supervision" and "conv_init.weight" in source:  # the encoder alone
        names = {f"encoder.{key}" if key.startswith(("conv_init.", "layers.")) else key: key for key in source}
    tensors = {key: source[original] for key, original in names.items()}
    spec, notes = (_original if layout == "original" else _deep_supervision)(tensors, what)
    known = "batch" if any(key.endswith(".running_mean") for key in tensors) else None
    spec["norm"] = known or norm or ("group" if layout == "original" else "instance")
    if known is None and norm is None:
        notes.append(
            f"the file does not say whether it normalises instances or groups; {spec['norm']} is assumed (--norm)"
        )
    required = ("convInit.", "down_layers.", "up_") if layout == "original" else ("encoder.",)
    found, used = match_encoder(spec, tensors, required=required, what=what)
    return Conversion(
        config={"encoder": spec}, tensors=found, used={names[key] for key in used}, processor={}, notes=notes
    )


def _deep_supervision(source: Mapping[str, Tensor], what: str) -> tuple[dict[str, Any], list[str]]:
    filters, channels, *kernel = read_shape(source, "encoder.conv_init.weight", what, 5)
    check_one_channel(channels, what)
    down = count_blocks(source, "encoder.layers.{stage}.blocks.{block}.conv1.weight")
    if len(down) < 2:
        raise another_architecture(what, f"encoder.layers.{len(down)}.blocks.0.conv1.weight", None, source)
    up = count_blocks(source, "up_layers.{stage}.blocks.{block}.conv1.weight")
    spec = {"name": "segresnet", "layout": "deep_supervision", "filters": filters, "blocks_down": down}
    spec["blocks_up"] = up or [1] * (len(down) - 1)
    # A kernel of one voxel marks a stage whose axis is not downsampled; each such stage doubles the voxel's size.
    kernels = [source[f"encoder.layers.{stage}.blocks.0.conv1.weight"].shape[2:] for stage in range(len(down))]
    resolution = [float(2 ** sum(kernel[axis] == 1 for kernel in kernels)) for axis in range(3)]
    spec["resolution"] = None if len(set(resolution)) == 1 else resolution
    return spec, []


def _original(source: Mapping[str, Tensor], what: str) -> tuple[dict[str, Any], list[str]]:
    filters, channels, *_ = read_shape(source, "convInit.conv.weight", what, 5)
    check_one_channel(channels, what)
    down = _blocks(source, "down_layers", first=1)  # entry 0 of a stage is its strided convolution
    if len(down) < 2:
        raise another_architecture(what, f"down_layers.{len(down)}.1.conv1.conv.weight", None, source)
    spec = {"name": "segresnet", "layout": "original", "filters": filters, "blocks_down": down}
    spec["blocks_up"] = _blocks(source, "up_layers", first=0) or [1] * (len(down) - 1)
    spec["resolution"] = None
    return spec, []


def _blocks(source: Mapping[str, Tensor], stages: str, *, first: int) -> list[int]:
    """The number of residual blocks in each stage; `first` is the number of the first one."""
    counts: list[int] = []
    while f"{stages}.{len(counts)}.{first}.conv1.conv.weight" in source:
        count = 1
        while f"{stages}.{len(counts)}.{first + count}.conv1.conv.weight" in source:
            count += 1
        counts.append(count)
    return counts
