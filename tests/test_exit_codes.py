"""Exit codes: 2 in at most three lines for what the user can mend, 143 for SIGTERM, and output for every locale."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from refusals import refused
from training_runs import NAMES, write_recipe

from mome.atomic import check_output_folder
from mome.cli.exit_codes import describe
from mome.cli.main import main
from mome.errors import InputError, OutputError, is_bug
from mome.inference import Segmenter
from mome.printable import printable

DEEP = "[" * 100_000


# -- options ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--device", "meta", "'meta' cannot be used"),
        ("--device", "mps", "mps"),
        ("--device", "xla", "xla"),
        ("--device", "banana", "no such device"),
        ("--device", "cpu:-1", ""),
        ("--threads", "-1", "--threads is at least 0, got -1"),
        ("--threads", "100000", "--threads is at most"),
        ("--threads", "99999999999999999999", "--threads is at most"),
        ("--overlap", "nan", "overlap is from 0"),
    ],
)
def test_options_out_of_range(
    capsys, scan: Path, model_folder: str, tmp_path: Path, option: str, value: str, words: str
) -> None:
    if value == "mps":
        import torch

        if torch.backends.mps.is_available():
            pytest.skip("this machine has such a device")
    out = tmp_path / "out"
    refused(capsys, words, "segment", scan, "-p", "liver", "-m", model_folder, "-o", out, option, value)
    assert not out.exists()


def test_a_demo_that_cannot_be_written_is_found_first(capsys, tmp_path: Path, monkeypatch) -> None:
    def ran(*arguments: object) -> None:
        raise AssertionError("the demo began")

    monkeypatch.setattr("mome.inference.Segmenter.__init__", ran)
    (tmp_path / "file").write_text("")
    refused(capsys, "not a folder", "demo", "-o", tmp_path / "file")
    refused(capsys, "at least 0", "demo", "-o", tmp_path / "d", "--seed", "-1")
    if Path("/proc/self").exists():  # a folder in which even the superuser makes no file
        refused(capsys, "may not be written", "demo", "-o", "/proc/mome-demo")
        with pytest.raises(InputError, match="may not be written"):
            check_output_folder("/proc/mome")
    if os.geteuid():
        (tmp_path / "closed").mkdir(mode=0o500)
        refused(capsys, "may not be written", "demo", "-o", tmp_path / "closed" / "d")


def test_names_that_a_file_cannot_have(capsys, model_folder: str, tmp_path: Path) -> None:
    long = tmp_path / ("x" * 300 + ".nii.gz")
    refused(capsys, "File name too long", "segment", long, "-p", "liver", "-m", model_folder, "-o", tmp_path / "o")
    refused(capsys, "", "train", "--config", tmp_path)
    if os.geteuid():
        closed = tmp_path / "closed.yaml"
        closed.write_text("labels: [liver]")
        closed.chmod(0)
        refused(capsys, "cannot be read", "train", "--config", closed)


def test_errors_of_the_system() -> None:
    assert describe(PermissionError(13, "Permission denied", "/a"))[0] == 2
    assert describe(FileNotFoundError(2, "No such file", "/a"))[0] == 2
    assert describe(OSError(28, "No space left on device", "/a"))[0] == 1
    assert describe(OutputError("full"))[0] == 1 and describe(InputError("x"))[0] == 2
    assert describe(KeyError("x"))[0] == 1 and describe(MemoryError())[0] == 2
    # As where a model does not fit a GPU: no error of ours, and the user can mend it.
    on_gpu = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    assert describe(on_gpu) == describe(MemoryError()) and not is_bug(on_gpu)
    for said in ("std::bad_alloc", "CUDA error: out of memory", "cuDNN error: CUDNN_STATUS_ALLOC_FAILED"):
        assert describe(RuntimeError(said)) == describe(MemoryError()) and not is_bug(RuntimeError(said))
    code, lines = describe(UnicodeEncodeError("ascii", "é", 0, 1, "ordinal not in range"))
    assert code == 2 and len(lines) == 3
    for error in (InputError("a", where="b\nc\x1b[31m", hint="d\ne"), OSError(13, "no", "a\nb\x1b]0;x")):
        lines = describe(error)[1]
        assert len(lines) <= 3 and not any("\x1b" in line or "\n" in line for line in lines)


def test_a_bug_in_a_study_ends_with_1(capsys, monkeypatch, scan: Path, model_folder: str, tmp_path: Path) -> None:
    real = Segmenter.segment
    other = scan.with_name("other.nii.gz")
    other.write_bytes(scan.read_bytes())

    def stumble(self: Segmenter, given: Path, *rest: object, **options: object) -> object:
        if given.name == scan.name:
            raise RuntimeError("something odd")
        return real(self, given, *rest, **options)

    def run(*scans: Path) -> int:
        return main(["segment", *map(str, scans), "-p", "liver", "-m", model_folder, "-o", str(tmp_path / "o")])

    monkeypatch.setattr(Segmenter, "segment", stumble)
    assert run(scan) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines == [
        "RuntimeError: something odd",
        "  this is a bug in mome: run again with --debug and report the traceback",
    ]
    assert run(scan, other) == 1 and run(other) == 0
    capsys.readouterr()
    broken = scan.with_name("broken.nii.gz")
    broken.write_bytes(b"no scan")
    assert run(other, broken) == 2


# -- signals and locales ------------------------------------------------------------------------------------------


def run_python(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        env={**os.environ, **environment},
        timeout=60,
        check=False,
    )


def test_sigterm_ends_as_ctrl_c_does(tmp_path: Path) -> None:
    code = f"""
