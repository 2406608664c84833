"""Token routers: which voxels of a map go to which experts, with which weights. Nothing here imports torch."""

from mome.registry import ROUTERS

ROUTERS.register("topk", "mome.routers.topk:TopKRouter", summary="every token picks its k best experts")
ROUTERS.register("switch", "mome.routers.switch:SwitchRouter", summary="one expert per token, jittered in training")
ROUTERS.register(
    "noisy_topk", "mome.routers.noisy_topk:NoisyTopKRouter", summary="top k of logits with learned noise in training"
)
ROUTERS.register("sigmoid", "mome.routers.sigmoid:SigmoidRouter", summary="top k of sigmoid scores, balanced by a bias")
ROUTERS.register(
    "group_limited",
    "mome.routers.group_limited:GroupLimitedRouter",
    summary="top k within the best groups of experts, balanced by a bias",
)
ROUTERS.register(
    "relu", "mome.routers.relu:ReLURouter", summary="every expert with a positive logit; their number adapts"
)
