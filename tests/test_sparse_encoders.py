"""Sparse layers inside encoders: places, routings, auxiliary losses, and experts that start from dense layers."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import throwaway_parts
import torch
from small_models import small, volume

from mome import InputError, MoME, upcycle
from mome.layers.moe import MixtureOfExperts
from mome.layers.sparse import SparseFeedForward, SparseResidual, places
from mome.map_context import DEFAULT_CONTEXT
from mome.registry import ENCODERS, LAYERS

MOE = "moe(experts=mlp(n=3, hidden=8), router=topk(k=2))"
VIT = "vit3d(width=12, depth=2, heads=1, patch=[4, 4, 4], decoder_channels=4, mlp='mlp', hidden=8"
SPARSE = {
    "unet": f"unet(channels=[8, 8, 16], layer={MOE}, layer_stages=[1, 2])",
    "vit3d": f"{VIT}, feed_forward={MOE})",
}
SWIN = "swin_unetr(feature_size=12, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], window_size=2"
# Encoders through other packages; these are larger, so not every test runs them.
FOREIGN = {
    "swin_unetr": f"{SWIN}, feed_forward={MOE[:-1]}, every=2))",
    "resenc_unet": f"resenc_unet(features=[8, 8, 16], blocks=[1, 1, 1], layer={MOE}, layer_stages=[1, 2])",
}
each = pytest.mark.parametrize("name", SPARSE)


def rows(model: MoME) -> torch.Tensor:
    return torch.randn(2, model.config.text_dim, generator=torch.Generator().manual_seed(1))


def step(model: MoME) -> object:
    output = model(volume(), rows(model), torch.ones(1, 2, 16, 16, 16))
    output.loss.backward()
    return output


@each
def test_each_router_gets_its_losses_once(name: str) -> None:
    model = small(encoder=SPARSE[name]).train()
    mixtures = [m for m in model.encoder.modules() if isinstance(m, MixtureOfExperts)]
    assert len(mixtures) == 2
    pyramid = model.encoder(volume())
    assert [routing.router for routing in pyramid.routings] == [mixture.router for mixture in mixtures]
    output = step(model)
    assert set(output.aux_losses) == {"load_balance", "router_z"}
    want = torch.stack([sum(routing.losses.values()) for routing in pyramid.routings]).mean()
    torch.testing.assert_close(output.aux_loss, want)
    for mixture in mixtures:
        assert mixture.router.weight_EC.grad.abs().sum() > 0
        assert all(p.grad.abs().sum() > 0 for p in mixture.experts.parameters())


@each
def test_the_kernels_run(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from mome.experts import mlp

    shapes = []
    op = mlp.moe_mlp
    monkeypatch.setattr(mlp, "moe_mlp", lambda x, *args, **kwargs: shapes.append(x.shape) or op(x, *args, **kwargs))
    model = small(encoder=SPARSE[name])
    with torch.no_grad():
        model(volume(), rows(model))
    assert shapes == {"unet": [(512, 8), (64, 16)], "vit3d": [(64, 12), (64, 12)]}[name]


@each
def test_checkpointing_changes_no_gradient_and_observes_once(name: str) -> None:
    grads, losses, seen = [], [], []
    for checkpointing in (False, True):
        model = small(encoder=SPARSE[name]).train()
        routers = [m.router for m in model.encoder.modules() if isinstance(m, MixtureOfExperts)]
        for router in routers:
            router.observe = lambda routing, counts=seen: counts.append(int(routing.counts_E.sum()))
        if checkpointing:
            model.gradient_checkpointing_enable()
        losses.append(step(model).aux_loss)
        grads.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(losses[1], losses[0])
    torch.testing.assert_close(grads[1], grads[0])
    assert len(seen) == 4 and seen[:2] == seen[2:]


@each
def test_saved_loaded_repeated_and_meta(name: str, tmp_path: Path) -> None:
    model = small(encoder=SPARSE[name])
    model.save_pretrained(tmp_path)
    again = MoME.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        want = model(volume(), rows(model)).logits
        assert torch.equal(model(volume(), rows(model)).logits, want)
        assert torch.equal(again(volume(), rows(model)).logits, want)
    assert ENCODERS.canonical(again.config.part_strings()["encoder"]) == model.config.encoder
    with torch.device("meta"):
        meta = MoME(model.config)
    assert all(tensor.is_meta for tensor in (*meta.parameters(), *meta.buffers()))


def test_the_issues_string_works() -> None:
    layer = "moe(experts=swiglu(n=8), router=topk(k=2), every=2)"
    spec = f"vit3d(width=12, depth=5, heads=1, patch=[4, 4, 4], decoder_channels=4, feed_forward={layer})"
    encoder = ENCODERS.build(spec, in_channels=1)
    assert [isinstance(block.feed_forward, SparseFeedForward) for block in encoder.blocks] == [0, 1, 0, 1, 0]
    assert encoder.blocks[1].feed_forward.layer.experts.num_experts == 8
    assert places(4, {"name": "moe", "every": 3}, "x") == [2] and places(3, {"name": "own"}, "x") == [0, 1, 2]


def test_a_unet_without_a_layer_has_the_tensors_it_had() -> None:
    names = set(small().state_dict())
    assert not any("sparse" in name for name in names)
    more = set(small(encoder=SPARSE["unet"]).state_dict()) - names
    assert more and all(name.startswith(("encoder.sparse.1.", "encoder.sparse.2.")) for name in more)


def test_the_residual_after_a_stage_is_what_it_says() -> None:
    from mome.map_context import MapContext

    model = small(encoder=SPARSE["unet"]).encoder
    layer = model.sparse["2"]
    x = torch.randn(1, 16, 2, 3, 4)
    with torch.no_grad():
        layer.scale_C.copy_(torch.linspace(0.1, 1, 16))
        got, routing = layer(x, MapContext())
        normed = (x - x.mean((2, 3, 4), keepdim=True)) / (x.var((2, 3, 4), keepdim=True, unbiased=False) + 1e-5).sqrt()
        tokens = normed.flatten(2)[0].T
        chosen = (tokens @ layer.layer.router.weight_EC.T).softmax(-1)
        experts = layer.layer.experts
        for token in range(24):
            best = chosen[token].topk(2)
            mixed = torch.zeros(16)
            for weight, e in zip(best.values / best.values.sum(), best.indices, strict=True):
                hidden = torch.nn.functional.gelu(experts.up_proj[e] @ tokens[token] + experts.up_bias[e])
                mixed += weight * (experts.down_proj[e] @ hidden + experts.down_bias[e])
            want = x.flatten(2)[0, :, token] + layer.scale_C * mixed
            torch.testing.assert_close(got.flatten(2)[0, :, token], want, rtol=1e-4, atol=1e-5)
    assert int(routing.counts_E.sum()) == 48


@pytest.mark.parametrize(
    ("encoder", "sides"),
    [
        ("unet(channels=[8, 8, 16], layer={}, layer_stages=[1])", "8×8×8"),
        (f"{VIT}, feed_forward={{}})", "4×4×4"),
        (f"{SWIN}, feed_forward={{}})", "32×32×32"),
    ],
)
def test_windows_that_do_not_divide_are_refused_when_the_model_is_built(encoder: str, sides: str) -> None:
    layer = "moe(experts=mlp(n=2, hidden=8), router=soft(window=5))"
    side = 64 if "swin" in encoder else 16
    with pytest.raises(InputError, match=f"does not divide a map of {sides} voxels") as caught:
        small(encoder=encoder.format(layer), patch_size=[side] * 3)
    assert (caught.value.where or "").startswith("encoder.")


def test_layers_see_their_place(monkeypatch: pytest.MonkeyPatch) -> None:
    throwaway_parts.register(monkeypatch)
    place = "moe(experts=mlp(n=2, hidden=8), router=place)"
    for spec in (f"{VIT}, feed_forward={place})", f"unet(channels=[8, 8, 16], layer={place}, layer_stages=[1])"):
        model = small(encoder=spec)
        with torch.no_grad():
            near, far = (model.encode(volume(), torch.tensor([[0, 0, at]])).bottleneck for at in (0, 24))
            assert torch.equal(near, model.encode(volume()).bottleneck) and not torch.equal(near, far)


def test_layers_that_read_prompts_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    throwaway_parts.register(monkeypatch)
    for spec in (f"{VIT}, feed_forward=moe(experts=film))", "unet(layer=moe(experts=film))"):
        with pytest.raises(InputError, match="experts 'film' read the prompt, which is not known here") as caught:
            small(encoder=spec)
        assert "inside" in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("unet(layer_stages=[1])", "layer_stages of unet has no layer to place"),
        ("unet(layer=moe, layer_stages=[5])", "different numbers from 0 to 4, got [5]"),
        ("unet(layer=moe, layer_stages=[1, 1])", "different numbers from 0 to 4, got [1, 1]"),
        ("unet(layer=moe(every=6))", "every=6 gives the layer 'moe' no place among the 5 places of unet"),
        ("vit3d(depth=2, feed_forward=moe(every=0))", "every=0 gives the layer 'moe' no place"),
        ("vit3d(feed_forward=moe(experts=mlp(n=2), router=topk(k=3)))", "router topk picks k=3 experts of 2"),
        ("vit3d(feed_forward=mo)", "unknown layer 'mo', did you mean 'moe'"),
    ],
)
def test_impossible_layers_are_refused(spec: str, words: str) -> None:
    with pytest.raises(InputError) as caught:
        ENCODERS.build(spec, in_channels=1)
    assert words in str(caught.value) and len(str(caught.value).splitlines()) <= 3


DENSE_VIT = "vit3d(width=12, depth=2, heads=1, patch=[4, 4, 4], decoder_channels=4, registers=1"


@pytest.mark.parametrize(
    ("dense", "sparse"),
    [
        (
            {"encoder": f"{DENSE_VIT}, mlp='{form}', hidden=8)"},
            {"encoder": f"{DENSE_VIT}, mlp='{form}', hidden=8, feed_forward=moe(experts={form}(n=4, hidden=8)))"},
        )
        for form in ("mlp", "swiglu", "geglu")
    ]
    + [({"experts": "mlp(hidden=8)"}, {"experts": "mlp(n=4, hidden=8)"})],
    ids=["mlp", "swiglu", "geglu", "scales"],
)
def test_upcycled_models_begin_with_the_dense_outputs(dense: dict[str, str], sparse: dict[str, str]) -> None:
    model = small(**dense)
    with torch.no_grad():
        for parameter in model.parameters():  # biases too
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    start = upcycle(model, **sparse)
    with torch.no_grad():
        want = model(volume(), rows(model)).logits
        torch.testing.assert_close(start(volume(), rows(model)).logits, want, rtol=0, atol=1e-5 * want.abs().max())
    assert want.std() > 1e-3
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    mixtures = [m for m in start.modules() if isinstance(m, MixtureOfExperts) and m.router is not None]
    assert len(mixtures) == 2 and all(m.experts.num_experts == 4 for m in mixtures)
    step(start.train())  # and the experts move apart
    grad = mixtures[0].experts.down_proj.grad
    assert (grad[0] - grad[1]).abs().max() > 0


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        ("moe(experts=swiglu(n=2, hidden=8))", "gate is True in the experts, False in the layer"),
        ("moe(experts=mlp(n=2, hidden=9))", "shape of the first layer is (9, 12) in the experts, (8, 12) in the layer"),
        ("moe(experts=mlp(n=2, hidden=8, activation='relu'))", "activation is relu in the experts, gelu in the layer"),
        ("moe(experts=mlp(n=2, hidden=8, bias=False))", "bias is False in the experts, True in the layer"),
        ("moe(experts=linear(n=2))", "only experts mlp, swiglu and geglu of a moe layer"),
        ("moe(experts=mlp(n=2, hidden=8), router=topk(k=1))", "its router's weights do not sum to one"),
    ],
)
def test_experts_that_cannot_start_from_the_layer_are_refused(layer: str, words: str) -> None:
    with pytest.raises(InputError) as caught:
        upcycle(small(encoder=f"{VIT})"), encoder=f"{VIT}, feed_forward={layer})")
    assert words in str(caught.value) and "  try: " in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 3


def test_upcycling_changes_nothing_else() -> None:
    with pytest.raises(InputError, match="no dense layer of the model becomes sparse"):
        upcycle(small(encoder=f"{VIT})"), encoder=f"{VIT})")
    with pytest.raises(InputError, match="no dense layer of the model becomes sparse"):
        upcycle(small(), encoder=SPARSE["unet"])
    with pytest.raises(InputError, match="tensors have no counterpart in the dense model"):
        upcycle(small(encoder=f"{VIT})"), encoder=SPARSE["vit3d"], dim=4)


@pytest.mark.parametrize(
    ("dense", "changes", "words"),
    [
        ({}, {"encoder": SPARSE["vit3d"][:-1] + ", rotary_base=50.0)"}, "rotary_base is 50.0 instead of 100.0"),
        ({}, {"labels": ["spleen", "liver"]}, "in labels"),
        ({}, {"fusion": "text_guided(top_k=1)"}, "in fusion, where top_k is 1 instead of"),
        ({"experts": "mlp(n=4)", "router": "topk(k=1)"}, {"router": "topk(k=2)"}, "in router, where k is 2"),
    ],
)
def test_settings_that_change_outputs_but_no_shape_are_refused(dense: dict, changes: dict, words: str) -> None:
    model = small(**{"encoder": f"{VIT})", "fusion": "text_guided", "labels": ["liver", "spleen"], **dense}).train()
    with pytest.raises(InputError) as caught:
        upcycle(model, **{"encoder": SPARSE["vit3d"], **changes})
    assert words in str(caught.value) and model.training
    assert len(str(caught.value).splitlines()) <= 3


def test_a_saved_dense_model_is_upcycled_when_it_is_loaded(tmp_path: Path) -> None:
    dense = small(encoder=f"{VIT})")
    dense.save_pretrained(tmp_path)
    sparse = MoME.from_pretrained(tmp_path, encoder=SPARSE["vit3d"], upcycle=True)
    with torch.no_grad():
        want, got = (model(volume(), rows(dense)).logits for model in (dense, sparse))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * want.abs().max())
    assert sparse.encoder.blocks[0].feed_forward.layer.experts.num_experts == 3
    with pytest.raises(InputError, match="no dense layer of the model becomes sparse"):
        MoME.from_pretrained(tmp_path, upcycle=True)
    with pytest.raises(InputError, match="upcycle=True has no loading info"):
        MoME.from_pretrained(tmp_path, encoder=SPARSE["vit3d"], upcycle=True, output_loading_info=True)


def test_upcycling_keeps_type_labels_and_processor() -> None:
    from mome import MoMEProcessor

    model = small(encoder=f"{VIT})", trained_labels=["liver"]).to(torch.bfloat16)
    model.processor = MoMEProcessor(spacing=[2.0, 2.0, 2.0])
    start = upcycle(model, encoder=SPARSE["vit3d"])
    assert start.dtype == torch.bfloat16 and start.config.trained_labels == ["liver"]
    assert start.processor is model.processor and not start.training
    assert start.encoder.blocks[0].feed_forward.layer.router.weight_EC.dtype == torch.float32


FLAT = (64, 32, 32)  # the smallest volume whose deepest map of swin_unetr has two voxels


def flat_model(encoder: str) -> MoME:
    return small(encoder=encoder, patch_size=list(FLAT), experts="linear(n=1)")


def flat_volume() -> torch.Tensor:
    return torch.rand(1, 1, *FLAT, generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=FOREIGN)
def foreign(request: pytest.FixtureRequest) -> MoME:
    if request.param == "resenc_unet":
        pytest.importorskip("dynamic_network_architectures")
    return flat_model(FOREIGN[request.param])


def test_sparse_layers_of_other_packages_networks(foreign: MoME, tmp_path: Path) -> None:
    """Their losses count once, they see their strides, and saving and the meta device work."""
    model = foreign.train()
    mixtures = [m for m in model.encoder.modules() if isinstance(m, MixtureOfExperts)]
    strides, seen = [], []
    for mixture in mixtures:
        mixture.register_forward_pre_hook(lambda module, given: strides.append(given[1].stride))
        mixture.router.observe = lambda routing: seen.append(routing)
    output = model(flat_volume(), rows(model), torch.ones(1, 2, *FLAT))
    output.loss.backward()
    swin = "swin_unetr" in str(model.config.encoder["name"])
    assert strides == ([(4, 4, 4), (16, 16, 16)] if swin else [(2, 2, 2), (4, 4, 4)])
    assert [routing.router for routing in seen] == [mixture.router for mixture in mixtures]
    want = torch.stack([sum(routing.losses.values()) for routing in seen]).mean()
    torch.testing.assert_close(output.aux_loss, want)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for m in mixtures for p in m.parameters())

    del mixtures[0].router.observe, mixtures[1].router.observe
    model.eval().save_pretrained(tmp_path)
    again = MoME.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        logits = model(flat_volume(), rows(model)).logits
        assert torch.equal(again(flat_volume(), rows(model)).logits, logits)
    with torch.device("meta"):
        assert all(tensor.is_meta for tensor in MoME(model.config).parameters())


@pytest.mark.wide
def test_checkpointing_other_packages_networks_changes_no_gradient(foreign: MoME) -> None:
    model, grads, seen = foreign.train(), [], []
    for mixture in (m for m in model.encoder.modules() if isinstance(m, MixtureOfExperts)):
        mixture.router.observe = seen.append
    for checkpointing in (False, True):
        model.zero_grad()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(flat_volume(), rows(model), torch.ones(1, 2, *FLAT)).loss.backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(grads[1], grads[0])
    assert len(seen) == 4  # the repeated pass is not observed


def test_upcycled_swin_blocks_begin_with_the_dense_outputs() -> None:
    dense = flat_model(f"{SWIN})")
    sparse = upcycle(dense, encoder=f"{SWIN}, feed_forward=moe(experts=mlp(n=3), router=topk(k=2)))")
    with torch.no_grad():
        want = dense(flat_volume(), rows(dense)).logits
        got = sparse(flat_volume(), rows(dense)).logits
        pyramid = sparse.encoder(flat_volume())
    assert len(pyramid.routings) == 4 and want.std() > 1e-3
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * want.abs().max())
    with pytest.raises(InputError, match="gate is True in the experts, False in the layer"):
        upcycle(dense, encoder=f"{SWIN}, feed_forward=moe(experts=swiglu(n=3)))")


def test_scales_are_upcycled_with_a_router_that_reads_prompts() -> None:
    dense = small(experts="mlp(n=1, hidden=8)")
    dense.text_bank.set(torch.randn(3, 12))
    sparse = upcycle(dense, experts="mlp(n=4, hidden=8)", router="label_group")
    with torch.no_grad():
        want, got = (model(volume(), rows(dense)).logits for model in (dense, sparse))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_scales_that_cannot_be_upcycled_are_told_the_experts_that_can() -> None:
    dense = small(experts="swiglu(n=1, hidden=8)")
    with pytest.raises(InputError, match=r"in: scale_experts.0.body\n  try: experts=swiglu\(n=8, hidden=8\)$"):
        upcycle(dense, experts="shared(routed=swiglu(n=4, hidden=8))")


@pytest.mark.parametrize("encoder", [SPARSE["unet"], SPARSE["vit3d"], "timm(model='test_convnext', levels=[0, 1])"])
def test_odd_sizes_are_padded_inside_and_cropped(encoder: str) -> None:
    model = ENCODERS.build(encoder, in_channels=1) if "timm" in encoder else small(encoder=encoder).encoder
    x = torch.rand(1, 1, 13, 18, 11)
    with torch.no_grad():
        maps = model.eval()(x).maps
        whole = model(torch.nn.functional.pad(x, (0, 1, 0, 2, 0, 3))).maps
    for map_BCDHW, padded, stride in zip(maps, whole, model.strides, strict=True):
        sides = [-(-side // step) for side, step in zip(x.shape[2:], stride, strict=True)]
        assert list(map_BCDHW.shape[2:]) == sides
        if "timm" not in encoder:  # slices are not padded along their own axis
            torch.testing.assert_close(map_BCDHW, padded[:, :, : sides[0], : sides[1], : sides[2]])


def test_threads_keep_their_routings_apart() -> None:
    encoder = flat_model(FOREIGN["swin_unetr"]).encoder
    with ThreadPoolExecutor(2) as pool, torch.no_grad():
        first, second = pool.map(lambda _: encoder(flat_volume()).routings, range(2))
    assert len(first) == len(second) == 2 and all(a is not b for a, b in zip(first, second, strict=True))


def test_the_gradients_of_a_batch_of_one_are_those_of_a_larger_batch() -> None:
    """InstanceNorm3d of torch 2.14 gives others on CPUs if the gradient of a single map comes with channels last."""
    torch.manual_seed(0)
    spec = LAYERS.canonical("moe(experts=swiglu(n=4, hidden=8), router=topk(k=2))")
    layer = SparseResidual(spec, channels=8, stride=(2, 2, 2), norm="instance", owner="unet").double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    x, weight = torch.randn(2, 2, 8, 3, 3, 3, dtype=torch.float64)
    together = torch.autograd.grad((layer(x, DEFAULT_CONTEXT)[0] * weight).sum(), list(layer.parameters()))
    single = [layer(x[i : i + 1], DEFAULT_CONTEXT)[0] * weight[i : i + 1] for i in range(2)]
    apart = torch.autograd.grad(single[0].sum() + single[1].sum(), list(layer.parameters()))
    for (name, _), one, two in zip(layer.named_parameters(), together, apart, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5, msg=name)