import os, signal, sys
from mome.atomic import atomic_write
from mome.cli.exit_codes import guarded
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore the signal
def write(number):
    with atomic_write({str(tmp_path / "a.txt")!r}) as part:
        part.write_text("half")
        os.kill(os.getpid(), number)
        signal.pause()
sys.exit(guarded(lambda: write(signal.{{name}})))
"""
    for name, expected, words in (("SIGTERM", 143, b"stopped by SIGTERM"), ("SIGINT", 130, b"stopped")):
        done = run_python(code.replace("{name}", name))
        assert done.returncode == expected and done.stderr.strip() == words
        assert not list(tmp_path.iterdir())


ASCII = {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"}


def test_what_a_locale_cannot_print_is_escaped() -> None:
    code = (
        "import sys; from mome.cli.exit_codes import guarded; sys.exit(guarded(lambda: print('\\xe9 \\u2013 \\udcff')))"
    )
    done = run_python(code, **ASCII)
    assert done.returncode == 0 and done.stdout.strip() == rb"\xe9 \u2013 \udcff"
    done = run_python(code, PYTHONIOENCODING="utf-8")
    assert done.returncode == 0 and done.stdout.strip() == "é – ".encode() + rb"\udcff"
    done = run_python("from mome.cli.main import main; raise SystemExit(main(['list', 'labels', '*']))", **ASCII)
    assert done.returncode == 0 and b"liver" in done.stdout and not done.stderr


@pytest.mark.wide
def test_commands_under_an_ascii_locale(scan: Path, model_folder: str, tmp_path: Path) -> None:
    other = tmp_path / "scän.nii.gz"
    scan.rename(other)
    out = tmp_path / "out"
    for arguments in (
        ["segment", str(other), "-p", "liver", "-m", model_folder, "-o", str(out)],
        ["evaluate", str(out), str(out)],
        ["info", "mome_ct_tiny"],
        ["segment", str(tmp_path / "fehlt-ü.nii.gz"), "-p", "liver", "-o", str(out)],
    ):
        code = "import sys; from mome.cli.main import main; raise SystemExit(main(sys.argv[1:]))"
        done = run_python(code, *arguments, **ASCII)
        assert done.returncode == (2 if "fehlt" in arguments[1] else 0), done.stderr
        assert b"Traceback" not in done.stderr


# -- what is printed ----------------------------------------------------------------------------------------------


def test_terminal_escapes_are_written_out(capsys, model_folder: str, tmp_path: Path) -> None:
    assert printable("a\x1b[31m\nb\x9b\u202e\udcff") == r"a\x1b[31m\x0ab\x9b\u202e\udcff"
    assert printable("Nähe – 5 µm, 肝") == "Nähe – 5 µm, 肝"
    bad = "a\x1b]0;owned\x07"
    printed = refused(capsys, r"a\x1b]0;owned\x07", "segment", tmp_path / bad, "-p", "liver", "-o", tmp_path / "o")
    assert "\x1b" not in printed
    from rich.console import Console

    from mome.cli.evaluate import _table
    from mome.cli.segment import _print_study

    score = {"n": 1, "mean": 1.0, "median": 1.0}
    row = {"structure": f"{bad}[red]x[/red]", "n": 1, "dice": score, "nsd": score, "hd95": score}
    Console(stderr=True, width=200).print(_table([row], 2.0, " "))
    structure = {"name": bad, "volume_ml": 1.0, "warning": f"{bad} is odd"}
    done = {"name": bad, "status": "done", "seconds": 1.0, "notes": [bad], "masks": [bad], "overlapping_voxels": None}
    _print_study({**done, "structures": [structure]}, Path(bad), Console(stderr=True, width=200), set())
    _print_study({"name": bad, "status": "failed", "error": f"no\n{bad}"}, Path(bad), Console(stderr=True), set())
    printed = capsys.readouterr().err
    assert "\x1b" not in printed and "\x07" not in printed and printed.count(r"\x1b]0;owned\x07") == 9
    assert "[red]x[/red]" in printed


def test_readers_do_not_print_before_us(capfd, model_folder: str, scan: Path, tmp_path: Path) -> None:
    odd = tmp_path / "odd.nii"
    image = nib.load(scan)
    nib.save(nib.Nifti1Image(np.asanyarray(image.dataobj), image.affine), odd)
    data = bytearray(odd.read_bytes())
    data[76:80] = np.float32(0.5).tobytes()  # pixdim[0], which is 1 or -1
    odd.write_bytes(data)
    main(["segment", str(odd), "-p", "liver", "-m", model_folder, "-o", str(tmp_path / "o")])
    assert "qfac" not in capfd.readouterr().err
    pytest.importorskip("SimpleITK")
    broken = tmp_path / "broken.mha"
    broken.write_bytes(
        b"ObjectType = Image\nNDims = 3\nDimSize = 4 4 4\nElementType = MET_SHORT\nElementDataFile = LOCAL\nxx"
    )
    assert main(["segment", str(broken), "-p", "liver", "-m", model_folder, "-o", str(tmp_path / "o2")]) == 2
    printed = capfd.readouterr().err
    assert "WARNING" not in printed and "itk::" not in printed


def test_labels_of_a_run_are_known(capsys, tmp_path: Path) -> None:
    assert NAMES
    recipe = write_recipe(tmp_path)
    refused(
        capsys, "did you mean 'mandible'", "train", "--config", recipe, "labels=[mandibel]", f"train.out={tmp_path}/r"
    )


FULL = pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")


@FULL
@pytest.mark.parametrize("arguments", [["--help"], ["list", "heads"]])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_output_that_cannot_be_written_is_said(arguments: list[str], unbuffered: str) -> None:
    """Not at the interpreter's exit, where Python would print an error of its own and end with 120."""
    code = "import sys; from mome.cli.main import main; sys.exit(main())"
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
            check=False,
        )
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 1 and len(lines) == 2, done.stderr
    assert lines[0].endswith("No space left on device") and "write" in lines[0].replace("written", "write")
