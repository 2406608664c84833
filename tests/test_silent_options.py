"""Options without effect, outputs of others, empty paths and pointers of Git LFS: all are refused, none is silent."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from small_models import liver_and_spleen

from mome.cli.main import main
from mome.processing import MoMEProcessor

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "4d" * 32 + "\nsize 12345\n"


def ct(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    hu = np.random.default_rng(seed).normal(0, 80, (12, 14, 10)).astype(np.int16)
    nib.save(nib.Nifti1Image(hu, np.diag([4.0, 4, 4, 1])), path)
    return path


def refused(capsys, words: str, *arguments: object, code: int = 2) -> str:
    """Runs a command that ends with `code` in at most three lines which contain `words`."""
    assert main([str(a) for a in arguments]) == code, arguments
    printed = capsys.readouterr().err
    assert 1 <= len(printed.strip().splitlines()) <= 3 and "Traceback" not in printed, printed
    assert words in " ".join(printed.split()), printed
    return printed


def run(capsys, *arguments: object) -> str:
    """Runs a command that succeeds and returns what it printed."""
    assert main([str(a) for a in arguments]) == 0, arguments
    captured = capsys.readouterr()
    return " ".join((captured.out + captured.err).split())


# -- options and paths ------------------------------------------------------------------------------------------------


def test_options_that_change_nothing_are_refused(capsys, model_folder: str, tmp_path: Path) -> None:
    scan, out = ct(tmp_path / "s.nii.gz"), tmp_path / "out"
    base = ["segment", scan, "-p", "liver", "-m", model_folder, "-o", out]
    for option in ("--allow-gaps", "--allow-damaged"):
        refused(capsys, f"{option} concerns DICOM series", *base, option)
    refused(capsys, "--resume keeps what is finished", *base, "--resume", "--overwrite")
    refused(capsys, "--seed concerns the synthetic CT", "demo", scan, "--seed", "2", "-o", out)
    refused(capsys, "--overwrite concerns the file of --out", "evaluate", tmp_path, tmp_path, "--overwrite")
    refused(capsys, "did you mean '--resume'?", *base, "--resum")
    assert not out.exists()


def test_names_of_labels_are_checked_even_where_they_are_not_used(capsys, model_folder: str, tmp_path: Path) -> None:
    masks = tmp_path / "masks"
    run(capsys, "segment", ct(tmp_path / "s.nii.gz"), "-p", "spleen", "-m", model_folder, "-o", masks)
    refused(capsys, "did you mean 'openkbp'?", "evaluate", masks, masks, "--labels", "openkb")


def test_unused_names_of_labels_are_said(caplog, capsys, model_folder: str, tmp_path: Path) -> None:
    masks = tmp_path / "masks"
    run(capsys, "segment", ct(tmp_path / "s.nii.gz"), "-p", "spleen", "-m", model_folder, "-o", masks)
    run(capsys, "evaluate", masks, masks, "--labels", "openkbp")
    assert "the names of 'openkbp' are not used" in caplog.text


@pytest.mark.parametrize("empty", ["", " "])
def test_empty_paths_are_not_this_folder(capsys, monkeypatch, tmp_path: Path, empty: str) -> None:
    ct(tmp_path / "s.nii.gz")
    monkeypatch.chdir(tmp_path)
    for arguments in (
        ("segment", "s.nii.gz", "-p", "liver", "-o", empty),
        ("segment", empty, "-p", "liver", "-o", "out"),
        ("demo", "-o", empty),
        ("demo", empty),
        ("evaluate", empty, "."),
        ("evaluate", ".", empty),
        ("evaluate", ".", ".", "--out", empty),
        ("train", "--config", empty),
        ("info", empty),
        ("list", empty),
    ):
        refused(capsys, "is empty", *arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["s.nii.gz"]


def test_a_folder_is_not_named_like_a_scan(capsys, model_folder: str, tmp_path: Path) -> None:
    scan = ct(tmp_path / "d" / "s.nii.gz")
    for given in (scan, scan.parent):
        for name in ("mask.nii.gz", "MASK.NII", "mask.mha"):
            out = tmp_path / name
            refused(capsys, "give a folder", "segment", given, "-p", "liver", "-m", model_folder, "-o", out)
    refused(capsys, "give a folder", "demo", "-o", tmp_path / "mask.nii.gz")
    (tmp_path / "odd.nii.gz").mkdir()  # a folder that is there already is the user's choice
    run(capsys, "segment", scan, "-p", "liver", "-m", model_folder, "-o", tmp_path / "odd.nii.gz")


def test_pointers_of_git_lfs_are_called_so(capsys, model_folder: str, tmp_path: Path) -> None:
    for name in ("s.nii.gz", "s.nii", "s.mha", "s.nrrd"):
        (tmp_path / name).write_text(POINTER)
        refused(capsys, "git lfs pull", "info", tmp_path / name)
        refused(
            capsys, "git lfs pull", "segment", tmp_path / name, "-p", "liver", "-m", model_folder, "-o", tmp_path / "o"
        )
    for name in ("model.safetensors", "config.json"):
        folder = tmp_path / name
        folder.mkdir()
        for file in Path(model_folder).iterdir():
            (folder / file.name).write_bytes(POINTER.encode() if file.name == name else file.read_bytes())
        refused(capsys, "git lfs pull", "info", folder)


def test_options_and_names_may_alternate(capsys, model_folder: str, tmp_path: Path) -> None:
    a, b = ct(tmp_path / "a.nii.gz"), ct(tmp_path / "b.nii.gz", 1)
    printed = run(capsys, "segment", a, "-p", "spleen", b, "-m", model_folder, "-o", tmp_path / "out")
    assert "b_spleen.nii.gz" in printed
    refused(
        capsys, "no such training configuration", "train", "train.steps=1", "--config", tmp_path / "no.yaml", "dim=8"
    )


def test_a_file_of_a_model_is_no_model(capsys, model_folder: str, tmp_path: Path) -> None:
    scan = ct(tmp_path / "s.nii.gz")
    for name in ("config.json", "model.safetensors"):
        given = f"{model_folder}/{name}"
        refused(capsys, "a model is a folder", "info", given)
        refused(capsys, "a model is a folder", "segment", scan, "-p", "liver", "-m", given, "-o", tmp_path / "o")
    # The folder of a scan holds no model, so it is not suggested.
    refused(capsys, "that mome train or", "segment", scan, "-p", "liver", "-m", scan, "-o", tmp_path / "o")


def test_lists_suggest_kinds_and_names(capsys) -> None:
    refused(capsys, "did you mean 'experts'?", "list", "expert")
    refused(capsys, "did you mean 'labels'?", "list", "lables")
    refused(capsys, "did you mean 'swiglu'?", "list", "experts", "swigluu")


def test_info_says_what_a_checkpoint_knows(capsys, model_folder: str) -> None:
    assert main(["info", model_folder, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["residual"] == "no" and facts["known"] == ["liver", "spleen"] and facts["trained on"] == ["liver"]
    assert "swin" in run(capsys, "info", "mome-ct-base")  # - and _ are the same


# -- outputs that are not ours ----------------------------------------------------------------------------------------


def test_masks_of_another_model_are_not_replaced(capsys, model_folder: str, tmp_path: Path) -> None:
    scan, out, other = ct(tmp_path / "s.nii.gz"), tmp_path / "out", tmp_path / "other"
    base = ["segment", scan, "-p", "spleen", "-o", out]
    printed = run(capsys, *base, "-m", model_folder)
    assert "wrote" in printed and "kept" not in printed
    run(capsys, *base, "-m", model_folder)  # the same run again gives the same masks
    model = liver_and_spleen()
    model.text_bank.rows_LT.add_(1)
    model.save_pretrained(other)
    MoMEProcessor(spacing=[4, 4, 4]).save_pretrained(other)
    before = (out / "s_spleen.nii.gz").read_bytes()
    refused(capsys, "made with another model", *base, "-m", other)
    refused(capsys, "made with another setting", *base, "-m", model_folder, "--overlap", "0.25")
    assert (out / "s_spleen.nii.gz").read_bytes() == before
    run(capsys, *base, "-m", other, "--overwrite")
    printed = run(capsys, *base, "-m", other, "--resume")
    assert "kept" in printed and "wrote" not in printed


def test_a_file_of_scores_is_not_replaced(capsys, model_folder: str, tmp_path: Path) -> None:
    masks, table = tmp_path / "masks", tmp_path / "scores.csv"
    run(capsys, "segment", ct(tmp_path / "s.nii.gz"), "-p", "spleen", "-m", model_folder, "-o", masks)
    table.write_text("mine")
    refused(capsys, "there already", "evaluate", masks, masks, "--out", table)
    assert table.read_text() == "mine"
    run(capsys, "evaluate", masks, masks, "--out", table, "--overwrite")
    assert table.read_text().startswith("case,structure")
    (tmp_path / "d.json").mkdir()
    refused(capsys, "is a folder", "evaluate", masks, masks, "--out", tmp_path / "d.json", "--overwrite")
    refused(capsys, "not a folder", "evaluate", masks, masks, "--out", table / "x.csv")


def test_a_demo_replaces_its_own_files_only(capsys, monkeypatch, model_folder: str, tmp_path: Path) -> None:
    monkeypatch.setattr("mome.cli.demo.MODEL", model_folder)
    scan, out = ct(tmp_path / "s.nii.gz"), tmp_path / "out"
    base = ["demo", scan, "-p", "spleen", "-o", out]
    out.mkdir()
    (out / "s_spleen.nii.gz").write_text("mine")
    refused(capsys, "no demo of this scan wrote it", *base)
    assert (out / "s_spleen.nii.gz").read_text() == "mine" and len(list(out.iterdir())) == 1
    assert "about" in run(capsys, *base, "--overwrite")
    run(capsys, *base)
    refused(capsys, "no demo of this scan wrote it", "demo", ct(tmp_path / "2" / "s.nii.gz", 1), *base[2:])


def test_a_run_does_not_take_the_folder_of_others(tmp_path: Path) -> None:
    from training_runs import write_recipe

    from mome.errors import InputError
    from mome.training.config_file import load_run_config
    from mome.training.loop import train

    config = write_recipe(tmp_path)
    for name, resume in (("model", True), ("checkpoints", True), ("checkpoints", False)):
        out = tmp_path / f"{name}-{resume}"
        (out / name).mkdir(parents=True)
        (out / name / "mine").write_text("mine")
        with pytest.raises(InputError, match="no run.json"):
            train(load_run_config(config, [f"train.out={out}"]), resume=resume)
        assert (out / name / "mine").read_text() == "mine"


def test_an_interrupted_run_says_what_is_saved(capsys, monkeypatch, tmp_path: Path) -> None:
    from training_runs import write_recipe

    out = tmp_path / "out"

    def stopped(run: object, *, resume: bool, profile: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mome.training.loop.train", stopped)
    arguments = ["train", "--config", str(write_recipe(tmp_path)), f"train.out={out}"]
    assert main(arguments) == 130
    assert "nothing was saved yet" in capsys.readouterr().err
    (out / "checkpoints" / "step_00000040").mkdir(parents=True)
    (out / "checkpoints" / "step_00000040" / "state.json").write_text("{}")
    assert main(arguments) == 130
    assert "saved up to step 40" in capsys.readouterr().err
