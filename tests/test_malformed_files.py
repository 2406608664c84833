"""JSON and YAML of another form than expected: refused in at most three lines, with exit code 2."""

from __future__ import annotations

import json
import time
import tracemalloc
from pathlib import Path

import pytest
from refusals import refused
from training_runs import write_recipe

from mome.cli.main import main
from mome.spec import SpecError, brief, canonical, parse

# -- files of another type, depth or encoding ---------------------------------------------------------------------

BAD_JSON = {
    "a list": b"[]",
    "null": b"null",
    "a text": b'"studies"',
    "a number": b"7",
    "no JSON": b"{",
    "empty": b"",
    "deep": b"[" * 100_000,
    "deep object": b'{"a":' * 100_000,
    "many digits": b'{"a": ' + b"9" * 5000 + b"}",
    "utf-16": '{"studies": []}'.encode("utf-16"),
    "latin-1": '{"studies": "é"}'.encode("latin-1"),
    "another object": b'{"studies": {"a": 1}}',
    "other entries": b'{"studies": [1, "a", null]}',
}


@pytest.mark.parametrize("kind", BAD_JSON)
def test_a_report_of_another_form(capsys, scan: Path, model_folder: str, tmp_path: Path, kind: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "report.json").write_bytes(BAD_JSON[kind])
    arguments = ["segment", scan, "-p", "liver", "-m", model_folder, "-o", out]
    assert "report.json" in refused(capsys, "report here that cannot be read", *arguments)
    assert (out / "report.json").read_bytes() == BAD_JSON[kind] and len(list(out.iterdir())) == 1


def test_a_report_whose_entries_lack_something_is_no_reason_to_skip(
    scan: Path, model_folder: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    arguments = ["segment", str(scan), "-p", "liver", "-m", model_folder, "-o", str(out), "--resume"]
    assert main(arguments) == 0
    whole = json.loads((out / "report.json").read_text())
    for key, value in (
        ("structures", None), ("structures", [1]), ("notes", "a"), ("seconds", None), ("masks", "scan"), ("masks", [3]),
        ("masks", ["../scan.nii.gz"]), ("overlapping_voxels", "many"),
    ):  # fmt: skip
        study = {**whole["studies"][0], key: value}
        (out / "report.json").write_text(json.dumps({"studies": [study]}))
        assert main(arguments) == 0
        assert json.loads((out / "report.json").read_text())["studies"][0]["masks"] == ["scan_liver.nii.gz"]


@pytest.mark.parametrize("kind", [kind for kind in BAD_JSON if kind not in ("another object", "other entries")])
def test_a_case_list_that_is_no_object(capsys, tmp_path: Path, kind: str) -> None:
    recipe = write_recipe(tmp_path)
    (tmp_path / "data" / "cases.json").write_bytes(BAD_JSON[kind])
    assert "cases.json" in refused(capsys, "", "train", "--config", recipe, f"train.out={tmp_path / 'r'}")
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("cases", "words"),
    [
        ({}, "lists no case"),
        ({"c0": []}, "no list 'annotated'"),
        ({"c0": {}}, "no list 'annotated'"),
        ({"c0": {"annotated": "mandible"}}, "no list 'annotated'"),
        ({"c0": {"annotated": {"mandible": 1}}}, "no list 'annotated'"),
        ({"c0": {"annotated": [6]}}, "no list 'annotated'"),
        ({"c0": {"annotated": ["mandible", "mandible"]}}, "lists a structure twice"),
        ({"c0": {"annotated": ["mandibel"]}}, "did you mean 'mandible'"),
        ({"../data/images/c0": {"annotated": ["mandible"]}}, "names are no paths"),
        ({"/etc/passwd": {"annotated": ["mandible"]}}, "names are no paths"),
        ({"": {"annotated": ["mandible"]}}, "names are no paths"),
        ({"c0": {"annotated": []}, "c1": {"annotated": []}}, "no training case annotates one of the labels"),
    ],
)
def test_a_case_list_of_another_form(capsys, tmp_path: Path, cases: dict, words: str) -> None:
    recipe = write_recipe(tmp_path)
    (tmp_path / "data" / "cases.json").write_text(json.dumps(cases))
    refused(capsys, words, "train", "--config", recipe, f"train.out={tmp_path / 'r'}")


def test_a_byte_order_mark_is_no_error(tmp_path: Path) -> None:
    from mome.data.case_folder import CaseFolder
    from mome.training.config_file import load_run_config

    recipe = write_recipe(tmp_path)
    for path in (recipe, tmp_path / "data" / "cases.json"):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert len(load_run_config(recipe, []).labels) == len(CaseFolder(tmp_path / "data", "openkbp")) == 3


BAD_YAML = {
    "utf-16": "labels: [liver]".encode("utf-16"),
    "latin-1": "labels: [é]".encode("latin-1"),
    "a list": b"[liver]",
    "a text": b"labels",
    "a date": b"labels: [liver]\ncache: 2024-01-01",
    "no date": b"cache: 2024-99-99",
    "a set": b"model: !!set {experts}",
    "bytes": b"cache: !!binary aGk=",
    "no integer": b"train: {steps: !!int x}",
    "empty integer": b"train: {steps: !!int ''}",
    "no boolean": b"train: {channels_last: !!bool maybe}",
    "no timestamp": b"cache: !!timestamp x",
    "an object": b"cache: !!python/object/apply:os.system ['true']",
    "a number as key": b"model: {1: 2}",
    "a list as key": b"? [a]\n: b",
    "many digits": b"train: {steps: " + b"9" * 5000 + b"}",
    "a large number": b"train: {steps: 99999999999999999999999}",
    "not a number": b"train: {learning_rate: .nan}",
    "infinity": b"train: {weight_decay: .inf}",
    "a NUL": b'cache: "a\\0b"',
    "deep": b"model: " + b"[" * 3000,
    "deep and closed": b"model: {experts: " + b"[" * 60 + b"]" * 60 + b"}",
    "two documents": b"labels: [liver]\n---\nlabels: [liver]",
    "a control character": b"cache: \x07",
    "an alias inside its anchor": b"model: &a {experts: *a}",
    "empty": b"",
    "huge": b"#" * 3_000_000,
}


