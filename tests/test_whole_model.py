"""Whole segmentation models as experts of the fusion: joined by name, checked when built, saved and trained."""

from __future__ import annotations

import copy
import gc
import importlib.util
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small_models import liver_and_spleen, small, volume
from training_runs import RECIPE, write_cases
from whole_model_helpers import CLASSES, SPACING, Net, model_with, rows, whole

from mome import MoME, WholeModel, segment
from mome.errors import InputError
from mome.experts.exported import exported_model
from mome.experts.whole_mome import whole_mome
from mome.processing import MoMEProcessor
from mome.training.config_file import load_run_config
from mome.training.loop import train

# -- the logits of a class -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", ["logits", "probabilities"])
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_logits_are_those_of_a_class_against_the_rest(activation: str, values: str) -> None:
    """Two maps of one label are its union: probabilities add under softmax, the larger one counts under sigmoid."""
    maps = torch.randn(2, 4, 3, 2, 2, generator=torch.Generator().manual_seed(0)) * 2
    probabilities = maps.softmax(1) if activation == "softmax" else maps.sigmoid()
    given = maps if values == "logits" else probabilities
    expert = whole(lambda x: given, ["background", "liver", "spleen", "liver"], activation=activation, values=values)
    assert expert.names == ("liver", "spleen")
    got = expert(torch.zeros(2, 1, 3, 2, 2))
    for b in range(2):
        for d in range(3):
            p = probabilities[b, :, d, 1, 0].tolist()
            liver = p[1] + p[3] if activation == "softmax" else max(p[1], p[3])
            for index, value in enumerate((liver, p[2])):
                assert got[b, index, d, 1, 0] == pytest.approx(float(np.log(value / (1 - value))), abs=1e-3)


def test_logits_are_cut_off() -> None:
    maps = torch.tensor([200.0, -200.0, 0.0])[None, :, None, None, None].expand(1, 3, 2, 2, 2)
    for activation in ("softmax", "sigmoid"):
        got = whole(lambda x: maps, ["liver", "spleen", "aorta"], activation=activation)(torch.zeros(1, 1, 2, 2, 2))
        assert got[0, :2, 0, 0, 0].tolist() == [10.0, -10.0] and got.isfinite().all()


def test_classes_are_resolved_by_the_class_table() -> None:
    names = ["background", "left kidney", "Kidney_Right", "kidneys", "my lesion", "livver"]
    with pytest.warns(UserWarning, match="class 'kidneys' .* names 2 labels and is joined to none"):
        expert = whole(Net(6), names)
    # a pair is joined to neither side, a name that the table lacks stays as it is, and no typo is corrected
    assert expert.names == ("kidney_left", "kidney_right", "kidneys", "my lesion", "livver")


# -- joining to prompts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fusion", ["text_guided(dim=8)", "text_guided(dim=8, top_k=2)", "gated(dim=8)", "pooled(dim=8)",
               "cross_attention(dim=8)", "uniform", "learned"],
)  # fmt: skip
@pytest.mark.parametrize("head", ["dynamic(hidden=8)", "mask_embedding"])
def test_an_expert_has_a_say_for_its_classes_alone(fusion: str, head: str) -> None:
    """A change of the spleen's map changes the spleen's logits; aorta is no class and never changes."""
    shift = torch.zeros(1, 3, 1, 1, 1)
    expert = whole(lambda x: x * torch.tensor([0.0, 3.0, -3.0])[:, None, None, None] + shift, activation="sigmoid")
    model = model_with(expert, fusion=fusion, head=head)
    text = rows(model)
    assert text[:, -1].tolist() == [1.0, 2.0, 0.0]
    with torch.no_grad():
        before = model(volume(), text).logits
        shift[:, 2] = 1.5
        after = model(volume(), text).logits
        assert torch.equal(before[:, [0, 2]], after[:, [0, 2]])
        assert (before[:, 1] - after[:, 1]).abs().max() > 1e-6
        weights = model.fusion_weights(model.encode(volume()), text)
        assert weights.shape == (1, 3, 3, 16, 16, 16) and not weights[:, 2, 2].any() and weights[:, :2, 2].any()
        alone = model(volume(), text[1:2]).logits
        torch.testing.assert_close(alone, after[:, 1:2])


