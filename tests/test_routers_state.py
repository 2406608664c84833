"""What routers keep between steps: the balancing bias, the weight of the L1 penalty, and the noise of training."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import router_processes
import torch
from safetensors.torch import load_file
from small_models import small, volume
from training_runs import RECIPE, write_cases

from mome import MoME
from mome.map_context import DEFAULT_CONTEXT
from mome.registry import ROUTERS
from mome.routers.base import Router
from mome.training.config_file import load_run_config
from mome.training.loop import train
from mome.training.random_state import load_random_state, save_random_state
from mome.training.weight_average import start_average

EXPERTS, DIM = 8, 6


def build(spec: str, experts: int = EXPERTS) -> Router:
    torch.manual_seed(0)
    router = ROUTERS.build(spec, dim=DIM, num_experts=experts)
    torch.nn.init.normal_(router.weight_EC)
    return router.train()


def little(router: str, **overrides: object) -> MoME:
    """One scale of four experts."""
    return small(encoder="unet(channels=[4, 8])", patch_size=[8, 8, 8], experts="mlp(n=4, hidden=4)", router=router,
                 **overrides).train()  # fmt: skip


def only_router(model: MoME) -> Router:
    (found,) = [module for module in model.modules() if isinstance(module, Router)]
    return found


def centred_sign_step(counts: list[int], rate: float) -> torch.Tensor:
    """torchtitan's update, in its words: rate · sign(mean − counts), minus the mean of that."""
    signs = [((c < sum(counts) / len(counts)) - (c > sum(counts) / len(counts))) * rate for c in counts]
    return torch.tensor([sign - sum(signs) / len(signs) for sign in signs])


# -- the balancing bias --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["sigmoid(k=2, bias_rate=0.1)", "group_limited(k=2, groups=4, bias_rate=0.1)"])
def test_the_bias_steps_once_for_all_counts_since_the_last_step(spec: str) -> None:
    router, counts = build(spec), torch.zeros(EXPERTS, dtype=torch.int64)
    for seed in range(2):  # two batches of one optimiser step
        x = torch.randn(2, 2, 2, 2, DIM, generator=torch.Generator().manual_seed(seed))
        routing = router(x, DEFAULT_CONTEXT)
        router.observe(routing)
        counts += routing.counts_E
    router.after_step()
    wanted = centred_sign_step(counts.tolist(), 0.1)
    torch.testing.assert_close(router.bias.bias_E, wanted)
    assert len(set(wanted.tolist())) > 1 and abs(router.bias.bias_E.sum()) < 1e-6
    router.after_step()  # a step without tokens changes nothing
    torch.testing.assert_close(router.bias.bias_E, wanted)


def test_a_rate_of_zero_holds_the_bias() -> None:
    router = build("sigmoid(bias_rate=0.0)")
    router.bias.bias_E.uniform_()
    before = router.bias.bias_E.clone()
    router.observe(router(torch.randn(1, 2, 2, 2, DIM), DEFAULT_CONTEXT))
    router.after_step()
    assert torch.equal(router.bias.bias_E, before) and not router.bias.counts_E.any()


@pytest.mark.parametrize("spec", ["sigmoid(k=2", "group_limited(groups=4, groups_kept=2",
                                  "group_limited(groups=4, groups_kept=2, score='softmax'"])  # fmt: skip
def test_the_bias_evens_a_skewed_load_within_200_steps(spec: str, one_thread: None) -> None:
    router = build(f"{spec}, bias_rate=0.01)")
    with torch.no_grad():  # the first channel is one for every token, and prefers the first experts
        router.weight_EC.mul_(0.5)[:, 0] = torch.linspace(1.0, -1.0, EXPERTS)
    generator, loads = torch.Generator().manual_seed(1), []
    for _ in range(200):
        x = torch.randn(1, 8, 8, 8, DIM, generator=generator)
        x[..., 0] = 1.0
        routing = router(x, DEFAULT_CONTEXT)
        router.observe(routing)
        router.after_step()
        loads.append(routing.counts_E.float() / routing.counts_E.float().mean())
    first, last = loads[0], torch.stack(loads[-20:]).mean(0)
    assert first.max() > 1.8 and first.min() < 0.4
    assert last.max() < 1.15 and last.min() > 0.85


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_models_bias_follows_its_counts_also_with_checkpointing(checkpointing: bool) -> None:
    model = little("sigmoid(k=1, bias_rate=0.5)")
    if checkpointing:
        model.gradient_checkpointing_enable()
    router, counts = only_router(model), torch.zeros(4, dtype=torch.int64)
    for seed in range(2):  # gradient accumulation
        given = torch.rand(1, 1, 8, 8, 8, generator=torch.Generator().manual_seed(seed))
        counts += model.encode(given).routings[0].counts_E
        model(given, torch.ones(2, 12)).logits.sum().backward()
    assert torch.equal(router.bias.counts_E, counts) and counts.sum() == 2 * 8**3
    model.after_step()
    torch.testing.assert_close(router.bias.bias_E, centred_sign_step(counts.tolist(), 0.5))
    model.eval()(volume(8), torch.ones(2, 12))
    assert not router.bias.counts_E.any()


