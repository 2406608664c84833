"""What a new user meets first: plans without a folder, empty options, lists of folders, and lines that are whole."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from dicom_series import along_z, series, write

from mome.cli.main import main
from mome.errors import InputError
from mome.volumes import Grid, read_volume, write_mask
from mome.volumes.dicom.read import read_dicom

LIVER = {"id": 1, "name": "liver", "color": (1, 2, 3)}
POSITIONS = along_z(np.arange(8) * 3.0)


def test_a_plan_needs_no_folder_for_masks(capsys, model_folder: str, scan: Path) -> None:
    before = sorted(scan.parent.iterdir())
    assert main(["segment", str(scan), "-p", "liver", "-m", model_folder, "--plan"]) == 0
    assert "network grid" in capsys.readouterr().out and sorted(scan.parent.iterdir()) == before
    assert main(["segment", str(scan), "-p", "liver", "-m", model_folder]) == 2
    assert "-o out" in capsys.readouterr().err


def test_a_plan_says_how_prompts_are_understood(capsys, model_folder: str, scan: Path, tmp_path: Path) -> None:
    """A typo that is corrected and a structure that was not trained must be known before hours of a cohort."""
    (tmp_path / "b").mkdir()
    for name in ("one", "two"):
        (tmp_path / "b" / f"{name}.nii.gz").write_bytes(scan.read_bytes())
    arguments = ["segment", str(tmp_path / "b"), "-p", "lvier", "-p", "spleen", "-m", model_folder, "--plan"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert printed.count("  warning: 'lvier' is read as 'liver', the closest label") == 1
    assert printed.count("  warning: this model was not trained on 'spleen'") == 1
    assert main([*arguments, "--json"]) == 0
    for plan in json.loads(capsys.readouterr().out)["plans"]:
        assert [(p["name"], p["understood"], p["trained"]) for p in plan["prompts"]] == [
            ("liver", "close", True),
            ("spleen", "exact", False),
        ]
        assert all(p["warning"] for p in plan["prompts"])


def test_a_plan_names_the_model_that_the_prompts_choose(capsys, scan: Path) -> None:
    assert main(["segment", str(scan), "-p", "liver", "--plan"]) == 0
    assert "note: the model is mome-ct-torso-tiny" in capsys.readouterr().out


def test_a_plan_refuses_what_the_writer_would_refuse(capsys, model_folder: str, scan: Path, tmp_path: Path) -> None:
    ready = write(tmp_path / "ready", series(POSITIONS, FrameOfReferenceUID="1.2.3.9"))
    shared = write(tmp_path / "shared", series(POSITIONS, FrameOfReferenceUID="1.2.3.9", SOPInstanceUID="1.2.7"))
    arguments = ["-p", "liver", "-m", model_folder, "--plan", "--writer", "dicom_seg"]
    assert main(["segment", str(ready), *arguments]) == 0
    assert "cannot be segmented" not in capsys.readouterr().out
    for given, words in ((scan, "DICOM"), (shared, "SOPInstanceUID")):
        assert main(["segment", str(given), *arguments]) == 2
        printed = capsys.readouterr().out
        assert "cannot be segmented" in printed and words in printed
        assert main(["segment", str(given), *arguments[:-2]]) == 0
        capsys.readouterr()


def test_a_plan_refuses_what_the_run_would_refuse_at_once(
    capsys, model_folder: str, scan: Path, tmp_path: Path
) -> None:
    command = ["segment", str(scan), "-p", "liver", "-m", model_folder]
    ready = write(tmp_path / "ready", series(POSITIONS, FrameOfReferenceUID="1.2.3.9"))
    mask = scan.with_name(f"{scan.name.split('.')[0]}_liver.nii.gz")
    mask.write_bytes(scan.read_bytes())
    for arguments, words in (
        (["--allow-gaps"], "--allow-gaps concerns DICOM series"),
        ([str(ready), "--multilabel", "--writer", "rtstruct"], "writes no map of ids"),
        ([str(mask), "-o", str(scan.parent)], "a mask would overwrite its scan"),
    ):
        said = []
        for last in (["--plan"], [] if "-o" in arguments else ["-o", str(tmp_path / "out")]):
            assert main([*command, *arguments, *last]) == 2
            said.append(capsys.readouterr().err)
        assert words in said[0] and said[0] == said[1]


@pytest.mark.parametrize("option", ["-m", "--mirror", "--writer", "--memory", "--device", "--series"])
def test_an_empty_option_is_no_default(capsys, scan: Path, tmp_path: Path, option: str) -> None:
    """`-m "$MODEL"` with an unset variable took the default model without a word."""
    assert main(["segment", str(scan), "-p", "liver", "-o", str(tmp_path / "o"), option, " "]) == 2
    printed = capsys.readouterr().err
    assert option in printed and "is empty" in printed and len(printed.strip().splitlines()) <= 3
    assert not (tmp_path / "o").exists()


def test_notes_are_not_broken_where_no_terminal_is(
    capsys, monkeypatch, model_folder: str, scan: Path, tmp_path: Path
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    arguments = ["segment", str(scan), "-p", "liver", "-p", "lien", "-m", model_folder, "-o", str(tmp_path / "o")]
    assert main([*arguments, "--statistics"]) == 0
    lines = capsys.readouterr().err.splitlines()
    warning = next(line for line in lines if "warning:" in line)
    assert len(warning) > 70 and warning.rstrip().endswith("it was trained on liver")
    assert f"  wrote {tmp_path}/o/scan_statistics.json" in lines


def test_a_scan_that_fails_leaves_no_empty_folder(capsys, model_folder: str, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("readme.txt", "no scan")
    out = tmp_path / "o"
    assert main(["segment", str(tmp_path / "a.zip"), "-p", "liver", "-m", model_folder, "-o", str(out)]) == 2
    assert "holds no scan" in capsys.readouterr().err and not out.exists()


def test_a_scan_that_fails_leaves_no_table_without_a_row(capsys, model_folder: str, scan: Path, tmp_path: Path) -> None:
    (tmp_path / "a.nii.gz").write_bytes(scan.read_bytes()[:200])
    out = tmp_path / "o"
    assert (
        main(["segment", str(tmp_path / "a.nii.gz"), "-p", "liver", "-m", model_folder, "-o", str(out), "--statistics"])
        == 2
    )
    assert not out.exists()


def test_info_lists_what_a_folder_holds(capsys, scan: Path, tmp_path: Path) -> None:
    write(tmp_path / "series", series(POSITIONS))
    (tmp_path / "empty.nii.gz").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("no scan")
    with zipfile.ZipFile(tmp_path / "study.zip", "w") as archive:
        archive.writestr("a", "b")
    write_mask(tmp_path / "mask.nii.gz", np.zeros((2, 2, 2), np.uint8), Grid((2, 2, 2), np.eye(4)), labels=[LIVER])
    assert main(["info", str(tmp_path), "--json"]) == 0
    held = {entry.pop("name"): entry for entry in json.loads(capsys.readouterr().out)["scans"]}
    assert held["scan.nii.gz"] == {"kind": "scan", "shape": [12, 14, 10], "spacing (mm)": [4.0, 4.0, 4.0]}
    assert held["mask.nii.gz"]["kind"] == "masks" and "error" in held["empty.nii.gz"]
    assert held["series"] == {"kind": "DICOM folder"} and held["study.zip"] == {"kind": "ZIP archive"}
    assert list(held) == sorted(held) and "notes.txt" not in held
    assert main(["info", str(tmp_path)]) == 0
    assert "scan.nii.gz  scan, 12 × 14 × 10, 4 × 4 × 4 mm" in capsys.readouterr().out.splitlines()


def test_an_empty_folder_is_still_no_model(capsys, tmp_path: Path) -> None:
    assert main(["info", str(tmp_path)]) == 2
    assert "config.json" in capsys.readouterr().err


def test_an_empty_file_is_called_empty(tmp_path: Path) -> None:
    for name in ("a.nii.gz", "a.nrrd", "a.mha"):
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(InputError, match="empty, it has 0 bytes"):
            read_volume(tmp_path / name)


@pytest.mark.parametrize("keyword", ["PhotometricInterpretation", "BitsStored", "PixelRepresentation"])
def test_a_missing_element_is_named(tmp_path: Path, keyword: str) -> None:
    """The pixels were called truncated or damaged."""
    write(tmp_path, series(POSITIONS, **{keyword: None}))
    with pytest.raises(InputError, match=f"has no {keyword}"):
        read_dicom(tmp_path)


def test_help_is_in_groups(capsys) -> None:
    assert main(["segment", "--help"]) == 0
    printed = capsys.readouterr().out
    assert all(heading in printed for heading in ("what is read:", "what is written:", "how the network runs:"))
