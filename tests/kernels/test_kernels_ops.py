"""The ops on the CPU against the references in float64, and under compile, export and autocast."""

from __future__ import annotations

import itertools

import mome_kernels as kernels
import pytest
import torch
from mome_kernels import dispatch, reference
from mome_kernels.custom_ops import experts as expert_ops
from mome_kernels.custom_ops import head as head_ops
from mome_kernels.torch_impl import experts as torch_experts
from mome_kernels.torch_impl import routing as torch_routing
from mome_kernels.weights import ExpertWeights
from op_inputs import assignments, head_inputs, mlp_inputs, same_values_and_gradients
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

ACTIVATIONS = ["none", "relu", "silu", "gelu", "gelu_tanh"]


@pytest.mark.parametrize(("gated", "bias"), list(itertools.product((False, True), repeat=2)))
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_mlp(gated: bool, bias: bool, activation: str) -> None:
    inputs = mlp_inputs(gated, bias, "uniform")
    same_values_and_gradients(kernels.moe_mlp, reference.moe_mlp, inputs, activation=activation, gated=gated)


@pytest.mark.parametrize("load", ["zipf", "one", "empty"])
def test_mlp_under_skewed_loads(load: str) -> None:
    same_values_and_gradients(kernels.moe_mlp, reference.moe_mlp, mlp_inputs(True, True, load), gated=True)


@pytest.mark.parametrize("load", ["uniform", "zipf", "one", "empty"])
@pytest.mark.parametrize("bias", [True, False])
def test_linear(load: str, bias: bool) -> None:
    x, ids, weights_TK, up, up_bias, *_ = mlp_inputs(False, bias, load)
    same_values_and_gradients(kernels.moe_linear, reference.moe_linear, [x, ids, weights_TK, up, up_bias])


SEVERAL_BLOCKS = [
    pytest.param(gated, activation, marks=() if activation == "gelu" else pytest.mark.wide)
    for gated in (False, True)
    for activation in ACTIVATIONS
]


@pytest.mark.parametrize(("gated", "activation"), SEVERAL_BLOCKS)
def test_mlp_in_several_blocks(gated: bool, activation: str, monkeypatch) -> None:
    """Later blocks use the work buffers of earlier ones, and add to their sums."""
    monkeypatch.setattr(torch_routing, "BLOCK_BYTES", 1)  # a block then has 512 rows
    inputs = mlp_inputs(gated, True, "zipf", tokens=1300)
    same_values_and_gradients(kernels.moe_mlp, reference.moe_mlp, inputs, activation=activation, gated=gated)


@pytest.mark.parametrize("gated", [False, True])
def test_values_kept_for_backward_survive_several_blocks(gated: bool, monkeypatch) -> None:
    monkeypatch.setattr(torch_routing, "BLOCK_BYTES", 1)  # a block then has 512 rows
    inputs = mlp_inputs(gated, True, "zipf", tokens=1300)
    x, ids, weights_TK, up, up_bias, down, down_bias = inputs
    same_values_and_gradients(kernels.moe_linear, reference.moe_linear, [x, ids, weights_TK, up, up_bias])
    leaves = [x, weights_TK, up, up_bias, down, down_bias]
    out = kernels.moe_mlp(*inputs, gated=gated)
    once = torch.autograd.grad(out.sum(), leaves, retain_graph=True)
    again = torch.autograd.grad(out.sum(), leaves)
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    # where z is not kept it is computed again
    tokens, experts = inputs[:3], ExpertWeights(*inputs[3:], "gelu", gated)
    with torch.no_grad():
        grad = torch.ones_like(out)
        recomputed = torch_experts.mlp_backward(grad, *tokens, experts)
        hidden = torch_experts.mlp_forward(*tokens, experts, keep_hidden=True)[1]
        kept = torch_experts.mlp_backward(grad, *tokens, experts, hidden)
    for a, b in zip(recomputed, kept, strict=True):
        torch.testing.assert_close(a, b)


