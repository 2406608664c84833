"""From a folder of cases to a planned training: fingerprint, plan, split, configuration and caches."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from test_data_layouts import liver_map, nnunet, save, scan

from mome.cli.main import main
from mome.data.fingerprint import CaseFingerprint, Fingerprint, fingerprint
from mome.data.layouts import open_cases
from mome.data.plan import make_plan
from mome.data.splits import part_of
from mome.errors import InputError
from mome.training.config_file import load_run_config


def drawn(spacing=(0.8, 0.8, 3.0), extent=(400.0, 400.0, 450.0), hu=(-50.0, 150.0)) -> Fingerprint:
    values = tuple(np.linspace(*hu, 1000).tolist())
    return Fingerprint(tuple(CaseFingerprint(f"c{i}", spacing, extent, {"liver": 1.0}, values) for i in range(3)))


def test_fingerprint_follows_the_patient_axes_and_names_broken_cases(tmp_path: Path) -> None:
    folder = nnunet(tmp_path, {"a": liver_map(), "b": liver_map(), "c": liver_map()[:-1]})
    turned = np.zeros((4, 4))
    turned[1, 0], turned[0, 1], turned[2, 2], turned[3, 3] = 3.0, 3.0, 4.0, 1.0  # the first axis runs to anterior
    save(folder / "imagesTr" / "b_0000.nii.gz", np.swapaxes(scan(1), 0, 1), turned)
    save(folder / "labelsTr" / "b.nii.gz", np.swapaxes(liver_map(), 0, 1), turned)
    found = fingerprint(open_cases(folder, "nnunet", "lits"))
    assert [case.extent for case in found.cases] == [(120.0, 90.0, 80.0)] * 2
    assert found.cases[0].volumes_ml == {"liver": 36.0, "liver_tumor": 0.972} and set(found.problems) == {"c"}
    low, high = found.hu_range()
    assert 0 < low < 40 < high < 80 and found.structures == ["liver", "liver_tumor"]
    assert json.loads(json.dumps(found.summary()))["cases"][1]["spacing"] == [3.0, 3.0, 4.0]


@pytest.mark.parametrize("memory", [2e9, 4e9, 16e9, 80e9])
def test_a_plan_fits_its_memory_and_shows_enough(memory: float) -> None:
    plan = make_plan(drawn(), memory, 2000.0, (16, 16, 16))
    assert plan.step_bytes <= memory and all(side % 16 == 0 for side in plan.patch_size)
    assert all(step <= 6.0 for step in plan.spacing) and plan.hu_window == (-160.0, 240.0)
    field = [side * step for side, step in zip(plan.patch_size, plan.spacing, strict=True)]
    assert min(field) > 0.2 * 400
    larger = make_plan(drawn(), 2 * memory, 2000.0, (16, 16, 16))
    assert np.prod(larger.patch_size) * larger.batch_size >= np.prod(plan.patch_size) * plan.batch_size


def test_a_plan_keeps_thick_slices_and_wide_windows() -> None:
    plan = make_plan(drawn(spacing=(0.8, 0.8, 8.0), hu=(-900.0, 1500.0)), 8e9, 2000.0, (16, 16, 16))
    assert plan.spacing[2] == 8.0 and plan.hu_window[0] < -850 and plan.hu_window[1] > 1400
    with pytest.raises(InputError, match="the smallest patch needs"):
        make_plan(drawn(), 1e8, 2000.0, (16, 16, 16))
    with pytest.raises(InputError, match=r"beside the weights 0\.0 GB are left"):  # less than the weights take
        make_plan(drawn(), -1e8, 2000.0, (16, 16, 16))


def test_a_split_is_by_patient_and_stays_when_cases_are_added(tmp_path: Path) -> None:
    names = [f"p{i}" for i in range(30)]
    cases = open_cases(nnunet(tmp_path, {name: liver_map() for name in names}), "nnunet", "lits")
    val = {case.name for case in part_of(cases, "val", 0.3)}
    train = {case.name for case in part_of(cases, "train", 0.3)}
    assert val | train == set(names) and not val & train and 3 <= len(val) <= 15
    assert {case.name for case in part_of(cases[:20], "val", 0.3)} == val & {case.name for case in cases[:20]}
    assert len(part_of(cases, "all", 0.3)) == 30


def test_three_commands_lead_from_a_folder_to_masks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A few steps teach nothing; the test is that every command takes what the one before it wrote."""
    names = [f"p{i}" for i in range(6)]
    folder = nnunet(tmp_path / "data", {name: liver_map() for name in names}, {"background": 0, "liver": [1, 2]})
    out = tmp_path / "prepared"
    arguments = ["data", "prepare", str(folder), "--layout", "nnunet", "-o", str(out), "--memory", "1500MB"]
    stored = ["--cache-format", "blosc2"] if importlib.util.find_spec("blosc2") else []
    assert main([*arguments, "--held-out", "0.4", "--workers", "2", *stored]) == 0
    assert bool(list((out / "cache").glob("*/*.b2"))) == bool(stored)
    run = load_run_config(out / "run.yaml", [])
    assert run.labels == ("liver",) and run.validation and (out / "fingerprint.json").is_file()
    assert len(list((out / "cache").glob("*/index.json"))) == 2
    short = ["train.steps=2", "train.ema=0", "train.tracker=none", "train.threads=1", "bank=trained"]
    assert main(["train", "--config", str(out / "run.yaml"), *short]) == 0
    scans = folder / "imagesTr" / "p0_0000.nii.gz"
    masks = tmp_path / "masks"
    assert main(["segment", str(scans), "-p", "liver", "-m", str(out / "run" / "model"), "-o", str(masks)]) == 0
    assert (masks / "p0_0000_liver.nii.gz").is_file()
    (folder / "imagesTr" / "p3_0000.nii.gz").write_bytes(b"broken")
    capsys.readouterr()
    assert main([*arguments]) == 2
    assert "1 of 6 cases cannot be used; 'p3'" in capsys.readouterr().err
    assert main([*arguments, "--skip-broken"]) == 0
    assert "left out: 1 cases, such as 'p3'" in capsys.readouterr().out
    assert main([*arguments, "--skip-broken", "--json", "-p", "liver", "-p", "liver"]) == 0
    assert load_run_config(out / "run.yaml", []).labels == ("liver",)
    assert json.loads(capsys.readouterr().out)["batch_size"] >= 2
    assert any("p3" in json.loads(path.read_text()) for path in (out / "cache").glob("*/problems.json"))