def test_a_prompt_without_a_class_is_fused_as_if_there_were_no_expert() -> None:
    plain, with_expert = small(), model_with(whole())
    plain.text_bank.set(with_expert.text_bank.rows_LT)
    state = plain.state_dict()
    same = {n: t for n, t in with_expert.state_dict().items() if n in state and t.shape == state[n].shape}
    plain.load_state_dict(same, strict=False)
    with torch.no_grad():
        want = plain(volume(), plain.text_bank.rows(["aorta"])).logits
        got = with_expert(volume(), rows(with_expert, ["aorta"])).logits
    torch.testing.assert_close(got, want)


def test_nan_of_an_expert_stays_with_its_own_classes() -> None:
    network = Net()
    expert = whole(network)
    model = model_with(expert)
    with torch.no_grad():
        wanted = model(volume(), rows(model, ["aorta"])).logits
        network.conv.weight.fill_(float("nan"))
        assert torch.equal(model(volume(), rows(model, ["aorta"])).logits, wanted)
        assert model(volume(), rows(model, ["liver"])).logits.isnan().any()


def test_text_rows_without_class_numbers_are_refused() -> None:
    model = model_with(whole())
    with pytest.raises(InputError, match=r"a text row and a class number of each whole-model expert") as caught:
        model(volume(), model.text_bank.rows(["liver"]))
    assert "model.prompt_rows" in str(caught.value)


def test_a_model_without_extra_experts_is_as_before(tmp_path: Path) -> None:
    model = small()
    text = torch.randn(2, 12)
    assert model.prompt_rows(text, ["liver", "spleen"]) is text
    model.save_pretrained(tmp_path)
    assert "extra_experts" not in json.loads((tmp_path / "config.json").read_text())
    assert not any("extra" in name for name in model.state_dict())


@pytest.mark.parametrize("experts", ["linear", "swiglu(n=2, hidden=8)", "film"])
def test_it_joins_every_form_of_scale_expert(experts: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import throwaway_parts

    throwaway_parts.register(monkeypatch)
    model = model_with(whole(), whole(Net(2, seed=1), ["background", "aorta"]), experts=experts)
    assert rows(model)[:, -2:].tolist() == [[1, 0], [2, 0], [0, 1]]
    with torch.no_grad():
        assert model(volume(batch=2), rows(model)).logits.isfinite().all()


# -- frozen or trained -----------------------------------------------------------------------------------------------


def step(model: MoME) -> None:
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    targets = (torch.rand(2, 3, 16, 16, 16, generator=torch.Generator().manual_seed(3)) > 0.7).float()
    model(volume(batch=2), rows(model), targets).loss.backward()
    optimizer.step()
    model.eval()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("frozen", [True, False])
def test_a_frozen_expert_stays_as_it_is(frozen: bool, checkpointing: bool) -> None:
    network = Net()
    before = copy.deepcopy(network.state_dict())
    model = model_with(whole(network, frozen=frozen))
    if checkpointing:
        model.gradient_checkpointing_enable()
    projection = model.extra_experts[0].project.weight.detach().clone()
    step(model)
    assert not torch.equal(model.extra_experts[0].project.weight, projection)
    unchanged = [torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items()]
    assert all(unchanged) if frozen else not any(unchanged)
    assert not frozen or not network.training
    held = any("network" in name for name in model.state_dict())
    assert held is not frozen


@pytest.mark.parametrize("frozen", [True, False])
def test_save_and_load_is_bit_equal(frozen: bool, tmp_path: Path) -> None:
    network = Net()
    expert = whole(copy.deepcopy(network), frozen=frozen)
    model = model_with(expert)
    step(model)
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())["extra_experts"]
    assert set(stored[0]) == {"name", "class", "sha256", "kind", "classes", "spacing", "frozen"}
    assert any("network" in name for name in load_file(tmp_path / "model.safetensors")) is not frozen
    with torch.no_grad():
        want = model(volume(), rows(model)).logits
        again = MoME.from_pretrained(tmp_path, extra_experts=[whole(network, frozen=frozen)]).eval()
        assert torch.equal(again(volume(), rows(again)).logits, want)


def test_loading_needs_the_same_frozen_expert(tmp_path: Path) -> None:
    expert = whole()
    model = model_with(expert)
    model.save_pretrained(tmp_path)
    for other in (whole(Net(seed=1)), whole(activation="sigmoid"), whole(spacing=[1, 1, 1])):
        with pytest.raises(InputError, match="the fusion was trained with another expert than this module"):
            MoME.from_pretrained(tmp_path, extra_experts=[other])
    with pytest.raises(InputError, match="trained with an expert of classes 'background, liver, Spleen'"):
        MoME.from_pretrained(tmp_path, extra_experts=[whole(classes=["background", "Spleen", "liver"])])
    del expert, model, other
    gc.collect()
    with pytest.raises(InputError, match="whole-model expert of this model is a module object") as caught:
        MoME.from_pretrained(tmp_path)
    assert "extra_experts=[…]" in str(caught.value)


