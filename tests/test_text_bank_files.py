"""Files of text rows, `bank(file=…)`, and labels that are added to a model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import small, volume
from tiny_text_models import save_tiny

from mome import MoME
from mome.cli.main import main
from mome.embedding import add_labels, embed_labels, labels_of, read_labels
from mome.encoders.text.bank_file import BankFile, read_bank_file, write_bank_file
from mome.errors import InputError
from mome.prompts import embed_prompts, understand
from mome.registry import TEXT_ENCODERS
from mome.training.text_rows import TextRows

LABELS = ["liver", "spleen", "aorta"]


@pytest.fixture(scope="module")
def tower(tmp_path_factory) -> str:
    return f"hf(model={save_tiny('bert', tmp_path_factory.mktemp('tower'))!r}, templates=['a CT of the {{}}', '{{}}'])"


@pytest.fixture(scope="module")
def saved(tower: str, tmp_path_factory) -> str:
    """A checkpoint whose bank holds the tower's rows, and which calls itself trained on the liver."""
    folder = tmp_path_factory.mktemp("model")
    trained(tower).save_pretrained(folder)
    return str(folder)


def trained(tower: str) -> MoME:
    model = small(text_encoder=tower, labels=LABELS, trained_labels=["liver"])
    rows = TEXT_ENCODERS.build(tower).encode(LABELS)
    model.text_bank.set(rows, centre_on=rows)
    return model


def refused(capsys, words: str, *arguments: object) -> None:
    """Runs `mome embed`, which ends with 2 and at most three lines that contain `words`."""
    assert main(["embed", *map(str, arguments)]) == 2, arguments
    printed = capsys.readouterr().err
    assert 1 <= len(printed.strip().splitlines()) <= 3 and "Traceback" not in printed, printed
    assert words in " ".join(printed.split()), printed


# -- labels that are added to a model ---------------------------------------------------------------------------------


def test_added_labels_do_not_touch_other_logits(tower: str) -> None:
    model, x = trained(tower), volume()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        logits = model(x, model.text_bank.rows(LABELS)).logits
        assert add_labels(model, ["adrenal gland left", "thymus", "lesion in the pancreas"]) == [
            "adrenal_gland_left", "thymus", "lesion in the pancreas",
        ]  # fmt: skip
        assert torch.equal(model(x, model.text_bank.rows(LABELS)).logits, logits)
        new = model(x, model.text_bank.rows(["adrenal_gland_left"])).logits
    assert torch.isfinite(new).all()
    after = model.state_dict()
    assert torch.equal(after["text_bank.rows_LT"][:3], before["text_bank.rows_LT"])
    assert all(torch.equal(after[name], before[name]) for name in before if name != "text_bank.rows_LT")
    words = ["adrenal gland left", "thymus", "lesion in the pancreas"]
    torch.testing.assert_close(model.text_bank.rows_LT[3:], TEXT_ENCODERS.build(tower).encode(words))
    assert model.config.labels[:3] == LABELS and model.config.trained_labels == ["liver"]
    prompts = understand(["left adrenal", "lesion in the pancreas"], model)
    assert [p.name for p in prompts] == ["adrenal_gland_left", "lesion in the pancreas"]
    assert all("was not trained on" in p.warning for p in prompts)
    assert torch.equal(embed_prompts(prompts, model), model.text_bank.rows_LT[[3, 5]])


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (["thymus", "liver"], "has the label 'liver' already"),
        (["Liver"], "has the label 'liver' already"),
        (["pancraes"], "close to 'pancreas'"),
        ([""], "empty"),
        ([], "no label to add"),
        (["heart", "qwertz"], "knows nothing of 'qwertz'"),
        (["qwertz"], "has the label 'qwertz' already"),
    ],
)
def test_labels_that_cannot_be_added(tower: str, texts: list[str], words: str) -> None:
    model = trained(tower)
    if texts == ["qwertz"]:
        model.relabel([*LABELS, "qwertz"])
    before = (list(model.config.labels), model.text_bank.rows_LT.clone())
    with pytest.raises(InputError, match=words):
        add_labels(model, texts)
    assert model.config.labels == before[0] and torch.equal(model.text_bank.rows_LT, before[1])


