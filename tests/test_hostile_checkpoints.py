"""Checkpoints that come from anybody: damaged, incomplete, oversized or malicious ones are refused in words."""

from __future__ import annotations

import json
import random
import resource
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import remove_checksums, small, volume
from transformers import AutoModel

from mome import MoME, MoMEConfig
from mome.cli.main import main
from mome.errors import InputError, OutputError
from mome.processing import MoMEProcessor
from mome.volumes import Grid


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    small().save_pretrained(tmp_path / "model")
    MoMEProcessor().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def change_config(folder: Path, **changes: Any) -> None:
    remove_checksums(folder)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    remove_checksums(folder)
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, {"format": "pt"})


def refused(words: str, load: Callable[[], Any]) -> None:
    with pytest.raises(InputError, match=words) as caught:
        load()
    assert len(str(caught.value).splitlines()) <= 3 and len(str(caught.value)) < 700


# -- weights ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["head.controller.weight", "text_bank.mean_T", "encoder"])
def test_a_missing_tensor_is_refused_unless_asked(folder: Path, name: str) -> None:
    change_weights(folder, lambda tensors: {k: v for k, v in tensors.items() if not k.startswith(name)})
    refused("not in the checkpoint", lambda: MoME.from_pretrained(folder))
    refused("not in the checkpoint", lambda: AutoModel.from_pretrained(folder))
    refused("not in the checkpoint", lambda: MoME.from_pretrained(folder, dtype=torch.bfloat16))
    refused("not in the checkpoint", lambda: MoME.from_pretrained(folder, labels=["spleen"]))
    refused("not in the checkpoint", lambda: MoME.from_pretrained(folder, router="topk(k=1)", dim=8))
    model = MoME.from_pretrained(folder, allow_missing=True)
    assert all(torch.isfinite(tensor).all() for tensor in model.state_dict().values())


def test_an_override_excuses_only_what_it_changes(folder: Path) -> None:
    change_weights(folder, lambda tensors: {k: v for k, v in tensors.items() if "experts.0.body.experts" not in k})
    refused("not in the checkpoint", lambda: MoME.from_pretrained(folder, head_channels=4))
    assert MoME.from_pretrained(folder, experts="mlp(n=2, hidden=8)").config.experts["name"] == "mlp"


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.uint8, torch.bool])
def test_integers_and_booleans_are_no_weights(folder: Path, dtype: torch.dtype) -> None:
    change_weights(folder, lambda tensors: {k: v.to(dtype) if "proj_in" in k else v for k, v in tensors.items()})
    refused("hold integers or booleans", lambda: MoME.from_pretrained(folder))
    refused("hold integers or booleans", lambda: MoME.from_pretrained(folder, allow_missing=True))


def test_another_shape_is_refused_unless_asked(folder: Path) -> None:
    change_weights(folder, lambda tensors: {**tensors, "head.text.weight": torch.zeros(3, 3)})
    refused("another architecture", lambda: MoME.from_pretrained(folder))
    refused("another architecture", lambda: MoME.from_pretrained(folder, experts="linear(n=2)"))
    assert torch.isfinite(MoME.from_pretrained(folder, ignore_mismatched_sizes=True).head.text.weight).all()