def test_copies_share_a_frozen_network_and_not_a_trained_one() -> None:
    for frozen in (True, False):
        model = model_with(whole(frozen=frozen))
        other = copy.deepcopy(model)
        assert (other.extra_experts[0].expert.network is model.extra_experts[0].expert.network) is frozen
        with torch.no_grad():
            assert torch.equal(other(volume(), rows(other)).logits, model(volume(), rows(model)).logits)


def test_bfloat16_and_autocast() -> None:
    model = model_with(whole())
    with torch.no_grad():
        plain = model(volume(), rows(model)).logits
        with torch.autocast("cpu", torch.bfloat16):
            mixed = model(volume(), rows(model)).logits
        assert (mixed.float() - plain).norm() < 0.02 * plain.norm()
        half = model.bfloat16()
        assert half(volume(), rows(half).float()).logits.isfinite().all()
        assert next(half.extra_experts[0].expert.parameters()).dtype == torch.float32  # a frozen one keeps its type


# -- exported programs, and another MoME ------------------------------------------------------------------------------


def export(path: Path, *, dynamic: bool, side: int = 16) -> Path:
    sizes = {0: torch.export.Dim("b", min=1, max=8)} if dynamic else None
    batch = 2 if dynamic else 1
    program = torch.export.export(Net().eval(), (torch.rand(batch, 1, side, side, side),), dynamic_shapes=(sizes,))
    torch.export.save(program, path)
    return path


@pytest.mark.parametrize("dynamic", [True, False], ids=["any batch", "batch of one"])
def test_an_exported_program_gives_the_maps_of_its_network(dynamic: bool, tmp_path: Path) -> None:
    expert = exported_model(export(tmp_path / "net.pt2", dynamic=dynamic), CLASSES, spacing=SPACING)
    assert expert.kind == "export" and expert.one_by_one is not dynamic
    model, direct = model_with(expert), model_with(whole())
    with torch.no_grad():
        torch.testing.assert_close(expert(volume(batch=2)), direct.extra_experts[0](volume(batch=2)))
    step(model)
    model.save_pretrained(tmp_path / "m")
    again = exported_model(tmp_path / "net.pt2", CLASSES, spacing=SPACING)
    loaded = MoME.from_pretrained(tmp_path / "m", extra_experts=[again]).eval()
    with torch.no_grad():
        assert torch.equal(loaded(volume(), rows(loaded)).logits, model(volume(), rows(model)).logits)


def test_exported_programs_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    other = exported_model(export(tmp_path / "net.pt2", dynamic=False, side=8), CLASSES, spacing=SPACING)
    with pytest.raises(InputError, match=r"takes volumes \(1, 1, 8, 8, 8\), got \(1, 1, 16, 16, 16\)") as caught:
        model_with(other)
    assert "patch_size=[8, 8, 8]" in str(caught.value) and "dynamic_shapes" in str(caught.value)
    with pytest.raises(InputError, match="there is no exported program here"):
        exported_model(tmp_path / "absent.pt2", CLASSES, spacing=SPACING)
    (tmp_path / "text.pt2").write_text("no program")
    with pytest.raises(InputError, match="this is no program of torch.export"):
        exported_model(tmp_path / "text.pt2", CLASSES, spacing=SPACING)
    with pytest.raises(InputError, match="an exported program cannot be trained"):
        exported_model(tmp_path / "net.pt2", CLASSES, spacing=SPACING, frozen=False)


def test_another_mome_is_an_expert() -> None:
    inner = liver_and_spleen()
    inner.processor = MoMEProcessor(spacing=SPACING)
    expert = whole_mome(inner, ["liver", "spleen"])
    model = model_with(expert)
    model.processor = MoMEProcessor(spacing=SPACING)
    with torch.no_grad():
        want = inner(volume(), inner.text_bank.rows(["liver", "spleen"])).logits
        torch.testing.assert_close(expert(volume()), want.clamp(-10, 10))
        assert model(volume(), rows(model)).logits.isfinite().all()
    with pytest.raises(InputError, match="the model's processor makes voxels of 1 × 1 × 1 mm"):
        model.processor = MoMEProcessor(spacing=[1, 1, 1])
    with pytest.raises(InputError, match="this MoME has no processor"):
        whole_mome(liver_and_spleen())


