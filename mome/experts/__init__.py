"""Expert bodies: networks inside a scale that keep its width. Registered by name; nothing here imports torch."""

from mome.registry import EXPERTS

EXPERTS.register("linear", "mome.experts.linear:LinearExperts", summary="one linear layer per expert")
EXPERTS.register("mlp", "mome.experts.mlp:MLPExperts", summary="two linear layers and an activation")
EXPERTS.register("swiglu", "mome.experts.mlp:SwiGLUExperts", summary="gated feed-forward, SiLU gate")
EXPERTS.register("geglu", "mome.experts.mlp:GeGLUExperts", summary="gated feed-forward, GELU gate")
