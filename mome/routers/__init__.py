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
ROUTERS.register(
    "expert_choice",
    "mome.routers.expert_choice:ExpertChoiceRouter",
    summary="every expert picks its best tokens of a patch or window",
)
ROUTERS.register("soft", "mome.routers.soft:SoftRouter", summary="experts work on slots, weighted means of the tokens")
ROUTERS.register(
    "sinkhorn", "mome.routers.sinkhorn:SinkhornRouter", summary="top-k, balanced by Sinkhorn's algorithm in training"
)
ROUTERS.register("hash", "mome.routers.hash:HashRouter", summary="a fixed expert for every place, nothing learned")
ROUTERS.register("random", "mome.routers.random:RandomRouter", summary="k random experts, drawn by place")
ROUTERS.register("uniform", "mome.routers.uniform:UniformRouter", summary="every expert with equal weight")
ROUTERS.register(
    "hierarchical", "mome.routers.hierarchical:HierarchicalRouter", summary="a group of experts, then experts of it"
)
ROUTERS.register(
    "label_group", "mome.routers.label_group:LabelGroupRouter", summary="one expert for each group of labels"
)
ROUTERS.register(
    "depth", "mome.routers.depth:DepthRouter", summary="only a share of the tokens goes through the experts"
)
