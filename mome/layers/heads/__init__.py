"""Heads turn fused expert maps into one logit per prompt and voxel. Nothing here imports torch."""

from mome.registry import HEADS

HEADS.register("dynamic", "mome.layers.heads.dynamic:DynamicHead", summary="three layers made from text and image")
HEADS.register("plain", "mome.layers.heads.plain:PlainHead", summary="one linear layer over the text rows")
HEADS.register(
    "mask_embedding",
    "mome.layers.heads.mask_embedding:MaskEmbeddingHead",
    summary="the text row as an embedding of its mask, by an inner product",
)
