"""Token-choice routers against slow literal references, their losses, and what they refuse."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from transformers import DeepseekV3Config, MixtralConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter, load_balancing_loss_func

from mome.errors import InputError
from mome.map_context import DEFAULT_CONTEXT
from mome.registry import ROUTERS
from mome.routers.base import Router
from mome.routers.choice import ids_of_best
from mome.routers.losses import load_balance_loss

DIM, SHAPE = 6, (2, 2, 3, 2, 6)
TOKENS = 24


def build(spec: str, experts: int = 4) -> Router:
    """A router with large random weights and, where it has one, a random bias."""
    torch.manual_seed(0)
    router = ROUTERS.build(spec, dim=DIM, num_experts=experts)
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.normal_()
        if hasattr(router, "bias"):
            router.bias.bias_E.uniform_(-0.3, 0.3)
    return router.eval()


def tokens(seed: int = 1) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def logits_of(router: Router, x: Tensor, weight: str = "weight_EC") -> list[list[float]]:
    rows, weights = x.reshape(-1, DIM).tolist(), getattr(router, weight).tolist()
    return [[sum(a * b for a, b in zip(row, w, strict=True)) for w in weights] for row in rows]


def softmax(values: list[float]) -> list[float]:
    powers = [math.exp(v - max(values)) for v in values]
    return [p / sum(powers) for p in powers]


def best(values: list[float], k: int) -> list[int]:
    return sorted(range(len(values)), key=lambda e: -values[e])[:k]


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def check(router: Router, x: Tensor, wanted: list[dict[int, float]]) -> None:
    """Compares a routing with the experts and weights of each token."""
    routing = router(x, DEFAULT_CONTEXT)
    gates = torch.zeros(len(wanted), router.num_experts)
    for t, chosen in enumerate(wanted):
        for e, weight in chosen.items():
            gates[t, e] = weight
    torch.testing.assert_close(routing.gates_TE(), gates, rtol=1e-4, atol=1e-5)
    assert routing.counts_E.tolist() == [sum(e in chosen for chosen in wanted) for e in range(router.num_experts)]


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_topk_is_softmax_then_the_k_best(k: int, normalize: bool) -> None:
    router, x = build(f"topk(k={k}, normalize={normalize})"), tokens()
    wanted = []
    for row in logits_of(router, x):
        p = softmax(row)
        chosen = best(p, k)
        total = sum(p[e] for e in chosen) if normalize and k > 1 else 1.0
        wanted.append({e: p[e] / total for e in chosen})
    check(router, x, wanted)


def test_switch_jitters_its_input_in_training_only() -> None:
    router, x = build("switch(jitter=0.5)"), tokens()
    check(router, x, [{best(p, 1)[0]: max(p)} for p in map(softmax, logits_of(router, x))])
    torch.manual_seed(3)
    jittered = x * torch.empty(TOKENS, DIM).uniform_(0.5, 1.5).view(x.shape)
    wanted = [{best(p, 1)[0]: max(p)} for p in map(softmax, logits_of(router, jittered))]
    torch.manual_seed(3)
    check(router.train(), x, wanted)


@pytest.mark.parametrize("k", [2, 3, 4])
def test_noisy_topk_is_the_papers_gate_and_its_two_losses(k: int) -> None:
    router, x = build(f"noisy_topk(k={k}, importance_weight=0.5, load_weight=2.0)"), tokens()
    clean, scales = logits_of(router, x), logits_of(router, x, "noise_weight_EC")
    check(
        router, x, [{e: w for e, w in zip(best(r, k), softmax(sorted(r)[: -k - 1 : -1]), strict=True)} for r in clean]
    )
    torch.manual_seed(3)
    noise = torch.randn(TOKENS, 4).tolist()
    wanted, load, importance = [], [0.0] * 4, [0.0] * 4
    for t in range(TOKENS):
        scale = [math.log1p(math.exp(s)) + 0.01 for s in scales[t]]
        noisy = [clean[t][e] + noise[t][e] * scale[e] for e in range(4)]
        chosen = best(noisy, k)
        weights = softmax([noisy[e] for e in chosen])
        wanted.append(dict(zip(chosen, weights, strict=True)))
        for e in range(4):
            importance[e] += wanted[t].get(e, 0.0)
            others = sorted((noisy[o] for o in range(4) if o != e), reverse=True)
            if k == 4:
                load[e] += 1.0
            else:
                load[e] += 0.5 * (1 + math.erf((clean[t][e] - others[k - 1]) / scale[e] / math.sqrt(2)))
    torch.manual_seed(3)
    check(router.train(), x, wanted)
    torch.manual_seed(3)
    losses = router(x, DEFAULT_CONTEXT).losses

    def variation(values: list[float]) -> float:
        mean = sum(values) / 4
        return sum((v - mean) ** 2 for v in values) / 4 / mean**2

    assert losses["importance"].item() == pytest.approx(0.5 * variation(importance), rel=1e-3, abs=1e-6)
    assert losses["load"].item() == pytest.approx(2 * variation(load), rel=1e-3, abs=1e-6)
    assert set(losses) == {"importance", "load"}


@pytest.mark.parametrize("spec", ["sigmoid(k=1)", "sigmoid(k=1, normalize=true)", "sigmoid(k=3, scale=2.5)",
                                  "sigmoid(k=2, normalize=false)"])  # fmt: skip
def test_sigmoid_chooses_with_the_bias_and_weighs_without(spec: str) -> None:
    router, x = build(spec), tokens()
    normalize = spec in ("sigmoid(k=1, normalize=true)", "sigmoid(k=3, scale=2.5)")
    bias, wanted = router.bias.bias_E.tolist(), []
    for row in logits_of(router, x):
        s = [sigmoid(v) for v in row]
        chosen = best([s[e] + bias[e] for e in range(4)], router.k)
        total = sum(s[e] for e in chosen) if normalize else 1.0
        wanted.append({e: s[e] / total * router.scale for e in chosen})
    check(router, x, wanted)


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
@pytest.mark.parametrize(("groups", "kept", "k"), [(4, 2, 3), (2, 1, 2), (3, 2, 5), (1, 1, 2)])
def test_group_limited_takes_the_groups_with_the_best_two(score: str, groups: int, kept: int, k: int) -> None:
    router = build(f"group_limited(k={k}, groups={groups}, groups_kept={kept}, score='{score}', scale=1.5)", 12)
    x, size, wanted = tokens(), 12 // groups, []
    bias = router.bias.bias_E.tolist()
    for row in logits_of(router, x):
        s = softmax(row) if score == "softmax" else [sigmoid(v) for v in row]
        biased = [s[e] + bias[e] for e in range(12)]
        strength = [sum(sorted(biased[g * size : (g + 1) * size])[-2:]) for g in range(groups)]
        allowed = [e for e in range(12) if e // size in best(strength, kept)]
        chosen = sorted(allowed, key=lambda e: -biased[e])[:k]
        wanted.append({e: 1.5 * s[e] / sum(s[c] for c in chosen) for e in chosen})
    check(router, x, wanted)


def test_relu_weighs_by_positive_logits() -> None:
    router, x = build("relu(k=2, initial_l1_weight=0.25)"), tokens()
    bias = router.bias_E.tolist()
    rows = [[v + b for v, b in zip(row, bias, strict=True)] for row in logits_of(router, x)]
    check(router, x, [{e: v for e, v in enumerate(row) if v > 0} for row in rows])
    active = [sum(row[e] > 0 for row in rows) for e in range(4)]
    mean = [sum(max(row[e], 0) for row in rows) / TOKENS for e in range(4)]
    wanted = 0.25 * 4 * sum(active[e] / (2 * TOKENS) * mean[e] for e in range(4))
    losses = router.train()(x, DEFAULT_CONTEXT).losses
    assert set(losses) == {"l1"} and losses["l1"].item() == pytest.approx(wanted, rel=1e-4)


def test_relu_runs_where_no_token_has_an_expert() -> None:
    router = build("relu(k=1)").train()
    with torch.no_grad():
        router.weight_EC.zero_()
        router.bias_E.fill_(-1)
    routing = router(tokens(), DEFAULT_CONTEXT)
    assert routing.tokens_N.numel() == 0 and not routing.gates_TE().any() and routing.losses["l1"] == 0


def test_relu_passes_nan_on() -> None:
    """An expert whose logit is NaN would otherwise be left out, and the result would look sound."""
    x = tokens()
    x[0, 0, 0, 0, 0] = float("nan")
    gates = build("relu(k=1)")(x, DEFAULT_CONTEXT).gates_TE()
    assert gates[0].isnan().all() and gates[1:].isfinite().all()


# -- losses --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 3])
def test_the_balance_loss_is_hugging_faces_divided_by_k(k: int) -> None:
    logits = torch.randn(50, 5, generator=torch.Generator().manual_seed(2))
    probabilities = logits.softmax(-1)
    counts = torch.bincount(probabilities.topk(k).indices.flatten(), minlength=5)
    torch.testing.assert_close(
        load_balance_loss(probabilities, counts), load_balancing_loss_func((logits,), 5, top_k=k) / k
    )
    even = torch.full((50, 5), 0.2)
    torch.testing.assert_close(load_balance_loss(even, torch.full((5,), 10 * k)), torch.tensor(1.0))


@pytest.mark.parametrize("spec", ["topk(k=2", "switch(jitter=0.0", "sigmoid(k=2", "group_limited(k=2, score='softmax'"])
def test_every_loss_that_a_router_can_compute(spec: str) -> None:
    router, x = build(f"{spec}, balance_weight=2, z_weight=3, importance_weight=5)").train(), tokens()
    routing, rows = router(x, DEFAULT_CONTEXT), logits_of(router, x)
    shares = [softmax(row) for row in rows]
    if "sigmoid" in spec:  # scores are divided by their sum over all experts
        shares = [[sigmoid(v) / sum(map(sigmoid, row)) for v in row] for row in rows]
    gates, counts = routing.gates_TE().tolist(), routing.counts_E.tolist()
    mean = [sum(share[e] for share in shares) / TOKENS for e in range(4)]
    importance = [sum(gate[e] for gate in gates) for e in range(4)]
    average = sum(importance) / 4
    wanted = {
        "load_balance": 2 * 4 * sum(c / sum(counts) * p for c, p in zip(counts, mean, strict=True)),
        "router_z": 3 * sum(math.log(sum(map(math.exp, row))) ** 2 for row in rows) / TOKENS,
        "importance": 5 * sum((i - average) ** 2 for i in importance) / 4 / average**2,
    }
    assert {name: loss.item() for name, loss in routing.losses.items()} == pytest.approx(wanted, rel=1e-4)
    assert not router.eval()(x, DEFAULT_CONTEXT).losses


def test_a_loss_of_weight_zero_is_not_computed() -> None:
    router = build("topk(k=2, balance_weight=0, z_weight=0)").train()
    assert router(tokens(), DEFAULT_CONTEXT).losses == {}


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("topk(load_weight=0.1)", "router 'topk' has no argument 'load_weight'.*balance_weight.*importance_weight"),
        ("relu(balance_weight=0.1)", "router 'relu' has no argument 'balance_weight'.*initial_l1_weight"),
        ("switch(load_weight=0.1)", "router 'switch' has no argument 'load_weight'"),
    ],
)
def test_a_loss_that_a_router_cannot_compute_is_refused_by_name(spec: str, words: str) -> None:
    with pytest.raises(InputError, match=f"(?s){words}"):
        ROUTERS.canonical(spec)


# -- the same numbers as other implementations ---------------------------------------------------------------------


@pytest.mark.parametrize("normalize", [True, False])
def test_group_limited_is_hugging_faces_deepseek_v3(normalize: bool) -> None:
    router = build(f"group_limited(k=4, groups=4, groups_kept=2, scale=2.5, normalize={normalize})", 16)
    theirs = DeepseekV3TopkRouter(
        DeepseekV3Config(n_routed_experts=16, num_experts_per_tok=4, n_group=4, topk_group=2, hidden_size=DIM,
                         routed_scaling_factor=2.5, norm_topk_prob=normalize)
    )  # fmt: skip
    with torch.no_grad():
        theirs.weight.copy_(router.weight_EC)
        theirs.e_score_correction_bias.copy_(router.bias.bias_E)
        _, weights, ids = theirs(tokens().reshape(1, -1, DIM))
        gates = torch.zeros(TOKENS, 16).scatter(1, ids, weights)
        torch.testing.assert_close(router(tokens(), DEFAULT_CONTEXT).gates_TE(), gates)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_topk_is_hugging_faces_mixtral(k: int) -> None:
    router = build(f"topk(k={k}, normalize={k > 1})")  # Mixtral divides a single weight by itself
    theirs = MixtralTopKRouter(MixtralConfig(num_local_experts=4, num_experts_per_tok=k, hidden_size=DIM))
    with torch.no_grad():
        theirs.weight.copy_(router.weight_EC)
        _, weights, ids = theirs(tokens().reshape(-1, DIM))
        routing = router(tokens(), DEFAULT_CONTEXT)
    assert torch.equal(routing.ids_TK, ids)
    torch.testing.assert_close(routing.weights_TK / routing.weights_TK.sum(-1, keepdim=True), weights)


# -- contract ------------------------------------------------------------------------------------------------------

ALL = ["topk", "switch(jitter=0.2)", "noisy_topk", "sigmoid(balance_weight=0.1, z_weight=0.1)",
       "group_limited(balance_weight=0.1, importance_weight=0.1)", "relu"]  # fmt: skip


@pytest.mark.parametrize("spec", ALL)
def test_half_precision_and_autocast_route_in_float32(spec: str) -> None:
    router, x = build(spec), tokens().bfloat16()
    for training in (False, True):
        router.train(training)
        torch.manual_seed(3)
        wanted = router(x.float(), DEFAULT_CONTEXT)
        torch.manual_seed(3)
        with torch.autocast("cpu", torch.bfloat16):
            got = router(x, DEFAULT_CONTEXT)
        assert torch.equal(got.gates_TE(), wanted.gates_TE()) and got.scores_TE.dtype == torch.float32
        assert bool(got.losses) == training
        for name, loss in got.losses.items():
            assert torch.equal(loss, wanted.losses[name]) and loss.dtype == torch.float32


@pytest.mark.parametrize(
    ("spec", "experts", "words"),
    [
        ("topk(k=5)", 4, "router topk picks k=5 experts of 4\n.*k from 1 to 4"),
        ("sigmoid(k=0)", 4, "router sigmoid picks k=0 experts of 4"),
        ("noisy_topk(k=5)", 4, "router noisy_topk picks k=5 experts of 4"),
        ("noisy_topk(k=1)", 4, "noisy_topk with k=1 .* learns nothing.*\n.*router='switch'"),
        ("group_limited(k=5)", 4, "router group_limited picks k=5 experts of 4"),
        ("group_limited(groups=3)", 8, "cannot divide 8 experts into groups=3 .*\n.*groups: 1, 2, 4"),
        ("group_limited(groups=4)", 4, "groups=4 equal groups of at least two\n.*groups: 1, 2"),
        ("group_limited(groups=0)", 4, "into groups=0 equal groups"),
        ("group_limited(groups=2, groups_kept=3)", 8, "keeps groups_kept=3 of 2 groups\n.*from 1 to 2"),
        ("group_limited(groups=2, groups_kept=0)", 8, "keeps groups_kept=0 of 2 groups"),
        ("group_limited(k=3, groups=4)", 8, "picks k=3 experts from groups_kept=1 groups of 2\n.*at most 2"),
        ("group_limited(score='sigmoyd')", 8, "is sigmoid or softmax, got 'sigmoyd', did you mean 'sigmoid'"),
        ("relu(k=4)", 4, "router relu aims at k=4 of 4 experts per token, which .*\n.*k below 4"),
        ("relu(k=5)", 4, "router relu picks k=5 experts of 4"),
        ("relu(l1_growth=1.0)", 4, "l1_growth of router relu is above 1, got 1.0"),
        ("relu(initial_l1_weight=0.0)", 4, "initial_l1_weight of router relu is at least 1e-16, got 0.0"),
        ("sigmoid(scale=0)", 4, "scale of router sigmoid is above 0, got 0.0"),
        ("sigmoid(bias_rate=-1)", 4, "bias_rate of router sigmoid is at least 0, got -1.0"),
        ("sigmoid(balance_weight=-1)", 4, "balance_weight of router sigmoid is at least 0, got -1.0"),
        ("noisy_topk(load_weight=-1)", 4, "load_weight of router noisy_topk is at least 0, got -1.0"),
        ("switch(importance_weight=-2)", 4, "importance_weight of router switch is at least 0, got -2.0"),
        ("switch(jitter=1.0)", 4, "jitter of router switch is at least 0 and below 1, got 1.0"),
    ],
)
def test_impossible_arguments_are_refused_when_built(spec: str, experts: int, words: str) -> None:
    with pytest.raises(InputError, match=words):
        ROUTERS.build(spec, dim=DIM, num_experts=experts)


@pytest.mark.parametrize(
    ("spec", "experts", "k"),
    [
        ("topk(k=1)", 4, 1), ("topk(k=2)", 4, 2), ("topk(k=6)", 8, 6), ("switch", 4, 1), ("noisy_topk(k=2)", 4, 2),
        ("sigmoid(k=3)", 4, 3), ("sinkhorn(k=2)", 4, 2), ("hierarchical(groups=2, k=2)", 6, 2),
        ("group_limited(k=2, groups=2)", 4, 2),
    ],
)  # fmt: skip
def test_of_equal_scores_the_lower_experts_are_chosen(spec: str, experts: int, k: int) -> None:
    """A token of zeros has the same score for every expert; the choice must not depend on the device."""
    router = build(spec, experts)
    if hasattr(router, "bias"):
        router.bias.bias_E.zero_()
    routing = router(torch.zeros(SHAPE), DEFAULT_CONTEXT)
    assert routing.ids_TK.tolist() == TOKENS * [list(range(k))]


@pytest.mark.parametrize("k", [1, 2, 4, 5, 9])
def test_choice_of_experts_beside_a_stable_sort(k: int) -> None:
    """Few different scores, so that most tokens have ties; the sort of Python keeps the order of equal scores."""
    scores = torch.randint(3, (40, 9), generator=torch.Generator().manual_seed(k)).float()
    assert ids_of_best(scores, k).tolist() == [best(row, k) for row in scores.tolist()]