# -- ReMoE ---------------------------------------------------------------------------------------------------------


def test_the_l1_weight_follows_the_sparsity() -> None:
    router = build("relu(k=2, initial_l1_weight=0.01)")
    x = torch.randn(1, 4, 4, 4, DIM)
    for scale, factor in ((1.0, 1.2), (-1.0, 1 / 1.2)):  # more than a quarter of the weights are positive; none is
        with torch.no_grad():
            router.weight_EC.fill_(scale)
        before = router.l1_weight.clone()
        router.observe(router(x.abs(), DEFAULT_CONTEXT))
        router.after_step()
        torch.testing.assert_close(router.l1_weight, before * factor)
    before = router.l1_weight.clone()
    router.after_step()
    assert torch.equal(router.l1_weight, before)


@pytest.mark.parametrize("k", [1, 2])
def test_relu_reaches_its_target_sparsity_while_it_learns(k: int, one_thread: None) -> None:
    router = build(f"relu(k={k})")
    torch.nn.init.normal_(router.weight_EC, std=0.1)
    maps = torch.nn.Parameter(torch.randn(EXPERTS, DIM, DIM) / DIM)
    x = torch.randn(1, 4, 4, 8, DIM, generator=torch.Generator().manual_seed(1))
    target = x.reshape(-1, DIM).sin()
    optimiser = torch.optim.Adam([*router.parameters(), maps], lr=2e-2)
    sparsity = []
    for _ in range(300):
        routing = router(x, DEFAULT_CONTEXT)
        result = torch.einsum("te,td,edf->tf", routing.gates_TE(), x.reshape(-1, DIM), maps)
        optimiser.zero_grad()
        ((result - target).square().mean() + routing.losses["l1"]).backward()
        optimiser.step()
        router.observe(routing)
        router.after_step()
        sparsity.append(1 - routing.counts_E.sum().item() / (128 * EXPERTS))
    assert sparsity[0] < 0.6
    assert sum(sparsity[-100:]) / 100 == pytest.approx(1 - k / EXPERTS, abs=0.02)


# -- casts, checkpoints, averages ----------------------------------------------------------------------------------

STATES = {"sigmoid(k=2)": "bias.bias_E", "group_limited(k=2)": "bias.bias_E", "relu": "l1_weight"}


@pytest.mark.parametrize("spec", STATES)
def test_casts_leave_a_routers_tensors_in_float32(spec: str, tmp_path: Path) -> None:
    model = little(spec)
    router = only_router(model)
    state = router.get_buffer(STATES[spec])
    state.fill_(0.1234567)  # half precision would round it
    weight = router.weight_EC.detach().clone()
    model.save_pretrained(tmp_path)
    loaded = [MoME.from_pretrained(tmp_path, dtype=dtype) for dtype in (torch.float16, torch.bfloat16)]
    casts = [model.half(), model.to(torch.bfloat16), model.to("cpu", torch.float16), model.bfloat16(), *loaded]
    for cast in casts:
        router = only_router(cast)
        assert router.get_buffer(STATES[spec]).dtype == torch.float32 and router.weight_EC.dtype == torch.float32
        assert torch.all(router.get_buffer(STATES[spec]) == torch.tensor(0.1234567))
        assert torch.equal(router.weight_EC, weight)
        assert cast.scale_experts[0].proj_in.weight.dtype != torch.float32
    counts = [b for name, b in router.named_buffers() if name != STATES[spec]]
    assert counts and all(b.dtype == torch.int64 and not b.any() for b in counts)
    assert set(router.state_dict()) == {*dict(router.named_parameters()), STATES[spec]}
    with torch.no_grad():
        logits = loaded[1].eval()(volume(8).bfloat16(), torch.ones(2, 12)).logits
    assert torch.isfinite(logits.float()).all()


def test_a_router_in_half_precision_can_be_cast_to_float32() -> None:
    router = build("sigmoid")
    router.weight_EC.data = router.weight_EC.data.bfloat16()
    assert router.float().weight_EC.dtype == torch.float32
    assert router.to("meta").bias.bias_E.is_meta