@pytest.mark.wide
def test_the_expected_memory_is_that_of_a_step() -> None:
    """The growth of the peak from one patch to a larger one, in a process for each, against the estimate."""
    code = (
        "import sys, torch\n"
        "from mome.zoo import create_model\nfrom mome.training.memory import bytes_per_voxel\n"
        "torch.manual_seed(0); torch.set_num_threads(1)\n"
        "model = create_model('mome_ct_tiny', labels=['liver'], text_encoder='bank(width=32)', text_dim=None).train()\n"
        "per_voxel = bytes_per_voxel(model, 4) if sys.argv[1] == '0' else 0\n"
        "side = int(sys.argv[1]) or 32\n"
        "model(torch.zeros(2, 1, side, side, side), torch.zeros(4, 32), torch.zeros(2, 4, side, side, side)).loss"
        ".backward()\n"
        "status = open('/proc/self/status').read().split()\n"  # ru_maxrss would be the parent's where that is larger
        "print(int(status[status.index('VmHWM:') + 1]) * 1024, per_voxel)\n"
    )

    def run(side: int) -> list[float]:
        done = subprocess.run([sys.executable, "-c", code, str(side)], capture_output=True, text=True, check=True)
        return [float(word) for word in done.stdout.split()]

    expected = run(0)[1] * 2 * (80**3 - 48**3)
    grown = run(80)[0] - run(48)[0]
    assert 0.5 < expected / grown < 2.0, (expected, grown)


