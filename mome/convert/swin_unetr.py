"""MONAI's SwinUNETR (v1, v2), its self-supervised encoder, and VoCo, which has the same layout."""

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
from mome.errors import InputError

# The grid and window of MONAI's SwinUNETR recipes for the abdomen and of VoCo: 1.5 mm, −175…250 HU.
PROCESSOR = {"spacing": [1.5, 1.5, 1.5], "orientation": "RAS", "hu_window": [-175.0, 250.0]}


def swin_unetr(source: Mapping[str, Tensor], norm: str | None = None) -> Conversion:
    """A state dict of `monai.networks.nets.SwinUNETR`, or of its encoder alone.

    Raises:
        InputError: See `mome.convert.mapping.match_encoder`.
    """
    renamed = monai_names(source)
    whole = any(key.startswith("decoder1.") for key in renamed)
    parts = ("swinViT.", "encoder", "decoder") if whole else ("swinViT.",)
    return _conversion(renamed, parts, "SwinUNETR of MONAI", _UNKNOWN_GRID)


def voco(source: Mapping[str, Tensor], norm: str | None = None) -> Conversion:
    """A checkpoint of VoCo or VoComni (Wu et al. 2024, arXiv 2410.09890), of feature size 48, 96 or 192.

    The self-supervised files hold the encoder and a projection head, VoComni's the decoder too.

    Raises:
        InputError: See `mome.convert.mapping.match_encoder`.
    """
    return _conversion(monai_names(source), ("swinViT.",), "VoCo with the layout of SwinUNETR", ())


_UNKNOWN_GRID = (
    "a state dict does not say on which grid it was trained; 1.5 mm, RAS and -175 to 250 HU are assumed "
    "(--spacing, --orientation, --hu-window)",
)


def _conversion(
    renamed: dict[str, tuple[str, Tensor]], required: tuple[str, ...], what: str, notes: tuple[str, ...]
) -> Conversion:
    tensors = {key: tensor for key, (_, tensor) in renamed.items()}
    spec = swin_spec(tensors, what)
    found, used = match_encoder(spec, tensors, required=required, what=what)
    return Conversion(
        config={"encoder": spec},
        tensors=found,
        used={renamed[key][0] for key in used},
        processor=dict(PROCESSOR),
        notes=list(notes),
    )


def monai_names(source: Mapping[str, Tensor]) -> dict[str, tuple[str, Tensor]]:
    """The names of MONAI's current class → the name in the file and the tensor.

    Self-supervised files call the transformer `swin_vit`, or hold it alone, without a name before its keys, and have
    `fc1` and `fc2` for its linear layers, as `SwinUNETR.load_from` of MONAI expects.
    """
    alone = "patch_embed.proj.weight" in source
    names = {}
    for original, tensor in source.items():
        key = original.replace("swin_vit.", "swinViT.")
        if alone and key.startswith(("patch_embed.", "layers")):
            key = f"swinViT.{key}"
        if key.startswith("swinViT."):
            key = key.replace(".mlp.fc1.", ".mlp.linear1.").replace(".mlp.fc2.", ".mlp.linear2.")
        names[key] = (original, tensor)
    return names


def swin_spec(source: Mapping[str, Tensor], what: str) -> dict[str, Any]:
    """The spec of `swin_unetr` that the shapes of the file describe.

    Raises:
        InputError: A tensor is missing from which a number is read, or the window is not a cube.
    """
    width, channels, *_ = read_shape(source, "swinViT.patch_embed.proj.weight", what, 5)
    check_one_channel(channels, what)
    depths, heads, windows = [], [], []
    for stage in range(1, 5):
        blocks = count_blocks(source, f"swinViT.layers{stage}.{{stage}}.blocks.{{block}}.norm1.weight")
        table = f"swinViT.layers{stage}.0.blocks.0.attn.relative_position_bias_table"
        if not blocks:
            raise another_architecture(what, f"swinViT.layers{stage}.0.blocks.0.norm1.weight", None, source)
        rows, head_count = read_shape(source, table, what, 2)
        side = round(rows ** (1 / 3))
        if side**3 != rows or side % 2 == 0:
            raise InputError(f"{table} has {rows} rows, which is no cubic window", hint="windows of equal sides")
        depths.append(blocks[0])
        heads.append(head_count)
        windows.append((side + 1) // 2)
    if len(set(windows)) > 1:
        raise InputError(f"the stages' windows have different sides, {windows}", hint="windows of equal sides")
    return {
        "name": "swin_unetr",
        "feature_size": width,
        "depths": depths,
        "num_heads": heads,
        "window_size": windows[0],
        "use_v2": any(key.startswith("swinViT.layers1c.") for key in source),
    }