# -- end to end -------------------------------------------------------------------------------------------------------


def test_segment_gives_the_expert_its_say(tmp_path: Path) -> None:
    """The masks of a scan follow the expert for its classes, and are those of the model for the other prompts."""
    strong = {"liver": 0.0}

    def threshold(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([20 * (x - 0.5) + strong["liver"], -20 * (x - 0.5)], dim=1)

    expert = WholeModel(threshold, ["liver", "spleen"], spacing=[2, 2, 2], activation="sigmoid")
    model = model_with(expert)
    model.processor = MoMEProcessor(spacing=[2, 2, 2])
    hu = np.random.default_rng(0).normal(0, 150, (20, 18, 22)).astype(np.int16)
    nib.save(nib.Nifti1Image(hu, np.diag([2.0, 2, 2, 1])), tmp_path / "ct.nii.gz")
    with torch.no_grad():  # a head that writes the first channel of the mixture, and a fusion that hears the expert
        for parameter in model.head.controller.parameters():
            parameter.zero_()
        c, bias = 8, model.head.controller.bias
        bias[0], bias[c * c + c], bias[2 * (c * c + c)], bias[-1] = 1, 1, 1, -1  # relu(x) - 1
        model.extra_experts[0].project.weight.zero_()
        model.extra_experts[0].project.bias.zero_()
        model.extra_experts[0].project.weight[0, 1] = 10  # 10 · (2 p − 1)
        model.fusion.scores.bias_S.copy_(torch.tensor([0.0, 0.0, 50.0]))
    result = segment(tmp_path / "ct.nii.gz", ["liver", "spleen", "aorta"], model)
    bright = hu > 37.5  # the middle of the window from −175 to 250 HU
    liver, spleen = result.masks["liver"], result.masks["spleen"]
    assert (np.asarray(liver, bool) == bright).mean() > 0.9 and (np.asarray(spleen, bool) == ~bright).mean() > 0.9
    aorta = np.asarray(result.masks["aorta"]).copy()
    strong["liver"] = -1000.0
    again = segment(tmp_path / "ct.nii.gz", ["liver", "aorta"], model)
    assert not np.asarray(again.masks["liver"]).any() and (np.asarray(again.masks["aorta"]) == aorta).all()


def test_training_runs_with_it_and_saves_its_projection(tmp_path: Path) -> None:
    expert = WholeModel(Net(2), ["background", "mandible"], spacing=[3.90625, 3.90625, 2.5])
    write_cases(tmp_path / "data", 1)
    (tmp_path / "run.yaml").write_text(RECIPE.format(root=tmp_path))
    run = load_run_config(tmp_path / "run.yaml", ["train.steps=2", "train.validate_every=2", f"train.out={tmp_path}/r"])
    run.model["extra_experts"] = [expert.reference()]
    folder = train(run)
    model = MoME.from_pretrained(folder, extra_experts=[expert])
    fresh = small(extra_experts=[whole(classes=["background", "aorta", "liver"])]).extra_experts[0].project.weight
    assert model.extra_experts[0].project.weight.shape == fresh.shape
    recorded = json.loads((tmp_path / "r/run.json").read_text())["model"]["extra_experts"]
    assert recorded == [expert.reference()]
    run.model["extra_experts"] = [WholeModel(Net(2, seed=3), expert.classes, spacing=expert.spacing).reference()]
    with pytest.raises(InputError, match="started with another 'model.extra_experts'"):
        train(run)


@pytest.mark.wide
def test_the_example_runs_and_keeps_its_networks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = Path(__file__).parents[1] / "examples/whole_model_expert.py"
    monkeypatch.setattr("sys.argv", [file.name, "--out", str(tmp_path), "--steps", "2"])
    spec = importlib.util.spec_from_file_location("whole_model_example", file)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    example.main()
    assert "chest network: step 2 of 2" in capsys.readouterr().out
    first = (tmp_path / "results.json").read_text()
    assert set(json.loads(first)) == {"spinal_cord", "esophagus", "trachea"}
    assert (tmp_path / "trust.png").stat().st_size > 10_000
    example.main()
    assert "chest network: step" not in capsys.readouterr().out and (tmp_path / "results.json").read_text() == first
