"""Token routers: which voxels of a map go to which experts, with which weights. Nothing here imports torch."""

from mome.registry import ROUTERS

ROUTERS.register("topk", "mome.routers.topk:TopKRouter", summary="every token picks its k best experts")
ROUTERS.register("switch", "mome.routers.topk:SwitchRouter", summary="one expert per token, jittered in training")