def test_cases_of_a_test_are_not_trained_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A list that names train and test, and no val, must not make all of its cases training cases."""
    monkeypatch.setattr("mome.training.prepare.bytes_per_voxel", lambda *_: 1000.0)
    splits = {"a": "train", "b": "test", "c": "train"}
    nnunet(tmp_path, {case: liver_map() for case in splits})
    rows = [f"imagesTr/{case}_0000.nii.gz,labelsTr/{case}.nii.gz,{case},{split}" for case, split in splits.items()]
    (tmp_path / "list.csv").write_text("\n".join(["image,labels,case,split", *rows]))
    given = ["data", "prepare", str(tmp_path / "list.csv"), "--layout", "manifest", "--dataset", "lits"]
    given += ["-o", str(tmp_path / "out"), "--memory", "1500MB"]
    assert main([*given, "-p", "pancreas"]) == 2
    assert "no case annotates 'pancreas'" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert main([*given, "-p", "liver"]) == 0 and "no case is held out" in capsys.readouterr().out
    run = load_run_config(tmp_path / "out" / "run.yaml", [])
    assert [source.part for source in run.sources] == ["train"] and not run.validation
    edited = (tmp_path / "out" / "run.yaml").read_text() + "# mine\n"
    (tmp_path / "out" / "run.yaml").write_text(edited)
    assert main([*given, "-p", "liver"]) == 0 and "run.before.yaml" in capsys.readouterr().out
    assert (tmp_path / "out" / "run.before.yaml").read_text() == edited
    assert main([*given, "-p", "liver"]) == 0 and "run.before" not in capsys.readouterr().out
    (tmp_path / "out" / "run.yaml").write_text("# other\n")
    assert main([*given, "-p", "liver"]) == 0 and "run.before.2.yaml" in capsys.readouterr().out
    assert (tmp_path / "out" / "run.before.yaml").read_text() == edited
    (index,) = (tmp_path / "out" / "cache").glob("*/index.json")
    assert [entry["name"] for entry in json.loads(index.read_text())["cases"]] == ["a", "c"]
    (tmp_path / "list.csv").write_text("\n".join(["image,labels,case,split", rows[1]]))
    assert main(given) == 2 and "left for training" in capsys.readouterr().err


def test_a_folder_in_the_layout_of_nnunet_needs_no_options(tmp_path: Path) -> None:
    folder = nnunet(tmp_path / "data", {"p0": liver_map()}, {"background": 0, "liver": [1, 2]})
    assert main(["data", "check", str(folder)]) == 0
    (folder / "dataset.json").unlink()
    assert main(["data", "check", str(folder)]) == 2


def test_values_without_a_name_are_said_when_a_training_is_prepared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their voxels are trained as background."""
    folder = nnunet(tmp_path / "data", {name: liver_map() for name in "abcde"}, {"background": 0, "liver": 1})
    arguments = ["data", "prepare", str(folder), "--memory", "1500MB", "--held-out", "0"]
    assert main([*arguments, "-o", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert said.count("the data set does not name the label values 2") == 3 and "2 more are in fingerprint.json" in said
    assert (tmp_path / "out" / "fingerprint.json").read_text().count("does not name the label values 2") == 5


def test_structures_without_a_voxel_in_any_case_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They are left out of the configuration, or trained on their absence alone: a user would miss them only later."""
    labels = {"background": 0, "liver": [1, 2], "spleen": 3}
    folder = nnunet(tmp_path / "data", {"a": liver_map(), "b": liver_map()}, labels)
    arguments = ["data", "prepare", str(folder), "--layout", "nnunet", "--memory", "1500MB", "--held-out", "0"]
    assert main([*arguments, "-o", str(tmp_path / "all")]) == 0
    said = "annotated, but without a voxel in any training case: spleen; "
    assert said + "run.yaml does not train them" in capsys.readouterr().out
    assert load_run_config(tmp_path / "all" / "run.yaml", []).labels == ("liver",)
    assert main([*arguments, "-o", str(tmp_path / "asked"), "-p", "liver", "-p", "spleen"]) == 0
    assert said + "only their absence is trained" in capsys.readouterr().out
    assert load_run_config(tmp_path / "asked" / "run.yaml", []).labels == ("liver", "spleen")
    assert main([*arguments, "-o", str(tmp_path / "one"), "-p", "liver"]) == 0
    assert "without a voxel" not in capsys.readouterr().out


def test_cases_of_a_test_decide_nothing_of_the_plan(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mome.training.prepare.bytes_per_voxel", lambda *_: 1000.0)
    tumour_only_in_test = {"a": (liver_map() == 1).astype(np.uint8), "b": liver_map()}
    nnunet(tmp_path, tumour_only_in_test)
    path = tmp_path / "imagesTr" / "b_0000.nii.gz"
    bright = nib.load(path)
    nib.save(nib.Nifti1Image((np.asarray(bright.dataobj) + 800).astype(np.int16), bright.affine), path)
    rows = [f"imagesTr/{c}_0000.nii.gz,labelsTr/{c}.nii.gz,{c},{s}" for c, s in (("a", "train"), ("b", "test"))]
    (tmp_path / "list.csv").write_text("\n".join(["image,labels,case,split", *rows]))
    given = ["data", "prepare", str(tmp_path / "list.csv"), "--layout", "manifest", "--dataset", "lits"]
    assert main([*given, "-o", str(tmp_path / "out"), "--memory", "1500MB"]) == 0
    assert "without a voxel in any training case: liver_tumor" in capsys.readouterr().out
    run = load_run_config(tmp_path / "out" / "run.yaml", [])
    assert list(run.labels) == ["liver"] and run.processor["hu_window"][1] < 500
