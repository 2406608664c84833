"""Hugging Face mixtures of experts on the ops of this project: outputs and gradients equal those of eager code."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

import mome.auto  # noqa: F401 - registers the implementation

SMALL = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
MODELS = {
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "Qwen3Moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "head_dim": 8},
    "Olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    # has biases, transposed weights and its own form of gate
    "GptOss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
}


class Watch(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.add(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", MODELS)
def test_equal_to_eager(name: str) -> None:
    config = getattr(transformers, f"{name}Config")(**SMALL, **MODELS[name])
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config).double()
    with torch.no_grad():  # some weights start uninitialised or as zeros
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    tokens = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(0))
    results = {}
    for implementation in ("eager", "mome"):
        model.set_experts_implementation(implementation)
        model.zero_grad()
        with Watch() as watch:
            logits = model(tokens).logits
            logits.square().mean().backward()
        results[implementation] = [logits.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]
        ran = any(op.startswith("mome.moe_") for op in watch.seen)
        assert ran == (implementation == "mome")
    assert len(results["eager"]) == len(results["mome"])
    for ours, theirs in zip(results["mome"], results["eager"], strict=True):
        torch.testing.assert_close(ours, theirs)


def test_expert_parallelism_is_refused() -> None:
    config = transformers.MixtralConfig(**SMALL, **MODELS["Mixtral"])
    model = transformers.MixtralForCausalLM(config)
    model.set_experts_implementation("mome")
    for module in model.modules():
        if hasattr(module, "_is_expert_parallel"):
            module._is_expert_parallel = True
    with pytest.raises(NotImplementedError, match="use 'grouped_mm'"):
        model(torch.zeros(1, 3, dtype=torch.int64))