def test_pairs_and_groups_are_several_labels() -> None:
    assert [label.name for label in read_labels(["kidneys", "Kidney_L", "my lesion"])] == [
        "kidney_left", "kidney_right", "my lesion",
    ]  # fmt: skip


def test_rows_of_another_tower_are_refused(tower: str, tmp_path: Path) -> None:
    other = save_tiny("bert", tmp_path / "other", seed=1)
    wide = save_tiny("bert", tmp_path / "wide", hidden=24)
    model = trained(tower)
    with pytest.raises(InputError, match="another row than the model's bank"):
        add_labels(model, ["thymus"], f"hf(model={other!r})")
    with pytest.raises(InputError, match="another row than the model's bank"):
        add_labels(model, ["thymus"], tower.split(", templates")[0] + ")")
    with pytest.raises(InputError, match="rows of width 24, this model reads rows of width 16"):
        add_labels(model, ["thymus"], f"hf(model={wide!r})")
    assert model.config.labels == LABELS


def test_models_without_embeddings_are_refused(tower: str) -> None:
    with pytest.raises(InputError, match="'learned' has a row for every label"):
        add_labels(small(text_encoder="learned"), ["thymus"])
    with pytest.raises(InputError, match="neither a tower nor a file"):
        add_labels(small(), ["thymus"])
    with pytest.raises(InputError, match="train the model first"):
        add_labels(small(text_encoder=tower), ["thymus"])