def test_gradients_of_biases_are_summed_pairwise() -> None:
    """Adding 10⁵ float32 numbers one after the other would lose two digits."""
    x, ids, weights_TK, *parameters = mlp_inputs(False, True, "one", torch.float32, tokens=30_000)
    single = [x, ids, weights_TK, *parameters]
    double = [t.detach().double().requires_grad_() if t.is_floating_point() else t for t in single]
    got = torch.autograd.grad(kernels.moe_mlp(*single).sum(), [single[4], single[6]])
    want = torch.autograd.grad(kernels.moe_mlp(*double).sum(), [double[4], double[6]])
    for a, b in zip(got, want, strict=True):
        assert float((a - b).abs().max() / b.abs().max()) < 1e-6


def test_no_tokens_and_one_token() -> None:
    for tokens in (0, 1):
        inputs = mlp_inputs(False, True, "uniform", tokens=max(1, tokens))
        inputs[:3] = [inputs[0][:tokens], inputs[1][:tokens], inputs[2][:tokens]]
        out = kernels.moe_mlp(*inputs)
        assert out.shape == (tokens, 5)
        out.sum().backward()
        assert torch.isfinite(inputs[3].grad).all()


@pytest.mark.parametrize("load", ["uniform", "zipf", "one", "empty"])
def test_route(load: str) -> None:
    ids = assignments(211, 6, 2, load)
    counts, offsets, permutation, inverse = kernels.route(ids, 6)
    flat = ids.flatten()
    assert torch.equal(permutation, flat.argsort(stable=True))
    assert torch.equal(permutation[inverse], torch.arange(422))
    assert torch.equal(counts, torch.bincount(flat, minlength=6).int())
    assert offsets.tolist() == [0, *counts.cumsum(0).tolist()]


def test_reruns_are_bit_equal() -> None:
    for fast, inputs in (
        (kernels.moe_mlp, mlp_inputs(False, True, "zipf", torch.float32)),
        (kernels.fusion_head, head_inputs(dtype=torch.float32)),
    ):
        leaves = [t for t in inputs if torch.is_tensor(t) and t.requires_grad]
        runs = []
        for _ in range(2):
            out = fast(*inputs)
            runs.append([out, *torch.autograd.grad(out.sum(), leaves)])
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_opcheck() -> None:
    x, ids, weights_TK, up, up_bias, down, down_bias = mlp_inputs(True, True, "uniform", torch.float32)
    opcheck(expert_ops.route, (ids, 4))
    opcheck(expert_ops.moe_mlp, (x, ids, weights_TK, up, up_bias, down, down_bias, "silu", True, False))
    opcheck(expert_ops.moe_mlp, (x, ids, weights_TK, up, up_bias, down, down_bias, "silu", True, True))
    opcheck(expert_ops.moe_linear, (x, ids, weights_TK, up, up_bias))
    opcheck(head_ops.fusion_head, (*head_inputs(dtype=torch.float32, voxels=40), 0, 0.1))


