"""Training configurations: YAML files, overrides, and what is wrong with them."""

from __future__ import annotations

from pathlib import Path

import pytest
from training_runs import RECIPE, REPOSITORY

from mome.cli.parser import Parser
from mome.cli.train import add_arguments, main
from mome.errors import InputError
from mome.training.config import RunConfig
from mome.training.config_file import load_run_config
from mome.training.setup import build_model


def test_overrides(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("labels: [liver]\ntrain: {samples: 10}\nmodel: {experts: 'mlp(n=2)'}\n")
    run = load_run_config(
        path, ["experts=swiglu(n=8)", "experts.hidden=12", "train.steps=100", "train.learning_rate=1e-3"]
    )
    assert run.model["experts"] == {"name": "swiglu", "n": 8, "hidden": 12}
    assert run.train.steps == 100 and run.train.learning_rate == 1e-3 and run.train.samples == 10

    no = load_run_config(path, ["train.mixed_precision=no", "train.channels_last=true"]).train
    assert no.mixed_precision == "no" and no.channels_last is True


@pytest.mark.parametrize("number", ["1e-3", "1E-3", "1.e-3", "1.0e-3", ".1e-2", "+10e-4", "0.001"])
def test_numbers_with_an_exponent_are_floats(tmp_path: Path, number: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"train: {{learning_rate: {number}, steps: 10}}\n")
    for overrides in ([], [f"train.learning_rate={number}"]):
        settings = load_run_config(path, overrides).train
        assert settings.learning_rate == 1e-3 and settings.steps == 10


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.stepz=1", "the configuration has no argument 'train.stepz', did you mean 'steps'"),
        ("train.steps=many", "argument 'train.steps' is int or None, got 'many'"),
        ("train.batch_size=a", "argument 'train.batch_size' is int, got 'a'"),
        ("train.learning_rate='1e-3'", "argument 'train.learning_rate' is float, got '1e-3'"),
        ("train.channels_last=no", "argument 'train.channels_last' is bool, got 'no'"),
        ("train=5", "argument 'train' is a mapping of keys to values, got 5"),
        ("nonsense", "written key=value"),
        ("labels=liver", "argument 'labels' is a list of str, got 'liver'"),
        ("sources=[{kindd: x}]", r"has no argument 'sources\[0\].kindd', did you mean 'kind'"),
        ("train.batch_size=0", "train.batch_size is at least 1, got 0"),
        ("train.threads=-1", "train.threads is at least 0"),
        ("train.mixed_precision=bf17", "one of no, bf16, fp16, got 'bf17'"),
        ("train.ema=1.5", "train.ema is from 0 to 1"),
        ("train.ema=1", "train.ema is from 0 to 1, without 1 itself"),
        ("train.learning_rate=0", "train.learning_rate is above 0"),
    ],
)
def test_bad_overrides(tmp_path: Path, override: str, words: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("labels: [liver]\n")
    with pytest.raises(InputError, match=words) as caught:
        load_run_config(path, [override])
    assert len(str(caught.value).splitlines()) <= 3


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("exprts=mlp", "no argument 'exprts', did you mean 'experts'"),
        ("expert.n=2", "no argument 'expert', did you mean 'experts'"),
        ("learning_rate=0.1", "no argument 'learning_rate', did you mean 'train.learning_rate'"),
        ("learning_rat=0.1", "no argument 'learning_rat', did you mean 'train.learning_rate'"),
        ("train.stepz=1", "no argument 'train.stepz', did you mean 'steps'"),
        ("train.batch_size=0", "train.batch_size is at least 1"),
    ],
)
def test_a_wrong_override_is_named(tmp_path: Path, override: str, words: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("labels: [liver]\n")
    for overrides in ([override], ["train.seed=3", override, "dim=8"]):
        with pytest.raises(InputError, match=words) as caught:
            load_run_config(path, overrides)
        assert caught.value.where == f"the override '{override}'"
    path.write_text("labels: [liver]\ntrain: {stepz: 1}\n")  # what the file itself holds is looked for there
    with pytest.raises(InputError, match="no argument 'train.stepz'") as caught:
        load_run_config(path, ["train.seed=3"])
    assert caught.value.where == str(path)


def test_bad_configuration_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such training configuration"):
        load_run_config(tmp_path / "none.yaml", [])
    (tmp_path / "bad.yaml").write_text("a: [1\n")
    with pytest.raises(InputError, match="not valid YAML"):
        load_run_config(tmp_path / "bad.yaml", [])
    (tmp_path / "bad.yaml").write_text("preset: mome_ct_tiny\nmodel: [\n  patch_size: 5\nlabels: [liver]\n")
    with pytest.raises(InputError, match="line 4, column 7") as caught:
        load_run_config(tmp_path / "bad.yaml", [])
    assert "expected ',' or ']'" in caught.value.what
    (tmp_path / "bad.yaml").write_text("train:\n\tsteps: 4\n")
    with pytest.raises(InputError, match="line 2, column 1"):
        load_run_config(tmp_path / "bad.yaml", [])


def test_a_label_that_is_named_twice_is_refused() -> None:
    with pytest.raises(InputError, match="the label 'mandible' twice"):
        build_model(RunConfig(labels=("mandible", "larynx", "mandible")))


@pytest.mark.parametrize(
    ("source", "setting"),
    [
        ("{kind: cases, folder: a, unknown: [liver]}", "unknown"),
        ("{folder: a, seed: 1}", "seed"),
        ("{kind: cached, folder: a, part: val}", "part"),
        ("{kind: cached, folder: a, count: 2}", "count"),
        ("{kind: phantom, count: 1, real: 0.2}", "real"),
        ("{kind: synthetic, label_map: a, dataset: amos, count: 1, held_out: 0.3}", "held_out"),
    ],
)
def test_a_setting_that_a_source_does_not_read_is_refused(tmp_path: Path, source: str, setting: str) -> None:
    """With `unknown`, structures that nobody annotated would be trained as background all the same."""
    recipe = tmp_path / "run.yaml"
    recipe.write_text(f"sources: [{source}]")
    with pytest.raises(InputError, match=f"does not read '{setting}'") as caught:
        load_run_config(recipe, [])
    assert len(str(caught.value).splitlines()) == 3


def test_folders_of_results_are_expanded_like_those_of_sources(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SCRATCH", "/scratch")
    recipe = tmp_path / "run.yaml"
    recipe.write_text("cache: ${SCRATCH}/cache\ntrain: {out: runs/a}\n")
    run = load_run_config(recipe, ["train.out=~/runs/b"])
    assert run.cache == "/scratch/cache" and run.train.out == f"{tmp_path}/runs/b"
    assert load_run_config(recipe, []).train.out == "runs/a"


def test_patience_without_validations_is_refused(tmp_path: Path) -> None:
    recipe = tmp_path / "run.yaml"
    recipe.write_text("train: {patience: 3}")
    with pytest.raises(InputError, match=r"train.patience counts validations, and train.validate_every is 0"):
        load_run_config(recipe, [])
    assert load_run_config(recipe, ["train.validate_every=100"]).train.patience == 3


def test_the_shipped_recipes_are_valid() -> None:
    for recipe in (REPOSITORY / "examples" / "configs").glob("*.yaml"):
        assert load_run_config(recipe, []).sources


def test_the_shipped_recipe_is_valid() -> None:
    run = load_run_config(REPOSITORY / "examples/configs/mome_ct_tiny.yaml", ["experts=swiglu(n=8)"])
    assert run.preset == "mome_ct_tiny" and len(run.labels) == 7


def test_overrides_stand_on_both_sides_of_an_option(tmp_path: Path) -> None:
    parser = Parser(prog="train.py")
    add_arguments(parser)
    args = parser.parse_intermixed_args(["a=1", "--config", "c.yaml", "b=2"])
    assert args.overrides == ["a=1", "b=2"]


def test_a_mistyped_override_ends_with_code_2(tmp_path: Path, capsys) -> None:
    recipe = tmp_path / "run.yaml"
    recipe.write_text(RECIPE.format(root=tmp_path))
    assert main(["--config", str(recipe), "train.stepz=1"]) == 2
    printed = capsys.readouterr().err
    assert len(printed.strip().splitlines()) <= 3 and "did you mean" in printed


@pytest.mark.parametrize(
    "text", ["train: {steps: 5}\nlabels: [liver]\ntrain: {seed: 1}\n", "sources: [{count: 1, count: 2}]\n"]
)
def test_a_key_that_stands_twice_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match="the key '(train|count)' twice"):
        load_run_config(path, [])