def test_the_command_adds_labels(capsys, saved: str, tmp_path: Path) -> None:
    out = tmp_path / "new"
    assert main(["embed", saved, "--add", "thymus", "my lesion", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "added thymus, my lesion" in printed and "'thymus' is not in the class table" in printed
    before, after = MoME.from_pretrained(saved), MoME.from_pretrained(out)
    x = volume()
    with torch.no_grad():
        assert torch.equal(
            before(x, before.text_bank.rows(LABELS)).logits, after(x, after.text_bank.rows(LABELS)).logits
        )
    old, new = load_file(Path(saved) / "model.safetensors"), load_file(out / "model.safetensors")
    assert all(torch.equal(old[name], new[name]) for name in old if name != "text_bank.rows_LT")
    assert after.config.labels == [*LABELS, "thymus", "my lesion"] and after.config.trained_labels == ["liver"]
    refused(capsys, "there is a model already", saved, "--add", "heart", "--out", out)
    assert main(["embed", saved, "--add", "heart", "--out", str(out), "--overwrite"]) == 0
    assert MoME.from_pretrained(out).config.labels == [*LABELS, "heart"]


def test_a_half_precision_checkpoint_stays_one(capsys, tower: str, tmp_path: Path) -> None:
    trained(tower).half().save_pretrained(tmp_path / "half")
    assert main(["embed", str(tmp_path / "half"), "--add", "thymus", "-o", str(tmp_path / "new")]) == 0
    old, new = (load_file(tmp_path / name / "model.safetensors") for name in ("half", "new"))
    assert all(torch.equal(old[name].float(), new[name].float()) for name in old if name != "text_bank.rows_LT")
    assert {new[name].dtype for name in new if name.startswith("encoder.")} == {torch.float16}


# -- files of rows ----------------------------------------------------------------------------------------------------


def test_the_command_writes_a_bank_that_needs_no_tower(capsys, tower: str, tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "labels.safetensors"
    arguments = ["embed", "--bank", str(path), "--labels", "openkbp", "--add", "liver", "my lesion"]
    assert main([*arguments, "--text-encoder", tower]) == 0
    assert f"bank(file='{path}', width=16)" in capsys.readouterr().out
    bank = read_bank_file(path)
    assert list(bank.labels) == [*labels_of("openkbp"), "liver", "my lesion"]
    encoder = TEXT_ENCODERS.build(tower)
    assert torch.equal(bank.rows_LT, encoder.encode([name.replace("_", " ") for name in bank.labels]))
    assert bank.tower_sha256 == encoder.fingerprint() and TEXT_ENCODERS.canonical(
        bank.text_encoder
    ) == TEXT_ENCODERS.canonical(tower)
    refused(capsys, "there is a file already", *arguments[1:], "--text-encoder", tower)
    monkeypatch.setattr("mome.encoders.text.hub_tower.HubTower._load", None)  # from here on there is no tower
    stored = TEXT_ENCODERS.build({"name": "bank", "file": str(path), "width": 16})
    assert torch.equal(stored.encode(["my lesion", "parotid gland left"])[1], bank.row("parotid_gland_left"))
    assert not stored.needs_tower and stored.stored_labels() == list(bank.labels)
    assert main([*arguments, "--text-encoder", f"bank(file='{path}', width=16)", "--overwrite"]) == 0
    assert torch.equal(read_bank_file(path).rows_LT, bank.rows_LT)


def test_a_bank_file_adds_labels_without_the_tower(tower: str, tmp_path: Path) -> None:
    path = tmp_path / "labels.safetensors"
    write_bank_file(path, embed_labels(["liver", "thymus", "heart"], tower))
    model = trained(tower)
    spec = f"bank(file={str(path)!r}, width=16)"
    assert add_labels(model, ["thymus"], spec) == ["thymus"]
    assert torch.equal(model.text_bank.rows(["thymus"])[0], read_bank_file(path).row("thymus"))
    with pytest.raises(InputError, match="no row of 'pancreas'"):
        add_labels(model, ["pancreas"], spec)
    write_bank_file(path, embed_labels(["heart", "pancreas"], tower))
    with pytest.raises(InputError, match="nothing shows that the rows belong together"):
        add_labels(trained(tower), ["pancreas"], f"bank(file={str(path)!r}, width=16)")


def test_training_reads_a_bank_file(tower: str, tmp_path: Path) -> None:
    from mome.training.config import RunConfig
    from mome.training.setup import build_model

    path = tmp_path / "labels.safetensors"
    bank = embed_labels(["liver", "thymus", "heart"], tower)
    write_bank_file(path, bank)
    spec = f"bank(file={str(path)!r}, width=16)"
    model, _ = build_model(RunConfig(labels=("heart", "liver"), model={"text_encoder": spec, "dim": 8}))
    assert model.config.labels == ["heart", "liver", "thymus"]
    rows = TextRows(model, ["heart", "liver"], 0.5, seed=0)
    assert torch.equal(rows.at(3), bank.rows_LT[[2, 0]]) and torch.equal(
        model.text_bank.rows_LT, bank.rows_LT[[2, 0, 1]]
    )
    torch.testing.assert_close(model.text_bank.mean_T, bank.rows_LT[[2, 0]].mean(0))
    model.save_pretrained(tmp_path / "model")
    again = MoME.from_pretrained(tmp_path / "model")
    write_bank_file(path, embed_labels(["pancreas", "heart"], tower))  # a trained model holds its rows itself
    for _ in range(2):
        assert torch.equal(embed_prompts(understand(["thymus"], again), again)[0], bank.rows_LT[1])
        with pytest.raises(InputError, match="stores its labels' embeddings only; 'pancreas' is not among them"):
            embed_prompts(understand(["pancreas"], again), again)
        with pytest.raises(InputError, match="neither a tower nor a file that you named"):
            add_labels(again, ["pancreas"])
        path.unlink(missing_ok=True)
    index = {"weight_map": ["model.safetensors"]}
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert read_bank_file(tmp_path / "model").labels == ("heart", "liver", "thymus")


def test_fine_tuning_keeps_added_free_text(tower: str, tmp_path: Path) -> None:
    from mome.training.config import RunConfig
    from mome.training.setup import build_model

    model = trained(tower)
    add_labels(model, ["my lesion"])
    model.save_pretrained(tmp_path)
    tuned, _ = build_model(RunConfig(init=str(tmp_path), labels=("spleen",)))
    assert tuned.config.labels[0] == "spleen" and {"my lesion", "liver", "heart"} <= set(tuned.config.labels)
    assert torch.equal(tuned.text_bank.rows(["my lesion"]), model.text_bank.rows(["my lesion"]))


def test_a_label_that_the_file_lacks_is_refused_before_training(tower: str, tmp_path: Path) -> None:
    path = tmp_path / "labels.safetensors"
    write_bank_file(path, embed_labels(["liver"], tower))
    model = small(text_encoder=f"bank(file={str(path)!r}, width=16)")
    with pytest.raises(InputError, match="no row of 'spleen'"):
        TextRows(model, ["liver", "spleen"], 0.0, seed=0)
    other = small(text_encoder=f"bank(file={str(path)!r}, width=12)")
    with pytest.raises(InputError, match="rows of width 16, this model reads rows of width 12"):
        TextRows(other, ["liver"], 0.0, seed=0)


def test_a_checkpoint_is_a_bank(saved: str, tmp_path: Path) -> None:
    encoder = TEXT_ENCODERS.build({"name": "bank", "file": saved, "width": 16})
    held = MoME.from_pretrained(saved).text_bank.rows_LT
    assert encoder.stored_labels() == LABELS and torch.equal(encoder.encode(["aorta", "liver"]), held[[2, 0]])
    MoME.from_pretrained(saved).save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert (tmp_path / "shards" / "model.safetensors.index.json").exists()
    assert torch.equal(read_bank_file(tmp_path / "shards").rows_LT, held)
    small(text_encoder="learned").save_pretrained(tmp_path / "learned")
    with pytest.raises(InputError, match="only number its labels"):
        read_bank_file(tmp_path / "learned")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "cannot be read"),
        (b"not safetensors", "cannot be read"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "Git LFS"),
        ({"rows_LT": torch.ones(2, 3)}, "is no text bank"),
    ],
)
def test_files_that_are_no_bank(tmp_path: Path, content: bytes | dict, words: str) -> None:
    path = tmp_path / "bank.safetensors"
    path.write_bytes(content) if isinstance(content, bytes) else save_file(content, path)
    with pytest.raises(InputError, match=words) as caught:
        read_bank_file(path)
    assert str(path) in str(caught.value) and len(str(caught.value).splitlines()) <= 3


