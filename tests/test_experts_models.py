"""Compositions of experts in whole models, adapters on their weights, and what is refused when a model is built."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_models import small, volume

from mome import MoME
from mome.errors import InputError

COMPOSED = [
    "shared(routed=adaptive(experts=swiglu(n=2, hidden=6), zero=2), shared=linear, gate=False)",
    "shared(routed=lora(n=3, rank=2), shared=mlp(hidden=6))",
    "lora(n=2, rank=3, base=geglu(hidden=6))",
    "adaptive(experts=lora(n=2, rank=2), zero=0, identity=2, constant=0)",
    "lora(n=1)",
    "shared(routed=linear, shared=linear)",
    "conv(n=1, kernel=5)",
    "film(n=1)",
    "cross_attention(n=1, tokens=2, heads=8)",
]


def text() -> torch.Tensor:
    return torch.randn(2, 12, generator=torch.Generator().manual_seed(1))


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(volume=volume(), text_PT=text()).logits


@pytest.mark.parametrize("experts", COMPOSED)
def test_compositions_train_save_and_load(experts: str, tmp_path: Path) -> None:
    model = small(experts=experts, router="topk(k=2)" if "n=1" not in experts else "topk(k=1)").train()
    model(volume(), text(), torch.ones(1, 2, 16, 16, 16)).loss.backward()
    missing = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not missing
    first = logits(model.eval())
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(MoME.from_pretrained(tmp_path).eval()), first)
    assert MoME.from_pretrained(tmp_path).config.part_strings()["experts"] == experts


NAMES = ["conv", "lora", "shared", "identity", "zero", "constant", "adaptive", "film", "cross_attention"]


@pytest.mark.parametrize("name", NAMES)
def test_autocast_and_checkpointing(name: str) -> None:
    """Autocast runs and stays near float32; activation checkpointing changes no gradient."""
    losses, gradients = {}, {}
    for mode in ("plain", "checkpointing", "autocast"):
        model = small(experts=name, router="topk(k=1)").train()
        if mode == "checkpointing":
            model.gradient_checkpointing_enable()
        with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
            losses[mode] = model(volume(), text(), torch.ones(1, 2, 16, 16, 16)).loss
        losses[mode].backward()
        gradients[mode] = [parameter.grad for parameter in model.parameters()]
        assert all(torch.isfinite(grad).all() for grad in gradients[mode])
    torch.testing.assert_close(gradients["checkpointing"], gradients["plain"])
    torch.testing.assert_close(losses["autocast"].float(), losses["plain"], rtol=0.05, atol=0.02)


ADAPTED = {
    "shared(routed=swiglu(n=2, hidden=4), shared=swiglu(hidden=4))": [
        "experts.routed.gate_up_proj",
        "shared.expert.down_proj",
    ],
    "lora(n=2, rank=3)": ["experts.reduce_ERD", "experts.expand_EDR"],
    "lora(n=2, base=mlp(hidden=4))": ["base.up_proj"],
    "adaptive(experts=swiglu(n=2, hidden=4))": ["experts.experts.down_proj", "constants.blend_E2D"],
    "film(n=2)": ["experts.weight_EDD"],
    "cross_attention(n=2)": ["experts.value_EDD"],
}


@pytest.mark.parametrize("experts", ADAPTED)
def test_adapters_train_and_merge(experts: str) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = small(experts=experts, router="topk(k=2)")
    plain = logits(model)
    settings = peft.LoraConfig(r=2, init_lora_weights=False, target_parameters=ADAPTED[experts])
    wrapped = peft.get_peft_model(model, settings)
    first = logits(wrapped)
    assert not torch.allclose(first, plain)
    wrapped(volume=volume(), text_PT=text(), targets=torch.ones(1, 2, 16, 16, 16)).loss.backward()
    trained = {key: p for key, p in wrapped.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 2 * len(ADAPTED[experts])  # two matrices, two scales
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained.values())
    assert all("lora_" in key for key in trained)
    torch.testing.assert_close(logits(wrapped.merge_and_unload()), first, rtol=1e-4, atol=1e-5)


REFUSED = {
    "conv(n=0)": "n of conv experts is at least 1, got 0",
    "conv(kernel=4)": "kernel of conv experts is an odd number, got 4",
    "conv(kernel=-1)": "kernel of conv experts is at least 1, got -1",
    "lora(rank=0)": "rank of lora experts is a number from 1 to the width 8 of the tokens, got 0",
    "lora(rank=9)": "rank of lora experts is a number from 1 to the width 8 of the tokens, got 9",
    "lora(alpha=0.0)": "alpha of lora experts is above 0, got 0",
    "lora(n=0)": "n of lora experts is at least 1, got 0",
    "lora(base=linear(n=2))": "base of experts 'lora' is 1 expert, got 2",
    "lora(base=conv)": "base=conv of experts 'lora': experts 'conv' read whole maps, and single tokens are needed here",
    "lora(base=mlp(ratio=0.01))": "hidden of feed-forward experts is at least 1, got 0",
    "shared(routed=film)": "routed=film of experts 'shared': experts 'film' read the prompt",
    "shared(shared=swiglu(n=2))": "shared of experts 'shared' is 1 expert, got 2",
    "shared(shared=cross_attention)": "shared=cross_attention of experts 'shared': .* read the prompt",
    "adaptive(experts=shared)": "experts=shared of experts 'adaptive': .* always-on part, which stands outermost",
    "adaptive(experts=conv)": "experts=conv of experts 'adaptive': experts 'conv' read whole maps",
    "adaptive(zero=-1)": "zero of adaptive experts is at least 0, got -1",
    "adaptive(zero=0, identity=0, constant=0)": "experts 'adaptive' have no zero, identity or constant expert",
    "identity(n=0)": "n of identity experts is at least 1",
    "zero(n=0)": "n of zero experts is at least 1",
    "constant(n=0)": "n of constant experts is at least 1",
    "film(n=0)": "n of film experts is at least 1",
    "cross_attention(tokens=1)": "tokens of cross_attention experts is at least 2, got 1: .* the same result",
    "cross_attention(heads=3)": "heads=3 of cross_attention experts do not divide the width 8 of the voxels",
    "cross_attention(heads=0)": "heads of cross_attention experts is at least 1, got 0",
}


@pytest.mark.parametrize("experts", REFUSED)
def test_impossible_arguments_are_refused_in_words(experts: str) -> None:
    with pytest.raises(InputError, match=REFUSED[experts]) as caught:
        small(experts=experts)
    assert len(str(caught.value).splitlines()) <= 3
