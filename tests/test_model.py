"""The whole model: presets, parts that do not fit, and what really runs."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from small_models import small, volume
from torch.utils._python_dispatch import TorchDispatchMode

import mome
from mome import create_model
from mome.errors import InputError
from mome.presets import preset_sizes
from mome.zoo import list_models, preset_processor

# -- presets --------------------------------------------------------------------------------------------------


def test_tiny_presets_run_and_base_presets_build() -> None:
    assert list_models("*_base") == ["mome_ct_base", "plain_ct_base", "universal_ct_base"]
    for name in list_models("*_tiny"):
        model = create_model(name, patch_size=[32, 32, 32]).eval()
        text = torch.randn(2, model.config.text_dim)
        with torch.no_grad():
            assert model(volume(32), text).logits.shape == (1, 2, 32, 32, 32)
    base = preset_sizes()["mome_ct_base"]
    assert base["parts"]["encoder"] == "swin_unetr" and 60e6 < base["parameters"] < 70e6


def test_base_preset_has_five_scale_experts_and_32_classes() -> None:
    with torch.device("meta"):
        model = create_model("mome_ct_base")
    assert len(model.scale_experts) == 5 and len(model.config.labels) == 32 and model.config.text_dim == 512
    assert model.encoder.strides == tuple((s, s, s) for s in (16, 8, 4, 2, 1)) and model.encoder.channels == (
        384,
        192,
        96,
        48,
        48,
    )


@pytest.mark.wide
@pytest.mark.parametrize("name", ["mome_ct_tiny", "universal_ct_tiny", "plain_ct_tiny"])
def test_inductor_gives_the_same_numbers(name: str) -> None:
    torch.manual_seed(0)
    model = create_model(name, encoder="unet(channels=[4, 8])", dim=8, patch_size=[8, 8, 8]).eval()
    text = torch.randn(2, model.config.text_dim)
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(model)(volume(8), text).logits
        torch.testing.assert_close(compiled, model(volume(8), text).logits, rtol=1e-4, atol=1e-4)


# -- parts -----------------------------------------------------------------------------------------------------


class Watch(TorchDispatchMode):
    """Names of the ops that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.add(str(func))
        return func(*args, **(kwargs or {}))


def test_the_sparse_layer_and_the_head_run_our_ops() -> None:
    model = small(experts="swiglu(n=4, hidden=8)", router="topk(k=2)").train()
    with Watch() as watch:
        model(volume(), torch.randn(2, 12)).logits.sum().backward()
    for op in ("moe_mlp", "moe_mlp_backward", "fusion_head", "fusion_head_backward"):
        assert f"mome.{op}.default" in watch.seen


def test_experts_are_computed_once_for_all_prompts() -> None:
    model, calls = small(experts="mlp(n=2, hidden=8)"), []
    model.scale_experts[0].register_forward_hook(lambda *_: calls.append(1))
    features = model.encode(volume())
    for row in torch.randn(5, 1, 12):
        model.decode(features, row)
    assert len(calls) == 1


def test_prompts_are_independent_of_each_other() -> None:
    model, text = small(), torch.randn(5, 12)
    with torch.no_grad():
        together = model(volume(), text).logits
        for i in range(5):
            torch.testing.assert_close(model(volume(), text[i : i + 1]).logits[:, 0], together[:, i])


def test_router_is_float32_and_deterministic_in_eval() -> None:
    model = small(experts="linear(n=4)", router="switch")
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        features = model.encode(volume())
        again = model.encode(volume())
    routing = features.routings[0]
    assert routing.weights_TK.dtype == torch.float32 and not routing.losses
    assert torch.equal(routing.ids_TK, again.routings[0].ids_TK)
    assert routing.counts_E.sum() == routing.ids_TK.numel()


def test_permuting_experts_changes_nothing() -> None:
    model = small(experts="swiglu(n=4, hidden=8)", router="topk(k=2)")
    text, order = torch.randn(2, 12), torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        before = model(volume(), text).logits
        for expert in model.scale_experts:
            expert.body.router.weight_EC.copy_(expert.body.router.weight_EC[order])
            for parameter in expert.body.experts.parameters():
                parameter.copy_(parameter[order])
        torch.testing.assert_close(model(volume(), text).logits, before)


