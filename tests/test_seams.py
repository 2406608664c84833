"""The seams of the core: parts written from CONTRIBUTING.md alone run, learn, save and load inside whole models."""

from __future__ import annotations

import gc
import json
from pathlib import Path

import accelerate
import pytest
import throwaway_parts
import torch
from small_models import small, volume
from tiny_parts import tiny
from torch.nn import functional as F
from training_runs import RECIPE, write_cases

from mome import MoME, MoMEConfig
from mome.errors import InputError
from mome.layers import predict
from mome.map_context import MapContext
from mome.registry import EXPERTS, FUSIONS, HEADS, PARTS, ROUTERS
from mome.training.config_file import load_run_config
from mome.training.loop import train

PLAIN = {"head": "plain", "text_encoder": "none"}
# What each part is named in a config, and a string that is not its default.
NEW = {
    "expert_choice": {"router": "own_choice(capacity=1.0)", "experts": "mlp(n=3, hidden=8)"},
    "conv": {"experts": "own_conv(n=3)", "router": "topk(k=3)"},
    "gate": {"fusion": "gate(hidden=4)", "experts": "linear"},
    "gate_plain": {"fusion": "gate(hidden=4)", "experts": "linear", **PLAIN},
    "flat": {"encoder": "flat(channels=[4, 8], layers=moe(experts=swiglu(n=3, hidden=8), router=topk(k=1)))"},
    "film": {"experts": "own_film(n=3)", "router": "topk(k=1)"},
    "place": {"router": "place(rate=0.5)", "experts": "mlp(n=2, hidden=8)"},
    "slot": {"router": "slot", "experts": "mlp(n=2, hidden=8)"},
    # pairs of two new parts
    "conv_chosen": {"experts": "own_conv", "router": "own_choice"},
    "film_placed": {"experts": "own_film", "router": "place"},
    "film_chosen": {"experts": "own_film", "router": "own_choice"},
    "conv_flat_gate": {"encoder": "flat", "experts": "own_conv", "router": "place", "fusion": "gate"},
}
every_new_part = pytest.mark.parametrize("name", NEW)


@pytest.fixture(autouse=True)
def parts(monkeypatch: pytest.MonkeyPatch) -> None:
    throwaway_parts.register(monkeypatch)


def text(model: MoME, prompts: int = 2) -> torch.Tensor:
    return torch.randn(prompts, model.config.text_dim, generator=torch.Generator().manual_seed(1))


def logits(model: MoME, batch: int = 1, **given: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(volume(batch=batch), text(model), **given).logits


@every_new_part
def test_a_step_of_training_is_finite_and_reaches_every_parameter(name: str) -> None:
    model = small(**NEW[name]).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    targets = (torch.rand(2, 2, 16, 16, 16, generator=torch.Generator().manual_seed(2)) > 0.7).float()
    for _ in range(2):
        optimiser.zero_grad()
        output = model(volume(batch=2), text(model), targets)
        output.loss.backward()
        missing = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
        assert not missing
        assert all(torch.isfinite(p.grad).all() for p in model.parameters())
        optimiser.step()
        model.after_step()
    assert torch.isfinite(output.loss) and all(torch.isfinite(p).all() for p in model.parameters())


@every_new_part
def test_saved_and_loaded_logits_are_bit_equal(name: str, tmp_path: Path) -> None:
    model = small(**NEW[name])
    first = logits(model)
    assert first.shape == (1, 2, 16, 16, 16) and torch.equal(logits(model), first)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(MoME.from_pretrained(tmp_path).eval()), first)
    half = MoME.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        assert torch.isfinite(half(volume().bfloat16(), text(model)).logits.float()).all()


@every_new_part
def test_autocast_runs(name: str) -> None:
    model = small(**NEW[name]).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(volume(), text(model), torch.ones(1, 2, 16, 16, 16))
    output.loss.backward()
    assert torch.isfinite(output.loss)


@every_new_part
def test_gradient_checkpointing_changes_no_gradient(name: str) -> None:
    grads = []
    for checkpointing in (False, True):
        model = small(**NEW[name]).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(volume(), text(model), torch.ones(1, 2, 16, 16, 16)).loss.backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(grads[1], grads[0])


@every_new_part
def test_the_config_string_prints_back(name: str) -> None:
    config = MoMEConfig(**small(**NEW[name]).config.to_diff_dict())
    again = MoMEConfig(**json.loads(config.to_json_string()))
    strings = again.part_strings()
    for key, spec in NEW[name].items():
        assert strings[key] == spec
        assert PARTS[key].canonical(spec) == PARTS[key].canonical(getattr(again, key))


