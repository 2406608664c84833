"""A model on disk and on the Hub: folders, names, ids, overrides, damage, and what is uploaded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from small_models import small
from transformers.utils.hub import PushToHubMixin

from mome import MoME, create_model
from mome.errors import InputError
from mome.hub import locate
from mome.processing import MoMEProcessor


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
    assert config["spec_version"] == 2 and config["auto_map"]["AutoModel"] == "modeling_mome.MoME"
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


@pytest.mark.wide
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


def test_an_unknown_key_of_a_saved_config_is_refused(tmp_path: Path) -> None:
    small().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "residul": False}))
    with pytest.raises(InputError, match="has no 'residul', did you mean 'residual'"):
        MoME.from_pretrained(tmp_path)


def test_a_newer_spec_version_is_refused(tmp_path: Path) -> None:
    small().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["spec_version"] = 99
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="pip install --upgrade mome"):
        MoME.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"expert": "mlp(n=2)"}, "no argument 'expert', did you mean 'experts'"),
        ({"device": "cpu"}, r"(?s)no argument 'device'.*\.to\('cuda'\)"),
    ],
)
def test_an_argument_that_from_pretrained_does_not_have(arguments: dict, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        MoME.from_pretrained("mome-ct-tiny", **arguments)
    assert len(str(caught.value).splitlines()) <= 3


def test_a_folder_that_is_no_model_is_not_looked_for_on_the_hub(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no such folder\n.*a/none"):
        MoME.from_pretrained(Path("a/none"))
    small().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    holds = r"(?s)cannot be loaded.*it holds README.md, config.json.*weights are model.safetensors"
    with pytest.raises(InputError, match=holds):
        MoME.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hepar", "'hepar' is another name for liver"),
        ("kidneys", "'kidneys' is a name for kidney_left, kidney_right"),
    ],
)
def test_labels_have_the_names_of_the_class_table(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        create_model("plain_ct_tiny", labels=["liver", name])
    assert len(str(caught.value).splitlines()) <= 3
    assert list(create_model("plain_ct_tiny", labels=["liver", "my own thing"]).config.labels) == [
        "liver",
        "my own thing",
    ]
