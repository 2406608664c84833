"""A tiny config string for every registered part, and the small models that tests build of them."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch

from mome.configuration import MoMEConfig
from mome.modeling import MoME
from mome.registry import PARTS

TINY_UNET = "unet(channels=[8, 8, 16])"
# Arguments that make a part small. The experts are so many that every router takes them.
TINY: dict[str, dict[str, str]] = {
    "encoder": {
        "unet": TINY_UNET,
        "swin_unetr": "swin_unetr(feature_size=12, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], window_size=2)",
        "segresnet": "segresnet(filters=4, blocks_down=[1, 1, 1])",
        "mednext": "mednext(filters=2)",
        "resenc_unet": "resenc_unet(features=[4, 8, 8], blocks=[1, 1, 1])",
        "genesis_unet": "genesis_unet(width=4)",
        "monai": 'monai(network="UNet", arguments={"channels": [4, 8, 8], "strides": [2, 2]})',
        "timm": "timm(model='test_convnext', levels=[0, 1, 2], stem=4)",
        "vit3d": "vit3d(width=12, depth=2, heads=1, patch=[4, 4, 4], decoder_channels=4)",
    },
    # The towers of hf, clip and open_clip are tiny, too, where a test lays them.
    "text_encoder": {
        "hf": "hf(width=16)",
        "clip": "clip(width=8)",
        "open_clip": "open_clip(width=8)",
        "bank": "bank(width=12)",
        "learned": "learned",
        "none": "none",
    },
    "experts": {
        "linear": "linear(n=4)",
        "mlp": "mlp(n=4, hidden=8)",
        "swiglu": "swiglu(n=4, hidden=8)",
        "geglu": "geglu(n=4, hidden=8)",
        "conv": "conv(n=4)",
        "lora": "lora(n=4, rank=2)",
        "shared": "shared(routed=swiglu(n=4, hidden=8), shared=swiglu(n=1, hidden=8))",
        "identity": "identity(n=4)",
        "zero": "zero(n=4)",
        "constant": "constant(n=4)",
        "adaptive": "adaptive(experts=swiglu(n=4, hidden=8))",
        "film": "film(n=4)",
        "cross_attention": "cross_attention(n=4, tokens=3, heads=2)",
    },
    "router": {
        "topk": "topk(k=2)",
        "switch": "switch",
        "noisy_topk": "noisy_topk(k=2)",
        "sigmoid": "sigmoid(k=2)",
        "group_limited": "group_limited(k=2, groups=2)",
        "relu": "relu(k=1)",
        "expert_choice": "expert_choice(capacity=2.0)",
        "soft": "soft",
        "sinkhorn": "sinkhorn",
        "hash": "hash",
        "random": "random",
        "uniform": "uniform",
        "hierarchical": "hierarchical(groups=2)",
        "label_group": "label_group",
        "depth": "depth(capacity=0.5, router=topk(k=1))",
    },
    "fusion": {
        "text_guided": "text_guided(dim=8)",
        "uniform": "uniform",
        "learned": "learned",
        "last": "last",
        "gated": "gated(dim=8)",
        "pooled": "pooled(dim=8)",
        "cross_attention": "cross_attention(tokens=3, dim=8)",
    },
    "head": {
        "dynamic": "dynamic(hidden=16)",
        "plain": "plain",
        "mask_embedding": "mask_embedding(hidden=8, depth=1)",
    },
}
# Parts whose package is not installed with mome; without it their tests are skipped.
PACKAGES = {"resenc_unet": "dynamic_network_architectures", "open_clip": "open_clip"}
BASE: dict[str, Any] = {
    "encoder": TINY_UNET,
    "text_encoder": "bank(width=12)",
    "experts": "swiglu(n=4, hidden=8)",
    "router": "topk(k=2)",
    "fusion": "text_guided(dim=8)",
    "head": "dynamic(hidden=16)",
    "labels": ["liver", "spleen", "aorta"],
    "text_dim": 12,
    "dim": 8,
    "patch_size": [16, 16, 16],
}
# Patches of encoders that divide by more; instance norm needs two voxels at the deepest stage.
_PATCHES = {"swin_unetr": [64, 32, 32], "mednext": [32, 16, 16]}


def tiny(kind: str, name: str) -> str:
    """The tiny config string of a part, which is its name for parts of other packages."""
    return TINY[kind].get(name, name)


def single(expert: str) -> str:
    """The tiny config string of one expert, where the number of experts is an argument."""
    return tiny("experts", expert).replace("(n=4", "(n=1")


def own_names(kind: str) -> list[str]:
    """The names of the parts that mome itself registers."""
    return [name for name in PARTS[kind].names() if PARTS[kind].origin(name)[0] == "mome"]


def needs_package(*names: str) -> list[pytest.MarkDecorator]:
    """The marks that skip a test of these parts where the package of one of them is missing."""
    packages = [PACKAGES[name] for name in names if name in PACKAGES]
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    return [pytest.mark.skip(reason=f"{missing[0]} is not installed")] if missing else []


def make_config(**parts: Any) -> MoMEConfig:
    """The config of the small model with these parts; other values of a config may be among them."""
    values = {**BASE, **parts}
    encoder = values["encoder"].partition("(")[0]
    if encoder in _PATCHES:
        values["patch_size"] = _PATCHES[encoder]
    return MoMEConfig(**values)


def make_model(seed: int = 0, **parts: Any) -> MoME:
    """The small model with these parts and random weights, in eval."""
    torch.manual_seed(seed)
    model = MoME(make_config(**parts)).eval()
    if str(parts.get("router", "")).startswith("label_group"):
        # the router finds the label of a prompt among the rows of the bank
        model.text_bank.set(torch.randn(len(model.config.labels), model.config.text_dim))
    return model


def inputs(model: MoME, batch: int = 1) -> dict[str, torch.Tensor]:
    """A volume and two prompts."""
    generator = torch.Generator().manual_seed(1)
    return {
        "volume": torch.rand(batch, 1, *model.config.patch_size, generator=generator),
        "text_PT": torch.randn(2, model.config.text_dim, generator=generator),
    }


def targets(model: MoME, batch: int) -> torch.Tensor:
    """Masks of two prompts, of which about a third is one."""
    generator = torch.Generator().manual_seed(2)
    return (torch.rand(batch, 2, *model.config.patch_size, generator=generator) > 0.7).float()


def state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and all buffers, those included that no checkpoint holds."""
    return dict(model.named_parameters()) | dict(model.named_buffers())