def test_fusion_last_uses_the_finest_map_only() -> None:
    assert len(small(fusion="last").scale_experts) == 1 and len(small().scale_experts) == 2


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    grads = []
    for on in (False, True):
        model = small(experts="mlp(n=2, hidden=8)", router="topk(k=1)").train()
        if on:
            model.gradient_checkpointing_enable()
        model(volume(), torch.ones(2, 12)).logits.square().mean().backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"experts": "swiglu(n=2)", "router": "topk(k=3)"}, "router topk picks k=3 experts of 2"),
        ({"fusion": "text_guided(top_k=9)"}, "keeps top_k=9 of 2 scales"),
        ({"encodr": "unet"}, "has no 'encodr', did you mean 'encoder'"),
        ({"experts": "swigu"}, "did you mean 'swiglu'"),
        ({"trained_labels": ["heart"]}, "not among the labels"),
        ({"labels": ["liver", "liver"]}, "stands twice"),
        ({"patch_size": [16, 16]}, "three numbers"),
        ({"encoder": "unet(channels=[8])"}, "at least two stages"),
        ({"encoder": "swin_unetr(feature_size=10)"}, "multiple of 12"),
        ({"encoder": "swin_unetr(depths=[2, 2])"}, "depths of swin_unetr are four numbers"),
        ({"encoder": "swin_unetr(num_heads=[5, 5, 5, 5])"}, "num_heads of swin_unetr divide"),
        ({"encoder": "unet(channels=[8, 8, 16], norm='batch')"}, "norm is 'instance' or 'group'"),
        ({"encoder": "unet(channels=[8, 28], norm='group')"}, "cannot divide 28 channels"),
        ({"encoder": "unet(channels=[8, 8], depth=0)"}, "depth of unet is at least 1"),
        ({"experts": "mlp(activation='rellu')"}, "did you mean 'relu'"),
        ({"experts": "linear(n=-1)"}, "n of linear experts is at least 1, got -1"),
        ({"experts": "linear(n=0)"}, "n of linear experts is at least 1, got 0"),
        ({"experts": "swiglu(n=0)"}, "n of feed-forward experts is at least 1"),
        ({"experts": "mlp(ratio=0)"}, "hidden of feed-forward experts is at least 1"),
        ({"head": "dynamic(prior=0)"}, "prior of the head lies between 0 and 1"),
        ({"head": "plain(prior=1)", "fusion": "last"}, "prior of the head lies between 0 and 1"),
        ({"fusion": "text_guided(dim=0)"}, "dim of fusion text_guided is at least 1"),
        ({"experts": "linear(n=2)", "router": "switch(jitter=2)"}, "jitter of router switch"),
        ({"experts": "linear(n=2)", "router": "topk(k=1, z_weight=-1)"}, "z_weight of router topk is at least 0"),
        ({"patch_size": 64}, "three numbers of voxels, got 64"),
        ({"patch_size": ["16", 16, 16]}, "three numbers"),
        ({"patch_size": [18, 16, 16]}, r"multiples of 4\n  try: patch_size=\[20, 16, 16\]"),
        ({"patch_size": [4, 4, 4]}, r"one voxel at its bottleneck of stride 4\n  try: patch_size=\[8, 8, 8\]"),
        ({"dim": "8"}, "dim is a whole number of at least 1, got '8'"),
        ({"dim": 3.5}, "dim is a whole number of at least 1, got 3.5"),
        ({"head_channels": 0}, "head_channels is a whole number"),
        ({"text_dim": "12"}, "text_dim is a whole number"),
        ({"initializer_range": None}, "initializer_range is a positive number"),
        ({"labels": "liver"}, "labels is a list of names, got 'liver'"),
        ({"trained_labels": [3]}, "trained_labels is a list of names"),
        ({"text_encoder": "none", "labels": []}, "there are no labels"),
        ({"text_encoder": "learned", "text_dim": 2}, "tells text_dim=2 labels apart, got 3"),
        ({"text_encoder": "bank(width=0)"}, "width of bank is at least 1"),
    ],
)
def test_pairs_that_make_no_sense_are_refused(overrides: dict, words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        small(**overrides)
    assert len(str(caught.value).splitlines()) <= 3


def test_sizes_that_do_not_divide_are_refused() -> None:
    with pytest.raises(InputError, match="not multiples of 4"):
        small()(torch.rand(1, 1, 18, 16, 16), torch.randn(1, 12))


def test_a_mistyped_argument_of_forward_is_refused() -> None:
    model, text = small(), torch.randn(1, 12)
    with pytest.raises(InputError, match="no argument 'target'"):
        model(volume(), text, target=torch.zeros(1, 1, 16, 16, 16))
    with torch.no_grad():
        assert model(volume(), text, return_dict=True, num_items_in_batch=1).logits is not None


def test_create_model_knows_its_processor() -> None:
    model = create_model("mome_ct_tiny", encoder="unet(channels=[4, 8])", dim=8)
    assert model.processor.settings() == preset_processor("mome_ct_tiny").settings()
    assert not any("processor" in name for name in (*model.state_dict(), *dict(model.named_modules())))
    assert small().processor is None


def test_import_is_lazy() -> None:
    code = (
        "import sys, mome; print(sorted(m for m in ('torch', 'transformers', 'monai', 'triton') if m in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]" and set(mome.__all__) <= set(dir(mome))


def test_works_without_triton(tmp_path: Path) -> None:
    """A package that refuses to be imported stands in for its absence."""
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text("raise ImportError('No module named triton')")
    code = f"""
        import sys
        sys.path.insert(0, {str(tmp_path)!r})
        import torch
        from mome import MoME, MoMEConfig
        model = MoME(MoMEConfig(encoder="unet(channels=[4, 8])", text_encoder="none", labels=["liver"],
                                experts="swiglu(n=2)", router="topk(k=1)", dim=4))
        print(tuple(model(torch.rand(1, 1, 8, 8, 8), torch.eye(1)).logits.shape))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "(1, 1, 8, 8, 8)", done.stderr