def test_the_command_line_refuses_an_incomplete_checkpoint(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change_weights(folder, lambda tensors: {k: v for k, v in tensors.items() if k != "fusion.scores.bias_S"})
    assert main(["info", str(folder)]) == 2
    assert "1 of" in (error := capsys.readouterr().err) and "fusion.scores.bias_S" in error


def shard(folder: Path, first: str) -> None:
    """Splits the weights in two files; the first gets a name of the test's choice."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    files = {first: names[:5], "model-00002-of-00002.safetensors": names[5:]}
    for file, held in files.items():
        save_file({name: tensors[name] for name in held}, folder / file, {"format": "pt"})
    weight_map = {name: file for file, held in files.items() for name in held}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_shards_are_read_from_the_own_folder_only(folder: Path) -> None:
    whole = MoME.from_pretrained(folder).state_dict()
    shard(folder, "model-00001-of-00002.safetensors")
    assert all(torch.equal(tensor, whole[name]) for name, tensor in MoME.from_pretrained(folder).state_dict().items())
    (folder / "model-00001-of-00002.safetensors").unlink()
    refused("which is not there", lambda: MoME.from_pretrained(folder))


@pytest.mark.parametrize("name", ["../other.safetensors", "{outside}/other.safetensors", "sub/../../other.safetensors"])
def test_an_index_that_leaves_the_folder_is_refused(folder: Path, name: str) -> None:
    (folder / "sub").mkdir()
    shard(folder, name.format(outside=folder.parent))
    for load in (MoME.from_pretrained, AutoModel.from_pretrained):
        refused("checkpoint's own folder", lambda load=load: load(folder))


@pytest.mark.parametrize("content", ["[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', "{", "[" * 10**5])
def test_a_damaged_index_is_refused(folder: Path, content: str) -> None:
    shard(folder, "model-00001-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(content)
    refused("model.safetensors.index.json", lambda: MoME.from_pretrained(folder))


def test_pickled_weights_are_not_read(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    refused("model.safetensors", lambda: MoME.from_pretrained(folder))


def test_an_adapter_inside_the_folder_is_refused(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "../elsewhere"}')
    refused("an adapter of PEFT", lambda: MoME.from_pretrained(folder))


# -- config.json -----------------------------------------------------------------------------------------------


def test_keys_that_choose_code_are_dropped(folder: Path) -> None:
    names = ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation")
    hostile = {name: "org/kernel" for name in names}
    hostile |= {"_attn_implementation_internal": "org/kernel", "_name_or_path": "org/else", "__class__": "x"}
    hostile |= {"auto_map": {"AutoModel": "org/else--evil.Evil"}, "num_labels": 10**9, "id2label": {"a": "b"}}
    hostile |= {"_commit_hash": "x", "_keep_in_fp32_modules": ["encoder"], "is_encoder_decoder": True}
    change_config(folder, **hostile)
    for model in (MoME.from_pretrained(folder), AutoModel.from_pretrained(folder)):
        assert "org/" not in json.dumps(model.config.to_dict()) + str(model.config.__dict__).replace(str(folder), "")
        assert model.config.num_labels == 2 and not model.config.is_encoder_decoder
    assert MoMEConfig.from_pretrained(folder).dim == 8


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"quantization_config": {"quant_method": "torchao"}}, "quantization_config"),
        ({"transformers_weights": "../x.safetensors"}, "has no 'transformers_weights'"),
        ({"fusion_config": {}}, "has no 'fusion_config'"),
        ({"dtype": "load"}, "dtype is one of float32"),
        ({"torch_dtype": ["float32"]}, "torch_dtype is one of"),
        ({"\x1b[31m" + "k" * 10**5: 1}, "has no"),
    ],
)
def test_keys_that_are_not_ours_are_refused(folder: Path, changes: dict[str, Any], words: str) -> None:
    change_config(folder, **changes)
    for load in (MoME.from_pretrained, MoMEConfig.from_pretrained, AutoModel.from_pretrained):
        refused(words, lambda load=load: load(folder))


UNET = {"name": "unet", "channels": [8, 8, 16]}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"encoder": {**UNET, "depth": 10**9}}, r"encoder.depth is 1,000,000,000, the limit is 1,048,576"),
        ({"encoder": {**UNET, "depth": 10**6}}, "more than 20,000 layers"),
        ({"encoder": {**UNET, "channels": [8] * 10**5}}, "encoder.channels has 100,000 entries, the limit is 64"),
        ({"encoder": {**UNET, "channels": [8, 10**6, 10**6]}}, "parameters, the limit is 20,000,000,000"),
        ({"experts": {"name": "swiglu", "n": 10**6, "hidden": 10**6}}, "the limit is|can hold"),
        ({"experts": {"name": "linear", "n": 10**30}}, "experts.n is 1,000,000"),
        ({"dim": 10**9}, "dim is 1,000,000,000, the limit"),
        ({"dim": 10**6}, "parameters, the limit"),
        ({"head_channels": 10**6}, "parameters, the limit"),
        ({"in_channels": 10**9}, "in_channels is 1,000,000,000"),
        ({"text_dim": 10**9}, "text_dim is 1,000,000,000"),
        ({"patch_size": [1024, 1024, 1024]}, r"is 1,073,741,824 voxels, the limit is 134,217,728"),
        ({"patch_size": [10**9, 4, 4]}, "voxels, the limit"),
        ({"patch_size": [512, 512, 512], "head_channels": 512}, "GiB"),
    ],
)
def test_sizes_are_refused_before_anything_is_allocated(folder: Path, changes: dict[str, Any], words: str) -> None:
    change_config(folder, **changes)
    with address_space(8 * 2**30):
        refused(words, lambda: MoME.from_pretrained(folder))
        refused(words, lambda: MoME(MoMEConfig.from_pretrained(folder)))


@contextmanager
def address_space(more: int) -> Iterator[None]:
    """Lets this process map at most `more` bytes beside what it has, so that a large allocation fails at once."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + more, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


JSON_OF_ANOTHER_KIND = [
    "[]",
    "3",
    "null",
    '"mome"',
    "{",
    "",
    "[" * 10**5,
    '{"a":' * 10**5,
    '{"a":' * 200 + "1" + "}" * 200,
]


@pytest.mark.parametrize("content", JSON_OF_ANOTHER_KIND, ids=range(len(JSON_OF_ANOTHER_KIND)))
def test_json_of_another_type_or_depth(folder: Path, content: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = (folder / "config.json").read_text()
    (folder / "config.json").write_text(content)
    refused("config.json", lambda: MoME.from_pretrained(folder))
    assert main(["info", str(folder)]) == 2
    (folder / "config.json").write_text(before)
    (folder / "preprocessor_config.json").write_text(content)
    refused("preprocessor_config.json", lambda: MoMEProcessor.from_pretrained(folder))
    assert main(["info", str(folder)]) == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"spacing": [[1], [1], [1]]}, "three positive numbers"),
        ({"spacing": "1,1,1"}, "three positive numbers"),
        ({"hu_window": None}, "low < high"),
        ({"orientation": {"a": 1}}, "three letters"),
        ({"padding_hu": 1e400}, "a number of HU"),
        ({"spacng": [1, 1, 1]}, "no setting 'spacng'"),
    ],
)
def test_processor_settings_of_a_file_are_checked(folder: Path, content: dict[str, Any], words: str) -> None:
    (folder / "preprocessor_config.json").write_text(json.dumps(content))
    refused(words, lambda: MoMEProcessor.from_pretrained(folder))


