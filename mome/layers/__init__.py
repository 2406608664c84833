"""Layers: one idea per file. Those that a config string can name are registered here; nothing here imports torch."""

from mome.registry import LAYERS

LAYERS.register("moe", "mome.layers.moe:MixtureOfExperts", summary="a router and experts over the voxels of a map")
