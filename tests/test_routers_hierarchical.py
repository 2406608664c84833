"""Two-level routing against a loop over tokens, and its losses at both levels."""

from __future__ import annotations

import pytest
import torch
from test_routers_groups import build

from mome.errors import InputError
from mome.map_context import DEFAULT_CONTEXT
from mome.registry import ROUTERS


@pytest.mark.parametrize(("groups", "k"), [(2, 1), (2, 3), (3, 2), (1, 2), (6, 1)])
def test_the_weight_is_the_product_of_both_probabilities(groups: int, k: int) -> None:
    router = build(f"hierarchical(groups={groups}, k={k})", experts=6).train()
    x = torch.randn(1, 3, 4, 5, 4)
    routing = router(x, DEFAULT_CONTEXT)
    size, want, joint = 6 // groups, torch.zeros(60, 6), torch.zeros(60, 6)
    share_G, share_E = torch.zeros(groups), torch.zeros(6)
    primary, z_inner = [], []
    for t, token in enumerate(x.reshape(60, 4)):
        group_logits = router.group_gate.weight_EC @ token
        p = group_logits.softmax(-1)
        primary.append(p)
        logits = (router.gate.weight_EC @ token).split(size)
        z_inner += [part.logsumexp(-1) ** 2 for part in logits]
        joint[t] = torch.cat([p[g] * logits[g].softmax(-1) for g in range(groups)])
        best = max(range(groups), key=lambda g: p[g].item())
        inside = logits[best].softmax(-1)
        for e in sorted(range(size), key=lambda e: -inside[e].item())[:k]:
            want[t, best * size + e] = p[best] * inside[e]
            share_G[best] += 1
            share_E[best * size + e] += 1
    torch.testing.assert_close(routing.gates_TE(), want)
    torch.testing.assert_close(routing.scores_TE, joint)
    mean_G = torch.stack(primary).mean(0)
    group_balance = groups * (share_G / share_G.sum() * mean_G).sum()
    balance = 6 * (share_E / share_E.sum() * joint.mean(0)).sum()
    z = torch.stack([(router.group_gate.weight_EC @ t).logsumexp(-1) ** 2 for t in x.reshape(60, 4)]).mean()
    torch.testing.assert_close(routing.losses["group_balance"], 0.01 * group_balance)
    torch.testing.assert_close(routing.losses["load_balance"], 0.01 * balance)
    torch.testing.assert_close(routing.losses["router_z"], 0.001 * (z + torch.stack(z_inner).mean()))
    sum(routing.losses.values()).backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in router.parameters())
    assert not router.eval()(x, DEFAULT_CONTEXT).losses


@pytest.mark.parametrize(
    ("router", "message"),
    [
        ("hierarchical(groups=4)", "groups=4 of router 'hierarchical' does not divide 6 experts\n.*1, 2, 3, 6"),
        ("hierarchical(groups=0)", "groups of router hierarchical is at least 1, got 0"),
        ("hierarchical(groups=3, k=3)", "router 'hierarchical' picks k=3 experts of a group of 2"),
        ("hierarchical(k=0)", "picks k=0 experts of a group of 3"),
        ("hierarchical(z_weight=-1)", "z_weight of router hierarchical is at least 0"),
        ("hierarchical(group_balance_weight=-1)", "group_balance_weight of router hierarchical is at least 0"),
    ],
)
def test_impossible_arguments_are_refused_when_built(router: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        ROUTERS.build(router, dim=4, num_experts=6)