@pytest.mark.parametrize("spec", STATES)
def test_the_moving_average_copies_the_state(spec: str) -> None:
    model = little(spec)
    average = start_average(model, 0.9, torch.device("cpu"))
    average.update_parameters(model)  # the first update copies everything
    with torch.no_grad():
        for tensor in (*model.parameters(), only_router(model).get_buffer(STATES[spec])):
            tensor.add_(1.0)
    average.update_parameters(model)
    mine, averaged = only_router(model), only_router(average.module)
    assert torch.equal(averaged.get_buffer(STATES[spec]), mine.get_buffer(STATES[spec]))
    torch.testing.assert_close(averaged.weight_EC, mine.weight_EC - 2 / 11)  # of the decay 0.9, see `moving_average`


# -- the noise of training -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["noisy_topk", "switch(jitter=0.5)"])
def test_a_restored_random_state_repeats_the_noise(spec: str, tmp_path: Path) -> None:
    router, x = build(spec), torch.randn(1, 4, 4, 4, DIM)
    save_random_state(tmp_path / "random.safetensors")
    first, second = router(x, DEFAULT_CONTEXT), router(x, DEFAULT_CONTEXT)
    load_random_state(tmp_path / "random.safetensors")
    again = router(x, DEFAULT_CONTEXT)
    assert torch.equal(again.gates_TE(), first.gates_TE()) and not torch.equal(second.gates_TE(), first.gates_TE())
    router.eval()
    assert torch.equal(router(x, DEFAULT_CONTEXT).gates_TE(), router(x, DEFAULT_CONTEXT).gates_TE())


@pytest.mark.parametrize("spec", ["noisy_topk", "switch(jitter=0.5)", "sigmoid(balance_weight=0.1)", "relu"])
def test_checkpointing_replays_the_same_noise(spec: str) -> None:
    grads = []
    for checkpointing in (False, True):
        model = little(spec)
        if checkpointing:
            model.gradient_checkpointing_enable()
        torch.manual_seed(3)
        model(volume(8), torch.ones(2, 12), torch.ones(1, 2, 8, 8, 8)).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    for name, grad in grads[0].items():
        assert torch.equal(grads[1][name], grad), name
    assert any("router" in name and grad.abs().sum() > 0 for name, grad in grads[0].items())


@pytest.mark.wide
@pytest.mark.parametrize("spec", ["noisy_topk", "sigmoid(bias_rate=0.05)", "relu(initial_l1_weight=0.01)"])
def test_a_resumed_run_ends_with_the_same_model(spec: str, tmp_path: Path) -> None:
    write_cases(tmp_path / "data", 1)
    (tmp_path / "run.yaml").write_text(RECIPE.format(root=tmp_path))
    common = [f"router={spec}", "experts=mlp(n=4, hidden=8)", "train.steps=5", "train.validate_every=0",
              "train.checkpoint_every=2", "train.keep_checkpoints=9"]  # fmt: skip
    folder = train(load_run_config(tmp_path / "run.yaml", [*common, f"train.out={tmp_path / 'a'}"]))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    shutil.rmtree(tmp_path / "b" / "model")
    for step in (4, 5):
        shutil.rmtree(tmp_path / "b" / "checkpoints" / f"step_{step:08d}")
    again = train(load_run_config(tmp_path / "run.yaml", [*common, f"train.out={tmp_path / 'b'}"]))
    first, second = (load_file(f / "model.safetensors") for f in (folder, again))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    early = load_file(tmp_path / "b" / "checkpoints" / "step_00000002" / "model.safetensors")
    states = [name for name in first if name.endswith(("bias.bias_E", "l1_weight"))]
    assert len(states) == ("noisy" not in spec) and all(not torch.equal(early[n], first[n]) for n in states)


# -- several processes ---------------------------------------------------------------------------------------------


@pytest.mark.wide
def test_two_processes_end_with_the_state_losses_and_gradients_of_one(tmp_path: Path) -> None:
    router_processes.main(0, 1, "", str(tmp_path / "one"))
    script = router_processes.__file__
    running = [
        subprocess.Popen([sys.executable, script, str(rank), "2", str(tmp_path / "meet"), str(tmp_path / "two")])
        for rank in range(2)
    ]
    assert [process.wait(timeout=120) for process in running] == [0, 0]
    one, two = (torch.load(tmp_path / name, weights_only=True) for name in ("one", "two"))
    assert one.keys() == two.keys() and {"load.grad", "topk.0.importance", "relu.2.l1", "topk.0.grad"} <= one.keys()
    for name, value in one.items():
        if name.endswith(("bias_E", "l1_weight")):
            assert torch.equal(two[name], value), name
        torch.testing.assert_close(two[name], value, msg=name)
    assert one["sigmoid.bias.bias_E"].any() and one["relu.l1_weight"] != 0.5