def test_expert_choice_of_a_batch_is_that_of_its_samples() -> None:
    model = small(**NEW["expert_choice"])
    both = volume(batch=2)
    seen: list[torch.Tensor] = []
    mixture = model.scale_experts[1].body
    hook = mixture.register_forward_hook(lambda module, given, result: seen.extend((given[0], result[0])))
    with torch.no_grad():
        alone = [model(one, text(model)).logits for one in both.split(1)]
        seen.clear()
        # the convolutions of oneDNN round otherwise for another batch, by about 1e-5 of the logits
        torch.testing.assert_close(model(both, text(model)).logits, torch.cat(alone), rtol=0, atol=1e-3)
        hook.remove()
        given, result = seen
        one_by_one = [mixture(x, MapContext())[0] for x in given.split(1)]
    assert torch.equal(result, torch.cat(one_by_one))


def test_expert_choice_is_what_the_paper_says() -> None:
    torch.manual_seed(0)
    router = ROUTERS.build("own_choice(capacity=1.0)", dim=4, num_experts=3)
    x = torch.randn(2, 2, 3, 2, 4)
    routing = router(x, MapContext())
    want = torch.zeros(2, 12, 3)
    for sample, rows in enumerate(x.reshape(2, 12, 4)):
        scores = (rows @ router.gate.weight.T).softmax(-1)
        for expert in range(3):
            best = sorted(range(12), key=lambda i: -scores[i, expert].item())[:4]
            want[sample, best, expert] = scores[best, expert]
    torch.testing.assert_close(routing.gates_TE(), want.view(24, 3))


@every_new_part
def test_the_origin_matters_to_the_place_router_alone(name: str) -> None:
    model = small(**NEW[name])
    near, far = (logits(model, origin_B3=torch.tensor([[0, 0, at]])) for at in (0, 24))
    assert torch.equal(near, logits(model))
    assert torch.equal(near, far) == ("place" not in str(NEW[name].get("router")))


def test_after_step_changes_the_buffer_and_the_checkpoint_keeps_it(tmp_path: Path) -> None:
    model = small(**NEW["place"]).train()
    routers = [module for module in model.modules() if isinstance(module, throwaway_parts.PlaceRouter)]
    model(volume(), text(model))
    assert len(routers) == 2 and all(not router.bias_E.any() for router in routers)
    model.after_step()
    assert all(router.bias_E.abs().eq(0.5).all() and not router.load_E.any() for router in routers)
    model.eval().save_pretrained(tmp_path)
    again = MoME.from_pretrained(tmp_path).eval()
    assert torch.equal(again.scale_experts[0].body.router.bias_E, routers[0].bias_E)
    assert torch.equal(logits(again), logits(model))


def test_training_calls_after_step_once_per_optimiser_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    after_step = throwaway_parts.PlaceRouter.after_step
    monkeypatch.setattr(throwaway_parts.PlaceRouter, "after_step", lambda self: calls.append(after_step(self)))
    write_cases(tmp_path / "data", 1)
    (tmp_path / "run.yaml").write_text(RECIPE.format(root=tmp_path))
    overrides = ["router=place(rate=0.5)", "train.steps=3", "train.validate_every=0", f"train.out={tmp_path / 'r'}"]
    folder = train(load_run_config(tmp_path / "run.yaml", overrides))
    assert len(calls) == 3  # one scale; two micro-steps make one step
    biases = [module.bias_E for module in MoME.from_pretrained(folder).modules() if hasattr(module, "bias_E")]
    assert len(biases) == 1 and biases[0].any()


def test_the_mixture_inside_the_encoder_reaches_the_auxiliary_loss() -> None:
    model = small(encoder="flat", experts="linear(n=1)").train()
    assert all(expert.body.router is None for expert in model.scale_experts)
    output = model(volume(), text(model), torch.ones(1, 2, 16, 16, 16))
    assert set(output.aux_losses) == {"load_balance", "router_z"} and output.aux_loss > 0
    output.aux_loss.backward()
    assert model.encoder.mixture.router.weight_EC.grad.abs().sum() > 0


def test_pairs_that_make_no_sense_are_refused() -> None:
    for experts in ("own_conv", "own_film"):
        with pytest.raises(InputError, match=f"router 'slot' mixes voxels into slots, but experts '{experts}' read"):
            small(experts=experts, router="slot")
    with pytest.raises(InputError, match="experts 'own_film' read the prompt, which is not known here"):
        small(encoder="flat(layers=moe(experts=own_film))")
    with pytest.raises(InputError, match="slots"):
        small(encoder="flat(layers=moe(experts=own_conv, router=slot))")
    with pytest.raises(InputError, match="the class 'Linear' is no expert: it does not derive from"):
        small(experts=torch.nn.Linear(8, 8))
    conv = EXPERTS.build("own_conv", dim=8)
    with pytest.raises(InputError, match="experts 'object' read whole maps"):
        small(experts=conv, router="slot")


# One router for each form of routing.
FORMS = ("topk(k=1)", "own_choice", "slot")


