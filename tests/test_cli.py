"""The command line: messages, exit codes, start-up, and what it writes."""

from __future__ import annotations

import contextlib
import json
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from mome.cli.main import main
from mome.volumes import Grid, write_mask


@pytest.fixture
def offline(monkeypatch) -> None:
    """Forbids requests to the Hub; without a connection their retries take half a minute."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def fails(capsys, code: int, *arguments: object) -> str:
    assert main([str(a) for a in arguments]) == code
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert 1 <= len(lines) <= 3 and "Traceback" not in captured.err, captured.err
    return captured.err


def test_help_and_list_are_light() -> None:
    for arguments in (["--help"], ["list"], ["list", "labels", "kid*"], ["list", "--json"]):
        code = (
            f"import sys; from mome.cli.main import main; code = main({arguments}); "
            "heavy = [m for m in ('torch', 'transformers', 'monai', 'numpy', 'nibabel', 'rich') if m in sys.modules]; "
            "print(code, heavy, file=sys.stderr)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stderr.strip() == "0 []"
        assert done.stdout


def test_serve_says_that_it_has_one_model(capsys) -> None:
    assert main(["serve", "--help"]) == 0
    assert "a model that is served: " in " ".join(capsys.readouterr().out.split())


def test_list_is_json_for_programs(capsys) -> None:
    assert main(["list", "experts", "sw*", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["experts"][0]["name"] == "swiglu"


def test_list_finds_a_plain_word_inside_names(capsys) -> None:
    assert main(["list", "parotid"]) == 0
    assert "parotid_gland_left" in capsys.readouterr().out
    assert main(["list", "swigl"]) == 0
    assert "swiglu" in capsys.readouterr().out


def test_what_is_wrong_is_said_once_for_all_scans(capsys, scan: Path, model_folder: str, tmp_path: Path) -> None:
    other = tmp_path / "other.nii.gz"
    other.write_bytes(scan.read_bytes())
    scans, arguments = [str(scan), str(other)], ["-m", model_folder, "-o", str(tmp_path / "out")]
    assert main(["segment", *scans, "-p", "spleen", *arguments]) == 0
    printed = " ".join(capsys.readouterr().err.split())
    assert printed.count("not trained on 'spleen'") == printed.count("it was trained on") == 1
    assert main(["segment", *scans, "-p", "spleen", "-p", "larynx", *arguments]) == 2  # before any scan is read
    printed = " ".join(capsys.readouterr().err.split())
    assert printed.count("'larynx' is not among them") == 1 and "scans failed" not in printed


def test_notes_on_a_scan_are_said_for_every_scan(capsys, model_folder: str, tmp_path: Path) -> None:
    for name in "ab":
        values = np.random.default_rng(0).random((8, 8, 8)).astype(np.float32)
        nib.save(nib.Nifti1Image(values, np.eye(4)), tmp_path / f"{name}.nii.gz")
    scans = [str(tmp_path / "a.nii.gz"), str(tmp_path / "b.nii.gz")]
    assert main(["segment", *scans, "-p", "liver", "-m", model_folder, "-o", str(tmp_path / "out")]) == 0
    printed = " ".join(capsys.readouterr().err.split())
    assert printed.count("normalised") == 2 and "2 of 2 scans should be looked at" in printed


def test_the_file_that_has_the_reasons_is_named(capsys, scan: Path, model_folder: str, tmp_path: Path) -> None:
    (tmp_path / "broken.nii.gz").write_bytes(b"broken")
    values = np.random.default_rng(0).random((8, 8, 8)).astype(np.float32)
    nib.save(nib.Nifti1Image(values, np.eye(4)), tmp_path / "doubtful.nii.gz")
    arguments = ["-p", "liver", "-m", model_folder, "-o", str(tmp_path / "out")]
    problems = f"{tmp_path}/out/problems.json says why\n"
    assert main(["segment", str(tmp_path), *arguments]) == 2
    assert f"1 of 3 scans failed, 1 of 3 scans should be looked at; {problems}" in capsys.readouterr().err
    assert main(["segment", str(tmp_path / "doubtful.nii.gz"), *arguments, "--json"]) == 0  # stdout is JSON alone
    assert f"the scan and its masks should be looked at; {problems}" in capsys.readouterr().err
    (tmp_path / "out" / "report.json").unlink()
    assert main(["segment", str(scan), *arguments, "--overwrite"]) == 0
    assert "problems.json" not in capsys.readouterr().err and not (tmp_path / "out" / "problems.json").exists()


def test_segment_writes_masks_and_says_what_it_was_not_trained_on(
    capsys, scan: Path, model_folder: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert main(["segment", str(scan), "-p", "liver", "-p", "lien", "-m", model_folder, "-o", str(out)]) == 0
    printed = capsys.readouterr().err
    assert "was not trained on 'spleen'" in " ".join(printed.split()) and "ml" in printed
    assert f"wrote {out}/scan_liver.nii.gz\n" in printed  # a long line is not wrapped
    assert {p.name for p in out.iterdir()} == {"scan_liver.nii.gz", "scan_spleen.nii.gz", "report.json"}
    image = nib.load(out / "scan_liver.nii.gz")
    np.testing.assert_array_equal(image.affine, nib.load(scan).affine)
    assert image.shape == (12, 14, 10)


def test_segment_json_and_multilabel(capsys, scan: Path, model_folder: str, tmp_path: Path) -> None:
    arguments = [
        "segment",
        str(scan),
        "-p",
        "liver",
        "-m",
        model_folder,
        "-o",
        str(tmp_path / "o"),
        "--multilabel",
        "--json",
    ]
    assert main(arguments) == 0
    study = json.loads(capsys.readouterr().out)["studies"][0]
    assert study["masks"] == ["scan.nii.gz"] and study["structures"][0]["trained"] is True


def test_bad_input(capsys, offline, scan: Path, model_folder: str, tmp_path: Path) -> None:
    out, base = tmp_path / "out", ["-m", model_folder, "-o", tmp_path / "out"]
    into = ["segment", scan, "-p", "liver", "-m", model_folder, "-o"]
    truncated = tmp_path / "truncated.nii.gz"
    truncated.write_bytes(scan.read_bytes()[:1500])
    flat, colour = tmp_path / "flat.nii.gz", tmp_path / "colour.nii.gz"
    nib.save(nib.Nifti1Image(np.zeros((8, 8), np.int16), np.eye(4)), flat)
    nib.save(nib.Nifti1Image(np.zeros((4, 4, 4), [("R", "u1"), ("G", "u1"), ("B", "u1")]), np.eye(4)), colour)
    four = tmp_path / "four.nii.gz"
    nib.save(nib.Nifti1Image(np.zeros((8, 8, 8, 2), np.int16), np.eye(4)), four)
    other, before = tmp_path / "other", scan.read_bytes()
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "bert"}')
    cases = [
        ("no such file", "segment", tmp_path / "no.nii.gz", "-p", "liver", *base),
        ("truncated or damaged", "segment", truncated, "-p", "liver", *base),
        ("three dimensions", "segment", flat, "-p", "liver", *base),
        ("colour image", "segment", colour, "-p", "liver", *base),
        ("no prompt was given", "segment", scan, *base),
        ("'???' gives no file name", "segment", scan, "-p", "???", *base),
        ("holds 2 volumes", "segment", four, "-p", "liver", *base),
        ("--frame", "segment", four, "-p", "liver", *base),
        ("frame 5 of 2", "segment", four, "-p", "liver", "--frame", "5", *base),
        ("a mask would overwrite its scan", *into, tmp_path, "--multilabel"),
        ("a prompt is empty", "segment", scan, "-p", " ", *base),
        ("embeddings only", "segment", scan, "-p", "some odd lesion", *base),
        ("not of mome", "segment", scan, "-p", "liver", "-m", other, "-o", out),
        ("'org/missing' cannot be loaded", "segment", scan, "-p", "liver", "-m", "org/missing", "-o", out),
        ("no model 'nope'", "segment", scan, "-p", "liver", "-m", "nope", "-o", out),
        ("the output folder is not a folder", *into, scan),
        ("the output folder is not a folder", *into, scan / "deeper"),
        ("unrecognized arguments", "segment", scan, "-p", "liver", "--colour", *base),
        ("overlap is from 0", "segment", scan, "-p", "liver", "--overlap", "3", *base),
        ("did you mean 'segment'", "segmnt"),
        ("unknown mask writer 'nifi', did you mean 'nifti'", *into, out, "--writer", "nifi"),
        ("no such file", "info", tmp_path / "no.nhdr"),
        ("nothing is called", "list", "zzz"),
        ("did you mean 'mome_ct_tiny'", "info", "mome_ct_tinny"),
        ("no such file or folder", "evaluate", tmp_path / "a", tmp_path / "b"),
        ("no such training configuration", "train", "--config", tmp_path / "no.yaml"),
        ("no such file", "demo", tmp_path / "no.nii.gz"),
    ]
    for words, *arguments in cases:
        assert words in " ".join(fails(capsys, 2, *arguments).split()), arguments
    assert not out.exists()
    assert scan.read_bytes() == before


def test_a_frame_is_chosen(capsys, model_folder: str, tmp_path: Path) -> None:
    four = tmp_path / "four.nii.gz"
    nib.save(nib.Nifti1Image(np.zeros((8, 8, 8, 2), np.int16), np.diag([4.0, 4, 4, 1])), four)
    arguments = ["segment", four, "-p", "liver", "-m", model_folder, "-o", tmp_path / "o", "--frame", 1]
    assert main([str(a) for a in arguments]) == 0
    assert nib.load(tmp_path / "o" / "four_liver.nii.gz").shape == (8, 8, 8)


def test_messages_are_printed_as_they_are(capsys) -> None:
    """rich would take "[dicom]" for a style and drop it."""
    from rich.console import Console

    from mome.cli.segment import _print_study

    failed = {"name": "a", "status": "failed", "error": 'pip install "mome[dicom]"'}
    _print_study(failed, Path("out"), Console(stderr=True), set())
    assert 'pip install "mome[dicom]"' in capsys.readouterr().err


def test_a_typo_in_a_config_string(capsys, tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("labels: [liver]\nsources: [{kind: phantom, count: 1}]\n")
    printed = fails(capsys, 2, "train", "--config", recipe, "experts=swigu(n=8)", f"train.out={tmp_path}/r")
    assert "unknown expert 'swigu', did you mean 'swiglu'?" in printed
    printed = fails(capsys, 2, "train", "--config", recipe, "preset=mome_ct_tinny", f"train.out={tmp_path}/r")
    assert "unknown preset 'mome_ct_tinny'" in printed


@contextlib.contextmanager
def full_disk() -> Iterator[None]:
    """Limits the size of files that this process may write, so that writers meet an error of the system."""
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_is_code_1_and_leaves_nothing(capsys, scan: Path, model_folder: str, tmp_path: Path) -> None:
    with full_disk():
        code = main(["segment", str(scan), "-p", "liver", "-m", model_folder, "-o", str(tmp_path / "out")])
    printed = capsys.readouterr().err
    assert code == 1, printed
    assert "could not be written" in printed and "Traceback" not in printed
    assert list((tmp_path / "out").iterdir()) == []


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file"):
        main(["segment", str(tmp_path / "no.nii.gz"), "-p", "liver", "-o", "o", "--debug"])


def test_evaluate(capsys, tmp_path: Path) -> None:
    grid = Grid((10, 10, 10), np.diag([2.0, 2, 2, 1]))
    a = np.zeros(grid.shape, np.uint8)
    a[2:6, 2:6, 2:6] = 1
    write_mask(tmp_path / "p" / "x_liver.nii.gz", a, grid)
    write_mask(tmp_path / "r" / "x_liver.nii.gz", np.roll(a, 1, 0), grid)
    assert main(["evaluate", str(tmp_path / "p"), str(tmp_path / "r"), "--json", "--out", str(tmp_path / "s.csv")]) == 0
    row = json.loads(capsys.readouterr().out)["structures"][0]
    assert row["structure"] == "liver" and row["dice"]["mean"] == 0.75
    assert (tmp_path / "s.csv").read_text().startswith("case,structure,dice")
    assert main(["evaluate", str(tmp_path / "p"), str(tmp_path / "r")]) == 0
    assert "0.750" in capsys.readouterr().out


def test_info(capsys, scan: Path, model_folder: str) -> None:
    assert main(["info", str(scan), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["spacing (mm)"] == [4.0, 4.0, 4.0]
    assert main(["info", model_folder]) == 0
    printed = capsys.readouterr().out
    assert "unet(channels=[4, 8])" in printed and "trained on" in printed
    assert main(["info", "mome-ct-tiny", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["overlap of tiles"] == 0.25
    assert main(["info", "mome_ct_base"]) == 0


@pytest.mark.parametrize("overlap", [0.0, pytest.param(None, marks=pytest.mark.wide)])
def test_demo(capsys, tmp_path: Path, monkeypatch, overlap: float | None) -> None:
    """The command has no option for the overlap; without any it takes less than half the time."""
    from mome.inference import Segmenter

    defaults = Segmenter.__init__.__kwdefaults__
    assert defaults["overlap"] is None  # the model's own
    monkeypatch.setitem(defaults, "overlap", overlap)
    assert main(["demo", "-o", str(tmp_path), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert len(report["structures"]) == 7 and not report["warnings"]
    assert all(row["dice"] > 0.5 for row in report["structures"])
    for path in report["files"]:
        assert Path(path).is_file()
    assert any(path.endswith("preview.png") for path in report["files"])
    corrected = next(Path(path) for path in report["files"] if path.endswith("_mandible.nii.gz"))
    corrected.write_bytes(b"corrected by hand")
    assert main(["demo", "-o", str(tmp_path)]) == 2
    assert "the file is not as the last demo wrote it" in capsys.readouterr().err
    assert corrected.read_bytes() == b"corrected by hand"


@pytest.mark.wide
def test_liver_on_the_torso_scan(capsys, ct_data: Path, tmp_path: Path) -> None:
    """The neck's model was not trained on the liver and must say so; its bank has the label, so no tower is needed."""
    path = ct_data / "torso" / "ts_example_ct.nii.gz"
    options = ["-m", "mome-ct-tiny", "-o", str(tmp_path), "--overlap", "0"]
    assert main(["segment", str(path), "-p", "liver", *options]) == 0
    assert "not trained on 'liver'" in " ".join(capsys.readouterr().err.split())
    image = nib.load(tmp_path / "ts_example_ct_liver.nii.gz")
    np.testing.assert_allclose(image.affine, nib.load(path).affine)
    assert image.shape == nib.load(path).shape
