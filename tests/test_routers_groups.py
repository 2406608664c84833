"""Routers that compare the voxels of a group: each against a slow literal form, and what the groups promise."""

from __future__ import annotations

from typing import Any

import pytest
import throwaway_parts
import torch
from small_models import small, volume
from torch import Tensor

from mome.errors import InputError
from mome.layers.moe import MixtureOfExperts
from mome.map_context import DEFAULT_CONTEXT
from mome.registry import LAYERS, ROUTERS
from mome.routers.groups import Groups, top_tokens
from mome.routers.routing import Assignments
from mome.routers.sinkhorn import sinkhorn


def build(spec: str, *, dim: int = 4, experts: int = 3) -> Any:
    torch.manual_seed(0)
    router = ROUTERS.build(spec, dim=dim, num_experts=experts)
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter)
    return router


def layer(experts: str, router: str, dim: int = 4) -> MixtureOfExperts:
    torch.manual_seed(0)
    made = LAYERS.build(f"moe(experts={experts}, router={router})", dim=dim)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return made


def group_lists(batch: int, sides: tuple[int, int, int], window: int) -> list[list[int]]:
    """The tokens of every group, found voxel by voxel."""
    found: dict[tuple[int, ...], list[int]] = {}
    token = 0
    for b in range(batch):
        for d in range(sides[0]):
            for h in range(sides[1]):
                for w in range(sides[2]):
                    key = (b, d // window, h // window, w // window) if window else (b,)
                    found.setdefault(key, []).append(token)
                    token += 1
    return list(found.values())


@pytest.mark.parametrize("window", [0, 2])
def test_groups_are_split_and_joined_voxel_by_voxel(window: int) -> None:
    groups = Groups(2, (4, 2, 6), window)
    assert groups.tokens_GM(torch.device("cpu")).tolist() == group_lists(2, (4, 2, 6), window)
    x_TC = torch.randn(96, 3)
    assert torch.equal(groups.join(groups.split(x_TC)), x_TC)


def test_top_tokens_takes_the_earlier_of_equal_scores() -> None:
    scores = torch.tensor([[[1.0, 3.0, 2.0, 2.0, 2.0, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0, 0.0]]])
    assert top_tokens(scores, 3).tolist() == [[[1, 2, 3], [0, 1, 2]]]
    many = torch.randint(0, 5, (3, 2, 50)).float()
    for row, got in zip(many.view(6, 50), top_tokens(many, 20).view(6, 20), strict=True):
        assert got.tolist() == sorted(sorted(range(50), key=lambda i: (-row[i].item(), i))[:20])


def test_top_tokens_takes_nan_last() -> None:
    nan, inf = float("nan"), float("inf")
    scores = torch.tensor([[nan, 1.0, nan, 3.0, -inf], [nan, nan, nan, nan, nan], [nan, inf, inf, -1.0, 0.0]])
    assert top_tokens(scores, 2).tolist() == [[1, 3], [0, 1], [1, 2]]
    assert top_tokens(scores, 3).tolist() == [[0, 1, 3], [0, 1, 2], [1, 2, 4]]


@pytest.mark.parametrize("window", [0, 2])
@pytest.mark.parametrize("capacity", [0.01, 1.0, 1.3, 3.0])
def test_expert_choice_is_what_the_paper_says(capacity: float, window: int) -> None:
    router = build(f"expert_choice(capacity={capacity}, window={window})")
    x = torch.randn(2, 4, 2, 6, 4)
    routing = router(x, DEFAULT_CONTEXT)
    rows, want, per_group = x.reshape(96, 4), torch.zeros(96, 3), []
    for members in group_lists(2, (4, 2, 6), window):
        taken = max(1, round(len(members) * capacity / 3))
        per_group.append(taken)
        scores = (rows[members] @ router.gate.weight_EC.T).softmax(-1)
        for expert in range(3):
            best = sorted(range(len(members)), key=lambda i: (-scores[i, expert].item(), i))[:taken]
            for i in best:
                want[members[i], expert] = scores[i, expert]
    torch.testing.assert_close(routing.gates_TE(), want)
    assert routing.counts_E.tolist() == [sum(per_group)] * 3 and not routing.losses
    assert torch.equal(routing.experts_N.bincount(minlength=3), routing.counts_E)


def test_expert_choice_of_equal_voxels_takes_the_first() -> None:
    routing = build("expert_choice(capacity=1.5)")(torch.ones(2, 2, 2, 3, 4), DEFAULT_CONTEXT)
    assert sorted(set(routing.tokens_N.tolist())) == [*range(6), *range(12, 18)]


def test_sinkhorn_scales_rows_and_columns() -> None:
    """The literal algorithm works on exponentials, as Megatron-Core's does."""
    logits = torch.randn(2, 30, 4, dtype=torch.float64) * 2
    plan = sinkhorn(logits, 8).exp()
    for got, sample in zip(plan, logits, strict=True):
        k, columns = sample.exp(), torch.ones(4, dtype=torch.float64)
        for _ in range(8):
            rows = 1 / (30 * (k @ columns))
            columns = 1 / (4 * (k.T @ rows))
        torch.testing.assert_close(got, rows[:, None] * k * columns)
    converged = sinkhorn(logits, 200).exp()
    torch.testing.assert_close(converged.sum(2), torch.full((2, 30), 1 / 30, dtype=torch.float64))
    torch.testing.assert_close(converged.sum(1), torch.full((2, 4), 1 / 4, dtype=torch.float64))
    assert torch.isfinite(sinkhorn(torch.randn(1, 5, 4) * 1e4, 3)).all()


@pytest.mark.parametrize("k", [1, 2])
def test_sinkhorn_chooses_by_the_plan_in_training_only(k: int) -> None:
    router = build(f"sinkhorn(k={k}, iterations=20)", experts=4)
    x = torch.randn(2, 4, 4, 4, 4) + 1.0  # a mean that favours some experts
    logits = x.reshape(2, 64, 4) @ router.gate.weight_EC.T
    scores = logits.sigmoid() if k == 1 else logits.softmax(-1)
    plain = router.eval()(x, DEFAULT_CONTEXT)
    assert torch.equal(plain.ids_TK.view(2, 64, k), logits.topk(k).indices)
    trained = router.train()(x, DEFAULT_CONTEXT)
    for sample in range(2):
        plan = sinkhorn(logits[sample : sample + 1], 20)[0]
        assert torch.equal(trained.ids_TK.view(2, 64, k)[sample], plan.topk(k).indices)
    torch.testing.assert_close(trained.weights_TK, scores.view(128, 4).gather(1, trained.ids_TK))
    assert trained.counts_E.float().std() < 0.4 * plain.counts_E.float().std()
    assert not trained.losses and trained.weights_TK.requires_grad
    trained.weights_TK.sum().backward()
    assert router.gate.weight_EC.grad.abs().sum() > 0


@pytest.mark.parametrize("window", [0, 2])
def test_depth_is_what_the_paper_says(window: int) -> None:
    mixture = layer("mlp(hidden=5)", f"depth(capacity=0.3, window={window})")
    x = torch.randn(2, 4, 2, 4, 4)
    y, routing = mixture(x, DEFAULT_CONTEXT)
    rows, want = x.reshape(64, 4), torch.zeros(64, 4)
    body, total = mixture.experts, 0
    for members in group_lists(2, (4, 2, 4), window):
        scores = (rows[members] @ mixture.router.gate.weight_EC[0]).tolist()
        taken = max(1, round(len(members) * 0.3))
        for at in sorted(range(len(members)), key=lambda at: -scores[at])[:taken]:
            hidden = torch.nn.functional.gelu(body.up_proj[0] @ rows[members[at]] + body.up_bias[0])
            want[members[at]] = scores[at] * (body.down_proj[0] @ hidden + body.down_bias[0])
        total += taken
    torch.testing.assert_close(y.reshape(64, 4), want, rtol=1e-4, atol=1e-5)
    assert routing.counts_E.tolist() == [total] and isinstance(routing, Assignments)
    mixture.eval()
    assert torch.equal(mixture(x, DEFAULT_CONTEXT)[0], y)  # eval follows the same rule
    (y**2).sum().backward()
    assert mixture.router.gate.weight_EC.grad.abs().sum() > 0


@pytest.mark.parametrize("inner", ["topk(k=2)", "expert_choice(capacity=1.0)", "switch(jitter=0.0)"])
def test_depth_gives_its_tokens_and_no_others_to_the_nested_router(inner: str) -> None:
    router = build(f"depth(capacity=0.5, router={inner})").train()
    x = torch.randn(2, 2, 3, 2, 4)
    routing = router(x, DEFAULT_CONTEXT)
    want = torch.zeros(24, 3)
    rows = x.reshape(24, 4)
    r = rows @ router.gate.weight_EC[0]
    chosen = [sorted(sorted(range(s, s + 12), key=lambda i: -r[i].item())[:6]) for s in (0, 12)]
    alone = router.router(rows[torch.tensor(chosen)][:, :, None, None], DEFAULT_CONTEXT)
    for at, token in enumerate(sum(chosen, [])):
        want[token] = r[token] * alone.gates_TE()[at]
    torch.testing.assert_close(routing.gates_TE(), want)
    assert torch.equal(routing.counts_E, alone.counts_E)
    assert routing.losses.keys() == alone.losses.keys()
    seen: list[Any] = []
    router.router.observe = seen.append
    router.observe(routing)
    assert seen == [routing.inner] and routing.inner.router is router.router


GROUPED = [
    ("mlp(n=3, hidden=5)", "expert_choice(capacity=1.0)"),
    ("mlp(n=3, hidden=5)", "expert_choice(capacity=1.0, window=2)"),
    ("mlp(n=3, hidden=5)", "soft(slots=3)"),
    ("mlp(n=3, hidden=5)", "soft(slots=3, window=2)"),
    ("mlp(n=3, hidden=5)", "sinkhorn"),
    ("mlp(n=3, hidden=5)", "sinkhorn(k=2, window=4)"),
    ("mlp(n=3, hidden=5)", "depth(router=topk(k=2))"),
    ("mlp(n=1, hidden=5)", "depth(capacity=0.25, window=4)"),
]


@pytest.mark.parametrize(("experts", "router"), GROUPED)
@pytest.mark.parametrize("training", [False, True])
def test_a_batch_is_its_samples(experts: str, router: str, training: bool) -> None:
    """So the tile batch, the split into micro-batches and the number of processes change nothing."""
    mixture = layer(experts, router).train(training)
    x = torch.randn(3, 4, 8, 4, 4)
    together, _ = mixture(x, DEFAULT_CONTEXT)
    for sample, got in zip(x.split(1), together.split(1), strict=True):
        torch.testing.assert_close(got, mixture(sample, DEFAULT_CONTEXT)[0], rtol=0, atol=1e-6)
    assert mixture.router.group == "patch"


@pytest.mark.parametrize(("experts", "router"), [pair for pair in GROUPED if "window" in pair[1]])
def test_windows_do_not_see_the_patch(experts: str, router: str) -> None:
    mixture = layer(experts, router).train()
    x = torch.randn(1, 8, 4, 4, 4)
    whole, _ = mixture(x, DEFAULT_CONTEXT)
    parts = [mixture(half, DEFAULT_CONTEXT)[0] for half in x.split(4, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=0, atol=1e-6)


def test_the_whole_patch_is_seen_without_windows() -> None:
    """The opposite of the test above, so that it cannot pass by chance."""
    mixture = layer("mlp(n=3, hidden=5)", "expert_choice(capacity=1.0)")
    x = torch.randn(1, 8, 4, 4, 4)
    parts = [mixture(half, DEFAULT_CONTEXT)[0] for half in x.split(4, dim=1)]
    assert (torch.cat(parts, dim=1) - mixture(x, DEFAULT_CONTEXT)[0]).abs().max() > 1e-3


def test_the_sums_of_assignments_are_the_same_every_time() -> None:
    """Enough assignments that several threads add them."""
    mixture = layer("linear(n=4)", "expert_choice(capacity=3.0)", dim=16)
    x = torch.randn(1, 16, 16, 16, 16)

    def run() -> tuple[Tensor, Tensor]:
        given = x.clone().requires_grad_()
        y, _ = mixture(given, DEFAULT_CONTEXT)
        return y, torch.autograd.grad(y.square().sum(), given)[0]

    first = run()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(run(), first, strict=True))


def test_depth_is_used_with_one_expert_and_topk_is_not() -> None:
    plain = small(experts="mlp(n=1, hidden=8)", router="topk(k=1)")
    assert all(scale.body.router is None for scale in plain.scale_experts)
    model = small(experts="mlp(n=1, hidden=8)", router="depth(capacity=0.25)").train()
    output = model(volume(batch=2), torch.randn(2, 12), torch.ones(2, 2, 16, 16, 16))
    output.loss.backward()
    assert all(scale.body.router.gate.weight_EC.grad.abs().sum() > 0 for scale in model.scale_experts)


@pytest.mark.parametrize(
    ("router", "experts", "message"),
    [
        (
            "expert_choice(capacity=0)",
            3,
            "'expert_choice' is above 0 and at most the 3 experts, got 0",
        ),
        ("expert_choice(capacity=4)", 3, "at most the 3 experts, got 4"),
        ("expert_choice(capacity=nan)", 3, "capacity"),
        ("expert_choice(window=-1)", 3, "window of router expert_choice is at least 0, got -1"),
        ("soft(slots=0)", 3, "slots of router soft is at least 1, got 0"),
        ("sinkhorn(k=4)", 3, "router 'sinkhorn' picks k=4 experts of 3"),
        ("sinkhorn(iterations=0)", 3, "iterations of router sinkhorn is at least 1, got 0"),
        ("depth(capacity=0)", 1, "capacity of router 'depth' is a share of the tokens, above 0 and at most 1, got 0"),
        ("depth(capacity=1.5)", 3, "at most 1, got 1.5"),
        ("depth(router=soft)", 3, "router 'soft' cannot stand inside 'depth': it mixes tokens into slots"),
        ("depth(router=hash)", 3, "router 'hash' cannot stand inside 'depth': it reads the place of a voxel"),
        ("depth(router=label_group)", 3, "router 'label_group' cannot stand inside 'depth': it reads the prompt"),
        ("depth(router=depth)", 3, "router 'depth' cannot stand inside 'depth': it chooses tokens itself"),
        ("depth(router=expert_choice(window=2))", 3, "'expert_choice' cannot stand inside 'depth': it has windows"),
        ("depth(router=topk(k=4))", 3, "router topk picks k=4 experts of 3"),
    ],
)
def test_impossible_arguments_are_refused_when_built(router: str, experts: int, message: str) -> None:
    with pytest.raises(InputError, match="(?s)" + message.replace("(", r"\(")):
        ROUTERS.build(router, dim=4, num_experts=experts)


def test_windows_that_do_not_divide_are_refused() -> None:
    for router in ("expert_choice(window=5)", "soft(window=5)", "sinkhorn(window=5)", "depth(window=5)"):
        name = router.split("(")[0]
        message = f"window=5 of router '{name}' does not divide a map of 8×8×8 voxels"
        with pytest.raises(InputError, match=message):
            small(experts="mlp(n=2, hidden=8)", router=router)
        with pytest.raises(InputError, match="does not divide a map of 4×5×5 voxels"):
            build(router)(torch.randn(1, 4, 5, 5, 4), DEFAULT_CONTEXT)


def test_slots_are_refused_by_experts_that_read_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    throwaway_parts.register(monkeypatch)
    with pytest.raises(InputError, match="router 'soft' mixes voxels into slots, but experts 'film' read whole maps"):
        small(experts="film", router="soft")


def test_the_router_inside_depth_balances_its_own_load() -> None:
    """Its counts are those of the chosen tokens, once each, and its bias moves after a step."""
    model = small(experts="mlp(n=4, hidden=8)", router="depth(capacity=0.25, router=sigmoid(k=1))").train()
    model.gradient_checkpointing_enable()
    model(volume(), torch.ones(2, 12)).logits.sum().backward()
    inner = [scale.body.router.router for scale in model.scale_experts]
    assert [int(router.bias.counts_E.sum()) for router in inner] == [8**3 // 4, 16**3 // 4]
    model.after_step()
    assert all(router.bias.bias_E.any() and not router.bias.counts_E.any() for router in inner)
