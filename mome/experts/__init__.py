"""Expert bodies: networks inside a scale that keep its width. Registered by name; nothing here imports torch."""

from mome.registry import EXPERTS

EXPERTS.register("linear", "mome.experts.linear:LinearExperts", summary="one linear layer per expert")
EXPERTS.register("mlp", "mome.experts.mlp:MLPExperts", summary="two linear layers and an activation")
EXPERTS.register("swiglu", "mome.experts.mlp:SwiGLUExperts", summary="gated feed-forward, SiLU gate")
EXPERTS.register("geglu", "mome.experts.mlp:GeGLUExperts", summary="gated feed-forward, GELU gate")
EXPERTS.register("conv", "mome.experts.conv:ConvExperts", summary="depthwise and pointwise convolution, on the map")
EXPERTS.register("lora", "mome.experts.lora:LoRAExperts", summary="one shared base, a low-rank difference per expert")
EXPERTS.register("shared", "mome.experts.shared:SharedExperts", summary="routed experts and one that every voxel gets")
EXPERTS.register("identity", "mome.experts.identity:IdentityExperts", summary="returns the token")
EXPERTS.register("zero", "mome.experts.zero:ZeroExperts", summary="returns zeros")
EXPERTS.register("constant", "mome.experts.constant:ConstantExperts", summary="blends the token and a learned vector")
EXPERTS.register(
    "adaptive", "mome.experts.adaptive:AdaptiveExperts", summary="other experts, with zero, identity and constant ones"
)
EXPERTS.register("film", "mome.experts.film:FiLMExperts", summary="linear, scaled and shifted by the prompt")
EXPERTS.register(
    "cross_attention",
    "mome.experts.cross_attention:CrossAttentionExperts",
    summary="voxels attend to tokens made from the prompt",
)
