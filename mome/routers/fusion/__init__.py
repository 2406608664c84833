"""Fusion across scales: how the S expert maps are weighted for a prompt, voxel by voxel. No torch here."""

from mome.registry import FUSIONS

FUSIONS.register("text_guided", "mome.routers.fusion.text_guided:TextGuidedFusion", summary="text queries the scales")
FUSIONS.register("uniform", "mome.routers.fusion.static:UniformFusion", summary="the mean of the scales")
FUSIONS.register("learned", "mome.routers.fusion.static:LearnedFusion", summary="static weights for each prompt")
FUSIONS.register("last", "mome.routers.fusion.static:LastFusion", summary="the finest scale only (the ancestor)")
FUSIONS.register("gated", "mome.routers.fusion.gated:GatedFusion", summary="an independent gate for each scale")
FUSIONS.register("pooled", "mome.routers.fusion.pooled:PooledFusion", summary="one weight per scale and patch")
FUSIONS.register(
    "cross_attention",
    "mome.routers.fusion.cross_attention:CrossAttentionFusion",
    summary="voxels attend to tokens made from the text",
)