@pytest.mark.parametrize(
    ("labels", "rows", "words"),
    [
        ('["a"]', torch.ones(2, 3), "1 labels have rows of shape"),
        ('["a", "A"]', torch.ones(2, 3), "stands twice"),
        ('["a", 3]', torch.ones(2, 3), "is damaged"),
        ("{", torch.ones(2, 3), "is damaged"),
        ("[" * 5000, torch.ones(2, 3), "is damaged"),
        ('["a", "b"]', torch.tensor([[1.0, 2.0], [0.0, 0.0]]), "zero or not finite"),
        ('["a", "b"]', torch.tensor([[1.0, 2.0], [torch.nan, 0.0]]), "zero or not finite"),
        ('["a", "b"]', torch.ones(2, 3, dtype=torch.int64), "2 labels have rows"),
        ("[]", torch.ones(0, 3), "holds no label"),
    ],
)
def test_damaged_banks(tmp_path: Path, labels: str, rows: torch.Tensor, words: str) -> None:
    path = tmp_path / "bank.safetensors"
    save_file({"rows_LT": rows}, path, metadata={"format": "mome-text-bank-1", "labels": labels})
    with pytest.raises(InputError, match=words):
        read_bank_file(path)


def test_a_bank_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "bank.safetensors"
    write_bank_file(path, BankFile(("a",), torch.ones(1, 2)))
    before = path.read_bytes()

    def fails(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mome.encoders.text.bank_file.save_file", fails)
    with pytest.raises(OSError, match="could not be written"):
        write_bank_file(path, BankFile(("b",), torch.ones(1, 2)))
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == [path.name]
    with pytest.raises(InputError, match="zero or not finite"):
        write_bank_file(path, BankFile(("a",), torch.zeros(1, 2)))


def test_options_that_do_not_belong_together(capsys, saved: str, tmp_path: Path) -> None:
    out, bank = tmp_path / "out", tmp_path / "b.safetensors"
    encoder = ["--text-encoder", "hf"]
    refused(capsys, "either a model")
    refused(capsys, "either a model", saved, "--bank", bank)
    refused(capsys, "--labels concerns", saved, "--labels", "openkbp", "--add", "x", "-o", out)
    refused(capsys, "needs --add", saved, "-o", out)
    refused(capsys, "needs --out", saved, "--add", "thymus")
    refused(capsys, "--out concerns a model", "--bank", bank, "-o", out, "--labels", "openkbp", *encoder)
    refused(capsys, "needs --text-encoder", "--bank", bank, "--labels", "openkbp")
    refused(capsys, "needs --labels or --add", "--bank", bank, *encoder)
    refused(capsys, "did you mean 'openkbp'?", "--bank", bank, "--labels", "openkb", *encoder)
    refused(capsys, "is a .safetensors file", "--bank", tmp_path / "b.pt", "--labels", "openkbp", *encoder)
    refused(capsys, "is a folder", "--bank", _folder(tmp_path / "d.safetensors"), "--labels", "openkbp", *encoder)
    refused(capsys, "neither a tower nor a file", "--bank", bank, "--add", "liver", "--text-encoder", "bank")
    refused(capsys, "unknown text encoder 'hff'", "--bank", bank, "--add", "liver", "--text-encoder", "hff")
    refused(capsys, "close to 'pancreas'", saved, "--add", "pancraes", "-o", out)
    refused(capsys, "no such folder", tmp_path / "no model", "--add", "thymus", "-o", out)
    (_folder(tmp_path / "mine") / "notes.txt").write_text("mine")
    refused(capsys, "holds other files", saved, "--add", "thymus", "-o", tmp_path / "mine", "--overwrite")
    assert not out.exists() and not bank.exists()


def _folder(path: Path) -> Path:
    path.mkdir()
    return path


# -- rows that are learned --------------------------------------------------------------------------------------------


def test_learned_rows_are_trained_saved_and_follow_their_labels(tmp_path: Path) -> None:
    model = small(text_encoder="learned(dim=5)")
    assert model.config.text_dim == 3 and model.text_bank.learned_TR.shape == (3, 5)
    one_hot = model.text_bank.rows(["spleen"])
    assert torch.equal(one_hot[0], torch.eye(3)[1]) and torch.equal(
        model.text_bank(one_hot), model.text_bank.learned_TR[[1]]
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = model.text_bank.learned_TR.detach().clone()
    model.train()(volume(), one_hot, torch.ones(1, 1, 16, 16, 16)).loss.backward()
    grad = model.text_bank.learned_TR.grad
    assert grad[1].abs().sum() > 0 and grad[[0, 2]].abs().sum() == 0
    optimizer.step()
    assert not torch.equal(model.text_bank.learned_TR[1], before[1]) and torch.equal(
        model.text_bank.learned_TR[[0, 2]], before[[0, 2]]
    )
    model.eval().save_pretrained(tmp_path)
    again = MoME.from_pretrained(tmp_path, labels=["aorta", "spleen"]).eval()
    with torch.no_grad():
        for name in ("aorta", "spleen"):
            assert torch.equal(
                again(volume(), again.text_bank.rows([name])).logits,
                model(volume(), model.text_bank.rows([name])).logits,
            )
    with pytest.raises(InputError, match="stores its labels' embeddings only"):
        embed_prompts(understand(["some lesion"], again), again)


def test_learned_rows_are_averaged_over_the_steps_and_stay_in_float32() -> None:
    from mome.training.weight_average import start_average

    model = small(text_encoder="learned(dim=5)")
    average = start_average(model, 0.75, torch.device("cpu"))
    first = model.text_bank.learned_TR.detach().clone()
    average.update_parameters(model)
    with torch.no_grad():
        model.text_bank.learned_TR.add_(1)
    average.update_parameters(model)
    torch.testing.assert_close(average.module.text_bank.learned_TR, first + 9 / 11)
    assert "text_bank.learned_TR" not in dict(small(text_encoder="learned").named_parameters())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rows = model.text_bank(model.text_bank.rows(["liver"]))
    assert torch.equal(rows, model.text_bank.learned_TR[[0]])


def test_the_bank_file_names_its_fields(tower: str, tmp_path: Path) -> None:
    from safetensors import safe_open

    path = tmp_path / "b.safetensors"
    write_bank_file(path, embed_labels(["liver"], tower))
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["labels"]) == ["liver"] and set(metadata) == {
        "format", "labels", "text_encoder", "tower_sha256",
    }  # fmt: skip