@pytest.mark.parametrize("kind", BAD_YAML)
def test_configurations_of_another_form(capsys, tmp_path: Path, kind: str) -> None:
    recipe = tmp_path / "run.yaml"
    recipe.write_bytes(BAD_YAML[kind])
    began = time.process_time()
    refused(capsys, "", "train", "--config", recipe, f"train.out={tmp_path / 'r'}")
    assert time.process_time() - began < 20 and not (tmp_path / "r").exists()


def _bomb(levels: int, key: str, merge: bool = False) -> str:
    lines = ["a0: &a0 {x: 1}" if merge else "a0: &a0 [x, x]"]
    for i in range(1, levels):
        again = ", ".join([f"*a{i - 1}"] * 9)
        lines.append(f"a{i}: &a{i} {{<<: [{again}]}}" if merge else f"a{i}: &a{i} [{again}]")
    return "\n".join([*lines, f"{key}: *a{levels - 1}"])


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("key", ["preset", "loss", "cache", "model", "labels"])
def test_anchor_bombs_are_bounded(capsys, tmp_path: Path, key: str, merge: bool) -> None:
    recipe = tmp_path / "run.yaml"
    recipe.write_text(_bomb(30, key, merge))
    tracemalloc.start()
    try:
        began = time.process_time()
        refused(capsys, "stands for more than", "train", "--config", recipe)
        assert time.process_time() - began < 10 and tracemalloc.get_traced_memory()[1] < 50e6
    finally:
        tracemalloc.stop()


def test_an_alias_by_itself_is_fine(tmp_path: Path) -> None:
    from mome.training.config_file import load_run_config

    recipe = tmp_path / "run.yaml"
    recipe.write_text("labels: [liver]\nsources: &s [{kind: phantom, count: 2}]\nvalidation: *s\n")
    run = load_run_config(recipe, [])
    assert run.sources == run.validation and run.sources[0].count == 2


def test_messages_about_large_values_are_short() -> None:
    shared: list = ["x"]
    for _ in range(60):
        shared = [shared] * 9
    assert len(brief(shared, 80)) == 80
    with pytest.raises(SpecError) as caught:
        canonical(shared)  # type: ignore[arg-type]
    assert len(str(caught.value)) < 200
    with pytest.raises(SpecError, match="64 bits"):
        parse("x(n=99999999999999999999)")
    deep: dict = {"name": "x"}
    for _ in range(5000):
        deep = {"name": "x", "a": deep}
    with pytest.raises(SpecError, match="nests too deeply"):
        canonical(deep)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("router=null", "model.router is null"),
        ("experts=null", "model.experts is null"),
        ("model={name: x}", "no argument 'model.name'"),
        ("model={pretrained: true}", "no argument 'model.pretrained'"),
        ("model={labels: [liver]}", "no argument 'model.labels'"),
        ("model={trust_remote_code: true}", "no argument 'model.trust_remote_code'"),
        ("processor={name: x}", "no argument 'processor.name'"),
        ("processor={spacing: null}", "processor.spacing is null"),
        ("model=[1]", "argument 'model' is a mapping"),
        ("experts={name: 5}", "named by a string or a dict"),
        ("loss=null", "argument 'loss' is"),
        ("loss={name: 5}", "named by a string or a dict"),
        ("loss=[1]", "argument 'loss' is"),
        ("sources=[]", "names no sources"),
        ("sources=[{kind: phantom, count: -1}]", "a source.count is from 0"),
        (
            "sources=[{kind: phantom, count: 1, weight: -1}, {kind: phantom, count: 1, weight: 2}]",
            "a source.weight is from 0",
        ),
        ("labels=[]", "names no labels"),
        ("validation=[]", "there are no validation cases"),
        ("sampling={foreground: 7}", "sampling.foreground is from 0 to 1"),
        ("sampling={jitter: -1}", "sampling.jitter is from 0"),
        ("sampling={beyond: 1.5}", "sampling.beyond is from 0"),
        ("augmentation={noise: -1}", "augmentation.noise is from 0 to 1"),
        ("augmentation={zoom: 5}", "augmentation.zoom is from 0"),
        ("sources=[{kind: phantom, count: 1, seed: -5}]", "a source.seed is from 0"),
        ("train.seed=-1", "train.seed is from 0"),
        ("train.batch_size=999999999", "train.batch_size is from 1"),
        ("cache=''", "cache is the path of a folder"),
        ("cache=/dev/null", "the output folder is not a folder"),
        ("train.threads=100000", "train.threads is at most"),
        ("train.workers=100000", "train.workers is at most"),
        ("train.clip_norm=-1", "train.clip_norm is at least 0"),
        ("a." * 40 + "b=1", "at most 20 keys"),
        ("=1", "written key=value"),
        ("train.steps=[" + "[" * 500, ""),
    ],
)
def test_overrides_of_another_form(capsys, tmp_path: Path, override: str, words: str) -> None:
    recipe = write_recipe(tmp_path)
    refused(capsys, words, "train", "--config", recipe, f"train.out={tmp_path / 'r'}", override)
    assert not list(tmp_path.glob("r/*.json"))