def test_a_processor_file_sets_nothing_but_settings(folder: Path) -> None:
    hostile = {"spacing": [2, 2, 2], "__class__": "x", "_auto_class": "y", "auto_map": {"AutoProcessor": "org/x--y.Z"}}
    (folder / "preprocessor_config.json").write_text(json.dumps(hostile))
    processor = MoMEProcessor.from_pretrained(folder)
    assert processor.spacing == [2.0, 2.0, 2.0] and "org/" not in str(processor.to_dict())


def test_a_network_grid_of_too_many_voxels_is_refused() -> None:
    grid = Grid((60, 60, 60), torch.diag(torch.tensor([4.0, 4, 4, 1])).numpy())
    refused("voxels.* the limit is", lambda: MoMEProcessor(spacing=[0.05] * 3).network_grid(grid))


# -- saving ----------------------------------------------------------------------------------------------------


def test_weights_have_the_permissions_of_their_neighbours(folder: Path) -> None:
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    assert len(set(modes.values())) == 1, modes


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """No file of this process may grow beyond `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [100, 20_000])
def test_a_full_disk_is_named_and_the_old_model_kept(folder: Path, size: int) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    other = small(dim=16)
    with full_disk(size), pytest.raises(OutputError, match="the model could not be written") as caught:
        other.save_pretrained(folder)
    assert str(folder) in str(caught.value) and "free some disk space" in str(caught.value)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_weights_of_an_earlier_model_do_not_stay(folder: Path) -> None:
    other = small(dim=16)
    other.save_pretrained(folder, max_shard_size="20KB")
    assert (folder / "model.safetensors.index.json").exists() and not (folder / "model.safetensors").exists()
    assert MoME.from_pretrained(folder).config.dim == 16
    small().save_pretrained(folder)
    assert not list(folder.glob("model-*")) and not (folder / "model.safetensors.index.json").exists()
    text = torch.ones(1, 12)
    with torch.no_grad():
        assert torch.equal(MoME.from_pretrained(folder).eval()(volume(), text).logits, small()(volume(), text).logits)


def test_a_model_larger_than_the_memory_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mome.model_size.os.sysconf", lambda name: 100)
    for build in (lambda: MoME.from_pretrained(folder), small):
        refused("parameters need .* GiB, the machine has 0.0", build)


# -- chance ----------------------------------------------------------------------------------------------------

STRANGE = [
    None, True, 0, -1, 2**31, 10**40, 0.5, 1e308, float("nan"), float("inf"), "", "unet", "../x", "a" * 300, [], [1],
    [[]], ["x"], {}, {"name": "unet"}, {"name": 5}, {"a": {"b": {}}}, [10**9] * 3, {"name": "object", "sha256": "x"},
    "swiglu(n=", "hf(model='../../x')",
]  # fmt: skip


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container inside a JSON value with every key or index of it."""
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from places(value[key])


@pytest.mark.wide
@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json"])
def test_changed_files_load_or_are_refused(folder: Path, name: str) -> None:
    before, draw = (folder / name).read_text(), random.Random(0)
    load: Callable[[Path], Any] = MoME.from_pretrained if name == "config.json" else MoMEProcessor.from_pretrained
    for _ in range(150):
        changed = json.loads(before)
        container, key = draw.choice(list(places(changed)))
        container[key] = draw.choice(STRANGE)
        (folder / name).write_text(json.dumps(changed))
        try:
            load(folder)
        except InputError as error:
            assert len(str(error).splitlines()) <= 3 and len(str(error)) < 1000, error


@pytest.mark.wide
def test_changed_weight_files_load_or_are_refused(folder: Path) -> None:
    path, draw = folder / "model.safetensors", random.Random(0)
    before = path.read_bytes()
    header = 8 + int.from_bytes(before[:8], "little")
    for _ in range(150):
        changed = bytearray(before)
        for _ in range(draw.choice([1, 3])):
            changed[draw.randrange(header)] = draw.choice([0, 34, 48, 57, 91, 123, 125, 255, draw.randrange(256)])
        path.write_bytes(changed)
        try:
            MoME.from_pretrained(folder)
        except InputError as error:
            assert len(str(error).splitlines()) <= 3 and len(str(error)) < 1000, error


def test_a_processor_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "mome"}')
    (tmp_path / "preprocessor_config.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(InputError, match="is no UTF-8"):
        MoMEProcessor.from_pretrained(tmp_path)