def test_opcheck_of_the_backward_ops() -> None:
    detached = lambda given: [t.detach() if torch.is_tensor(t) else t for t in given]  # noqa: E731
    layer = detached(mlp_inputs(True, True, "uniform", torch.float32))
    for kept in (True, False):
        _, *results = expert_ops.moe_mlp(*layer, "silu", True, kept)
        opcheck(expert_ops.moe_mlp_backward, (torch.randn(53, 5), *layer, "silu", True, *results))
    opcheck(expert_ops.moe_linear_backward, (torch.randn(53, 14), *layer[:5]))
    head = detached(head_inputs(dtype=torch.float32, voxels=40))
    opcheck(head_ops.fusion_head_backward, (torch.randn(2, 3, 40), *head, 0, 0.1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_as_good_as_torch(dtype: torch.dtype) -> None:
    inputs = [
        t.to(dtype) if torch.is_tensor(t) and t.is_floating_point() else t for t in mlp_inputs(True, True, "zipf")
    ]
    wide = [t.double() if torch.is_tensor(t) and t.is_floating_point() else t for t in inputs]
    error = (kernels.moe_mlp(*inputs, gated=True).double() - reference.moe_mlp(*wide, gated=True)).abs().max()
    torch_error = (reference.moe_mlp(*inputs, gated=True).double() - reference.moe_mlp(*wide, gated=True)).abs().max()
    assert error <= 3 * torch_error + 1e-3


def test_autocast_casts_weights_and_gives_float32_gradients() -> None:
    inputs = mlp_inputs(False, True, "uniform", torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = kernels.moe_mlp(*inputs)
        logits = kernels.fusion_head(*head_inputs(dtype=torch.float32))
    assert out.dtype == torch.bfloat16 and logits.dtype == torch.float32
    out.sum().backward()
    assert inputs[3].grad.dtype == torch.float32


def test_compiles_whole_with_dynamic_token_counts() -> None:
    torch._dynamo.reset()

    def layer(x, ids, weights_TK, up, up_bias, down, down_bias):
        return kernels.moe_mlp(x, ids, weights_TK, up, up_bias, down, down_bias).square().sum()

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (53, 31):
        inputs = mlp_inputs(False, True, "uniform", torch.float32, tokens)
        leaves = [t for t in inputs if torch.is_tensor(t) and t.requires_grad]
        got = torch.autograd.grad(compiled(*inputs), leaves)
        want = torch.autograd.grad(layer(*inputs), leaves)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)


def test_the_choice_of_kernels_can_be_traced(monkeypatch) -> None:
    """`moe_mlp` reads the device's capability while a compiler traces it; the test needs no GPU."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    torch._dynamo.reset()

    def choose(x):
        return x + 1 if dispatch._has_tensor_cores(x.device) else x - 1

    compiled = torch.compile(choose, fullgraph=True, dynamic=True, backend="eager")
    assert compiled(torch.ones(2)).tolist() == [0, 0]


def test_fake_tensors_of_a_gpu_need_no_gpu() -> None:
    with FakeTensorMode(), torch.device("cuda"), torch.no_grad():
        x, ids, weights_TK = torch.empty(7, 6), torch.empty(7, 2, dtype=torch.int64), torch.empty(7, 2)
        out = kernels.moe_mlp(x, ids, weights_TK, torch.empty(3, 8, 6), None, torch.empty(3, 6, 8), None)
    assert out.shape == (7, 6) and out.device.type == "cuda"


@pytest.mark.wide  # starts a C++ compiler
@pytest.mark.parametrize("fast", ["moe_mlp", "moe_linear"])
def test_compiles_with_transposed_inputs(fast: str) -> None:
    """Tokens from a feature map and transposed weights: all gradients are contiguous."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    leaf = lambda *shape: torch.randn(*shape, requires_grad=True)  # noqa: E731
    inputs = [leaf(2, 6, 5, 5), leaf(4, 6, 9), leaf(4, 9, 6)]
    ids, weights_TK = torch.rand(50, 4).topk(2).indices, torch.rand(50, 2)

    def layer(volume, up, down):
        x, up = volume.flatten(2).transpose(1, 2).reshape(50, 6), up.transpose(1, 2)
        if fast == "moe_linear":
            return kernels.moe_linear(x, ids, weights_TK, up).square().sum() + down.sum()
        return kernels.moe_mlp(x, ids, weights_TK, up, None, down.transpose(1, 2), None).square().sum()

    got = torch.autograd.grad(torch.compile(layer, fullgraph=True, dynamic=True)(*inputs), inputs)
    for a, b in zip(got, torch.autograd.grad(layer(*inputs), inputs), strict=True):
        torch.testing.assert_close(a, b)


def test_autocast_does_not_reach_the_head() -> None:
    """The head computes in float32 under autocast; float64 is not cast, as in torch's own layers."""
    inputs = [t.detach() for t in head_inputs(dtype=torch.float32)]
    with torch.autocast("cpu", torch.bfloat16):
        logits = kernels.fusion_head(*inputs)
        assert kernels.moe_mlp(*mlp_inputs(False, True, "uniform")).dtype == torch.float64
    torch.testing.assert_close(logits, kernels.fusion_head(*inputs), rtol=0, atol=0)


def test_meta_tensors_have_shapes() -> None:
    inputs = [t.to("meta") if torch.is_tensor(t) else t for t in mlp_inputs(False, True, "uniform")]
    assert kernels.moe_mlp(*inputs).shape == (53, 5)
    assert kernels.fusion_head(*(t.to("meta") for t in head_inputs())).shape == (2, 3, 700)


@pytest.mark.parametrize("bounds", [{"min": 2, "max": 4096}, {}], ids=["bounded", "unbounded"])
def test_exports_with_a_dynamic_token_count(bounds: dict) -> None:
    class Layer(torch.nn.Module):
        def forward(self, x, ids, weights_TK, up, down):
            return kernels.moe_mlp(x, ids, weights_TK, up, None, down, None)

    x, ids, weights_TK, up, _, down, _ = mlp_inputs(False, False, "uniform", torch.float32)
    tokens = torch.export.Dim("tokens", **bounds)
    shapes = {"x": {0: tokens}, "ids": {0: tokens}, "weights_TK": {0: tokens}, "up": None, "down": None}
    program = torch.export.export(Layer(), (x, ids, weights_TK, up, down), dynamic_shapes=shapes)
    assert "mome.moe_mlp" in str(program.graph)
    fewer = (x[:7], ids[:7], weights_TK[:7], up, down)
    torch.testing.assert_close(program.module()(*fewer), Layer()(*fewer))


def test_activation_checkpointing() -> None:
    inputs = mlp_inputs(False, True, "uniform")
    plain = torch.autograd.grad(kernels.moe_mlp(*inputs).sum(), inputs[0])[0]
    again = torch.utils.checkpoint.checkpoint(kernels.moe_mlp, *inputs, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(again.sum(), inputs[0])[0], plain)


def test_values_that_are_not_tensors_are_refused() -> None:
    inputs = mlp_inputs(False, False, "uniform")
    for at, name in ((0, "x_TD"), (2, "weights_TK"), (3, "up_EFD"), (5, "down_EDF")):
        with pytest.raises(TypeError, match=f"^{name} is of type NoneType, expected a torch.Tensor$"):
            kernels.moe_mlp(*inputs[:at], None, *inputs[at + 1 :])
    with pytest.raises(TypeError, match="^ids_TK is of type list, expected a torch.Tensor$"):
        kernels.route([[0, 1]], 2)
    with pytest.raises(TypeError, match="^x_TD has layout torch.sparse_coo, expected a dense tensor$"):
        kernels.moe_mlp(inputs[0].detach().to_sparse(), *inputs[1:])
    head = head_inputs()
    with pytest.raises(TypeError, match="^b3_BP is of type NoneType, expected a torch.Tensor$"):
        kernels.fusion_head(*head[:-1], None)
    with pytest.raises(TypeError, match="^top_k is 1.5, expected an integer$"):
        kernels.fusion_head(*head, top_k=1.5)


def test_impossible_numbers_are_refused() -> None:
    ids = torch.zeros(3, 1, dtype=torch.int64)
    with pytest.raises(TypeError, match="^num_experts is 4.0, expected an integer$"):
        kernels.route(ids, 4.0)
    for count in (0, -1):
        with pytest.raises(ValueError, match=f"needs at least one expert, got {count}$"):
            kernels.route(ids, count)
    with pytest.raises(TypeError, match="expected uint8, int8, int16, int32 or int64$"):
        kernels.route(ids.to(torch.uint16), 1)
    with pytest.raises(ValueError, match="^features_BSCV has no scales, got shape "):
        kernels.fusion_head(*head_inputs(scales=0))


def test_unknown_activation_is_refused() -> None:
    with pytest.raises(ValueError, match="activation is one of none, relu, silu, gelu, gelu_tanh, got 'swish'"):
        kernels.moe_mlp(*mlp_inputs(False, False, "uniform"), activation="swish")


@pytest.mark.parametrize("gated", [False, True])
def test_blocks_of_bfloat16_have_few_sizes_and_the_same_values(gated: bool, monkeypatch) -> None:
    x_TD, ids_TK, weights_TK, *parts = mlp_inputs(gated, True, "zipf")
    inputs = [x_TD.bfloat16(), ids_TK, weights_TK.bfloat16(), *(part.bfloat16() for part in parts)]
    sizes = {torch_experts._padded(count, inputs[0]) for count in range(1, 40_000)}
    assert len(sizes) < 50 and all(torch_experts._padded(count, inputs[0]) >= count for count in (1, 64, 65, 39_999))
    assert torch_experts._padded(77, x_TD) == 77  # float32 is not compiled for each size
    with torch.inference_mode():
        padded = kernels.moe_mlp(*inputs, gated=gated)
        monkeypatch.setattr(torch_experts, "_padded", lambda count, _: count)
        torch.testing.assert_close(padded, kernels.moe_mlp(*inputs, gated=gated), atol=0, rtol=0)