def _offloaded() -> list[dict[str, object]]:
    """One model for each registered part, and each expert with each form of routing that it can have."""
    reads = {tiny("experts", name): EXPERTS.part_class(name).reads for name in EXPERTS.names()}
    reads |= {"own_film": "prompt", "own_conv": "map"}
    cases: list[dict[str, object]] = [{"experts": e} for e in (*reads, "linear", "mlp(hidden=8)", "identity")]
    cases += [{"experts": e, "router": r} for e in reads for r in (FORMS if reads[e] == "tokens" else FORMS[:2])]
    cases += [{"experts": "mlp(n=2, hidden=8)", "router": "place"}]
    cases += [{"experts": "mlp(n=4, hidden=8)", "router": tiny("router", r)} for r in ROUTERS.names()]
    fusions = ["gate", *(tiny("fusion", f) for f in FUSIONS.names())]
    cases += [{"fusion": f, **head} for f in fusions for head in ({"head": "dynamic(hidden=8)"}, PLAIN)]
    cases += [{"head": tiny("head", h), **(PLAIN if h == "plain" else {})} for h in HEADS.names()]
    return [*cases, {"encoder": "flat"}]


def _case(case: dict[str, object]) -> object:
    return pytest.param(case, id=", ".join(f"{key}={value}" for key, value in case.items()))


@pytest.mark.parametrize("case", [_case(case) for case in _offloaded()])
def test_offloading_changes_no_logits(case: dict[str, object]) -> None:
    model = small(**{"experts": "linear(n=2)", "router": "topk(k=1)", **case})
    if case.get("router") == "label_group":  # it finds the label of a prompt among the rows of the bank
        model.text_bank.set(torch.randn(3, 12))
    want = logits(model)
    assert torch.equal(logits(accelerate.cpu_offload(model)), want)


@pytest.mark.parametrize("head", [{"head": "dynamic(hidden=8)"}, PLAIN], ids=["dynamic", "plain"])
def test_a_fusion_without_a_dot_product_equals_its_literal_form_in_tiles_too(
    head: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small(fusion="gate", **head)
    given, rows = volume(batch=2), text(model)
    with torch.no_grad():
        features = model.encode(given)
        maps = features.scales_BSCDHW.flatten(3)
        layers = [model.fusion.voxel, model.fusion.text, model.fusion.gate]
        (w_v, b_v), (w_t, _), (w_g, b_g) = [(layer.weight, layer.bias) for layer in layers]
        mixture = torch.zeros(2, 2, *maps.shape[2:])
        for b in range(2):
            for p in range(2):
                for f_CV in maps[b]:
                    hidden_FV = F.relu(w_v @ f_CV + b_v[:, None] + (w_t @ rows[p])[:, None])
                    mixture[b, p] += torch.sigmoid(w_g @ hidden_FV + b_g) * f_CV
        want = model.head(mixture, rows, features.bottleneck).unflatten(-1, given.shape[2:])
        torch.testing.assert_close(model(given, rows).logits, want)
    whole = model(given, rows, torch.ones(2, 2, 16, 16, 16))
    whole.loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    monkeypatch.setattr(predict, "_TILE_ELEMENTS", 2 * 2 * 8 * 700)  # six tiles, the last one shorter
    tiled = model(given, rows, torch.ones(2, 2, 16, 16, 16))
    tiled.loss.backward()
    torch.testing.assert_close(tiled.logits, whole.logits)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, grads[name], msg=name)
    torch.testing.assert_close(logits(model, batch=2), want)


@pytest.mark.parametrize("kind", ["tokens", "map"])
def test_a_module_object_can_be_the_expert(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    expert = throwaway_parts.OwnExperts(8) if kind == "tokens" else EXPERTS.build("own_conv", dim=8)
    before = {name: tensor.clone() for name, tensor in expert.state_dict().items()}
    model = small(experts=expert, router="topk(k=1)")
    assert all(torch.equal(tensor, before[name]) for name, tensor in expert.state_dict().items())
    assert all(scale.body.experts is expert for scale in model.scale_experts)  # one module for every scale
    with torch.no_grad():  # as training would; the hash stays that of the object as it was given
        for parameter in expert.parameters():
            parameter.add_(0.1)
    first = logits(model)
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())["experts"]
    assert stored["name"] == "object" and stored["class"] == type(expert).__name__ and len(stored["sha256"]) == 16
    torch.manual_seed(1)
    other = throwaway_parts.OwnExperts(8) if kind == "tokens" else EXPERTS.build("own_conv", dim=8)
    again, report = MoME.from_pretrained(tmp_path, experts=other, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(logits(again.eval()), first) and again.scale_experts[1].body.experts is other
    wanted = rf"the expert of this model is a module object of class '{type(expert).__name__}'"
    del expert, model, other, again
    gc.collect()
    with pytest.raises(InputError, match=wanted) as caught:
        MoME.from_pretrained(tmp_path)
    assert "MoME.from_pretrained(…, experts=module)" in str(caught.value)
